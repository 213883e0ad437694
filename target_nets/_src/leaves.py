"""What one leaf of a tree is, and how a message describes it."""

from typing import Any, TypeAlias

import jax
import numpy as np

from target_nets._src import dtypes

Leaf: TypeAlias = Any  # whatever a user passes, before it is checked


def is_leaf(x: Any) -> bool:
    """Whether jax takes an object for a leaf, not for a node. None is a node."""
    return jax.tree_util.all_leaves([x])


def array_type(x: Leaf) -> Any:
    """Returns what tells the shape and dtype of a leaf that jax computes with, or None for any other."""
    if isinstance(x, jax.Array):
        return x
    try:
        found: Any = None if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    except (TypeError, ValueError, OverflowError):  # an nnx.Variable, or an int past 64 bits
        return None
    return found if found is not None and dtypes.kind_of(found.dtype) is not None else None


def describe(x: Any) -> str:
    """Returns what a message calls a leaf or a node, such as `float32[3, 4]` or `dict`."""
    if x is None:
        return "None"
    known = x if isinstance(x, np.ndarray | np.generic) else array_type(x) if is_leaf(x) else None
    return type(x).__name__ if known is None else f"{known.dtype}{list(known.shape)}"


def find_misfit(new: Leaf, old: Leaf) -> type[Exception] | None:
    """Returns the error to raise where a new leaf cannot replace an old one, or None if it can."""
    new_type, old_type = (
        array_type(new),
        old if isinstance(old, jax.ShapeDtypeStruct) else array_type(old),
    )
    if new_type is None or old_type is None:
        return TypeError
    if dtypes.is_key(old_type.dtype) and new_type.dtype != old_type.dtype:
        return TypeError  # a number, or a key of another implementation
    if (dtypes.kind_of(new_type.dtype) or 0) > (dtypes.kind_of(old_type.dtype) or 0):
        return TypeError
    return None if new_type.shape == old_type.shape else ValueError
