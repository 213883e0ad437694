"""What one leaf of a tree is, and how a message describes it."""

from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

from target_nets._src import dtypes

Leaf: TypeAlias = Any  # whatever a user passes, before it is checked


class ArrayType(Protocol):
    """The shape and the dtype of an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> dtypes.DType: ...


def is_leaf(x: Any) -> bool:
    """Whether jax takes an object for a leaf, not for a node. None is a node."""
    return jax.tree_util.all_leaves([x])


def array_type(x: Leaf) -> ArrayType | None:
    """Returns the shape and dtype of a leaf that jax computes with, or None for any other leaf."""
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return None
    try:
        found: Any = jax.typeof(x)
    except (TypeError, ValueError, OverflowError):  # an nnx.Variable, or an int past 64 bits
        return None
    return found if dtypes.kind_of(found.dtype) is not None else None


def describe(x: Any) -> str:
    """Returns what a message calls a leaf or a node, such as `float32[3, 4]` or `dict`."""
    is_numpy = isinstance(x, np.ndarray | np.generic)
    known = x if is_numpy else array_type(x) if x is not None and is_leaf(x) else None
    if known is not None:
        return f"{known.dtype}{list(known.shape)}"
    return "None" if x is None else type(x).__name__


def find_misfit(new: Leaf, old: Leaf) -> type[Exception] | None:
    """Returns the error to raise where a new leaf cannot replace an old one, or None if it can."""
    new_type, old_type = array_type(new), array_type(old)
    if new_type is None or old_type is None:
        return TypeError
    if dtypes.is_key(old_type.dtype) and new_type.dtype != old_type.dtype:
        return TypeError  # a number, or a key of another implementation
    new_kind, old_kind = dtypes.kind_of(new_type.dtype), dtypes.kind_of(old_type.dtype)
    if new_kind is None or old_kind is None or new_kind > old_kind:
        return TypeError
    return None if new_type.shape == old_type.shape else ValueError
