"""Leaves: whether jax can compute with one, what it is in a message, and whether two fit each other."""

from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from target_nets._src import dtypes

PyTree: TypeAlias = Any  # jax has no public type for a tree, a treedef or a key path
TreeDef: TypeAlias = Any
KeyPath: TypeAlias = tuple[Any, ...]
Leaf: TypeAlias = Any  # whatever the user passes, before it is checked
Tree = TypeVar("Tree")

_TYPE_OF_ARRAYS: Any = type(jax.typeof(0.0))  # it has no documented name


def leaf_path(tree: PyTree, index: int) -> str:
    """Returns the key path of a leaf, such as `['layer']['kernel']`."""
    return keystr(tree_flatten_with_path(tree)[0][index][0])


def is_leaf(x: Any) -> bool:
    """Whether jax treats an object as a leaf. None is a node."""
    return jax.tree_util.all_leaves([x])


def array_type(x: Leaf) -> Any:
    """Returns an object with the shape and dtype of a leaf, or None if jax cannot compute with it."""
    if isinstance(x, jax.Array):
        return x
    try:
        found: Any = None if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    except (TypeError, ValueError, OverflowError):  # an int past 64 bits
        return None
    is_array = isinstance(found, _TYPE_OF_ARRAYS)  # jax also gives types to Refs, for example
    return found if is_array and dtypes.kind_of(found.dtype) is not None else None


def describe(x: Any) -> str:
    """Returns how a message describes a leaf or a node, such as `float32[3, 4]` or `dict`."""
    if x is None or isinstance(x, jax.Ref):  # a traced Ref is of another class
        return "None" if x is None else "Ref"
    # A NumPy array is described as it is. jax would show the dtype that it converts it to.
    is_numpy = isinstance(x, np.ndarray | np.generic)
    known = x if is_numpy else array_type(x) if is_leaf(x) else None
    return type(x).__name__ if known is None else f"{known.dtype}{list(known.shape)}"


def find_misfit(new: Leaf, old: Leaf) -> type[Exception] | None:
    """Returns the error to raise if an old leaf cannot take the value of a new one, else None."""
    new_type, old_type = array_type(new), array_type(old)
    if new_type is None or old_type is None:
        return TypeError
    if dtypes.is_key(old_type.dtype) and new_type.dtype != old_type.dtype:
        return TypeError  # a number, or a key of another implementation
    new_kind, old_kind = dtypes.kind_of(new_type.dtype), dtypes.kind_of(old_type.dtype)
    if new_kind is None or old_kind is None or new_kind > old_kind:  # None: float0, a zero tangent
        return TypeError
    if new_kind == old_kind == dtypes.Kind.INTEGER and not dtypes.holds(old_type.dtype, new_type.dtype):
        return TypeError
    return None if new_type.shape == old_type.shape else ValueError
