"""Pairs of trees: their leaves together, or an error that says where the trees differ."""

import operator
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from target_nets._src import dtypes
from target_nets._src.differences import Names, describe_differences, mismatch
from target_nets._src.leaves import (
    Leaf,
    PyTree,
    Tree,
    TreeDef,
    array_type,
    describe,
    find_misfit,
    leaf_path,
)

_CONFIG: Any = jax.config  # jax's annotations do not list its settings


def zip_leaves(new: PyTree, old: PyTree, names: Names) -> tuple[list[tuple[Leaf, Leaf]], TreeDef]:
    """Returns the pairs of leaves of two trees and their treedef, or raises where the trees differ.

    Inside jit this runs while tracing and costs nothing afterwards.
    """
    new_leaves, treedef = jax.tree.flatten(new)
    old_leaves, old_treedef = jax.tree.flatten(old)
    if treedef != old_treedef:
        raise ValueError(describe_differences(new, old, names)) from None
    pairs = list(zip(new_leaves, old_leaves, strict=True))
    check_enabled(old, names.old)
    for index, (x, y) in enumerate(pairs):
        if (error := find_misfit(x, y)) is not None:
            check_arrays(old, names.old)
            raise error(mismatch(names, leaf_path(new, index), describe(x), describe(y))) from None
    return pairs, treedef


# What a compiled function may raise about its arguments.
JIT_ERRORS = (TypeError, OverflowError, RuntimeError, ValueError)


def raise_naming_leaf(
    error: Exception,
    new: PyTree,
    old: PyTree,
    names: Names,
    values: Callable[[], PyTree] | None = None,
) -> None:
    """Raises an error with the key path of the leaf that a compiled function has refused, if any.

    jit converts the leaves before it traces the function, so `zip_leaves` inside comes too late.

    Args:
      error: One of `JIT_ERRORS`.
      new: The new tree.
      old: The old tree, as it is stored.
      names: The names of both trees in error messages.
      values: Returns the old tree as the new one must fit it, if it is stored in another way.
    """
    if isinstance(error, TypeError | OverflowError):  # a Python integer that jax cannot represent
        zip_leaves(new, old if values is None else values(), names)
    else:
        _check_not_deleted(new, names.new)
        _check_not_deleted(old, names.old)


def _check_not_deleted(tree: PyTree, name: str) -> None:
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted():
            raise RuntimeError(
                f"{name}{leaf_path(tree, index)}: this array has been deleted, since it was donated to "
                "a function; use what that function returned"
            ) from None


def jit_argument(tree: Tree) -> Tree:
    """Returns the tree as an argument for a compiled function.

    If jit is disabled, all leaves become jax arrays, as jit itself would make them.
    """
    return jax.tree.map(jnp.asarray, tree) if _CONFIG.jax_disable_jit else tree


def check_enabled(old: PyTree, name: str) -> None:
    """Raises if a leaf has a dtype that jax can use only with `jax_enable_x64`, which is now off."""
    for index, leaf in enumerate(jax.tree.leaves(old)):
        dtype = getattr(leaf, "dtype", None)
        if isinstance(leaf, jax.Array) and dtype is not None and not dtypes.is_enabled(dtype):
            raise ValueError(
                f"{name}{leaf_path(old, index)}: {dtype} was made with jax_enable_x64, which is off "
                "here: switch it on, or make this anew"
            )


def fit_integers(new: Tree, old: PyTree, names: Names) -> Tree:
    """Returns the new tree with integers on the host in dtypes in which jax keeps their values.

    A jax array shows in its dtype what it may hold. Of Python's integers, and of NumPy's with 64 bits,
    jax would keep the lower bits. So those for integer leaves are checked by their values, and those for
    inexact leaves become floats.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        return new  # `zip_leaves` will say where they differ
    leaves, treedef = jax.tree.flatten(new)
    for index, (x, y) in enumerate(zip(leaves, jax.tree.leaves(old), strict=True)):
        is_number = isinstance(x, int) and not isinstance(x, bool)
        is_array = isinstance(x, np.ndarray | np.generic)
        is_wide = is_array and x.dtype.kind in "iu" and not dtypes.is_enabled(x.dtype)
        known = array_type(y)
        if known is None or not (is_number or is_wide):
            continue
        if dtypes.kind_of(known.dtype) == dtypes.Kind.INTEGER:
            info = jnp.iinfo(known.dtype)
            if np.size(x) and not (info.min <= np.min(x) and np.max(x) <= info.max):
                what = f"values of {known.dtype}"
                raise ValueError(mismatch(names, leaf_path(new, index), _span(x), what))
            leaves[index] = np.asarray(x, known.dtype) if is_number else x
        elif is_wide and dtypes.is_inexact(known.dtype):
            leaves[index] = np.asarray(x, np.float32)
    return treedef.unflatten(leaves)


def check_wide_integers(tree: PyTree, name: str) -> None:
    """Raises if a NumPy integer needs 64 bits and jax would keep 32 of them."""
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "iu":
            continue
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if dtype != leaf.dtype and np.any(leaf.astype(dtype) != leaf):
            raise ValueError(f"{name}{leaf_path(tree, index)}: {_span(leaf)} needs jax_enable_x64")


def _span(x: Any) -> str:
    return f"{np.min(x)} to {np.max(x)}" if np.ndim(x) else str(x)


def copy_nones(tree: PyTree, reference: PyTree) -> PyTree:
    """Returns the tree with None wherever the reference holds None, as optax's functions do."""
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        is_none = partial(operator.is_, None)
        with suppress(ValueError):  # the trees also differ elsewhere, and `zip_leaves` will say where
            return jax.tree.map(lambda r, x: None if r is None else x, reference, tree, is_leaf=is_none)
    return tree


def check_arrays(tree: PyTree, name: str) -> None:
    """Raises a TypeError if a leaf is not an array or a number."""
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        if array_type(leaf) is None:
            mend = (
                "; track the arrays alone, as eqx.filter(model, eqx.is_array)" if callable(leaf) else ""
            )
            got = describe(leaf)
            raise TypeError(f"{name}{leaf_path(tree, index)}: expected an array, got {got}{mend}")
