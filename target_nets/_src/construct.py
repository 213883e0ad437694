"""How the constructors turn their arguments into the settings and the first state of a target."""

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_map_with_path
from jax.typing import ArrayLike

from target_nets._src import checks, differences, dtypes, leaves, placement, trees
from target_nets._src.leaves import PyTree, Tree
from target_nets._src.state import Schedule
from target_nets._src.unwrap import is_nnx_object, unwrap_mask

# A tree prefix of booleans, a callable of the parameters that returns one, or None.
Mask: TypeAlias = Any


def leaf_dtypes(params: PyTree) -> list[dtypes.DType]:
    """Returns the dtypes that the parameters have as jax arrays, or raises if a leaf is not one."""
    trees.check_arrays(params, "params")
    trees.check_wide_integers(params, "params")
    return [leaves.array_type(x).dtype for x in jax.tree.leaves(params)]


def first_slow_copy(params: Tree, stored_dtypes: Sequence[dtypes.DType]) -> Tree:
    """Returns copies of the parameters in these dtypes, strongly typed."""
    copies, treedef = jax.tree.flatten(placement.copy_to_own_buffers(params))
    pairs = zip(copies, stored_dtypes, strict=True)
    return treedef.unflatten([x if dtypes.is_key(dtype) else x.astype(dtype) for x, dtype in pairs])


def dtypes_to_restore(
    param_dtypes: Sequence[dtypes.DType], stored_dtypes: Sequence[dtypes.DType]
) -> tuple[dtypes.DType | None, ...] | None:
    """Returns `Settings.param_dtypes`: the dtypes of the parameters that are stored in another one."""
    pairs = zip(param_dtypes, stored_dtypes, strict=True)
    restored = tuple(None if dtype == stored else dtype for dtype, stored in pairs)
    return None if all(dtype is None for dtype in restored) else restored


def zero_compensation(slow: PyTree, averaged: Sequence[bool]) -> PyTree:
    """Returns zeros for each inexact leaf that is averaged, placed as the leaf is, and else None."""

    def zeros(x: jax.Array, average: bool) -> jax.Array | None:
        if not average or not dtypes.is_inexact(x.dtype):
            return None
        like = placement.match_sharding(jnp.zeros_like(x), x)
        return placement.link_shardings(placement.match_memory(like, x), x)

    params, treedef = jax.tree.flatten(slow)
    return treedef.unflatten(list(map(zeros, params, averaged)))


def resolve_mask(mask: Mask, params: PyTree, arrays: PyTree) -> tuple[bool, ...]:
    """Returns whether to average each leaf of `arrays`, which are those of `params`."""
    if mask is None:
        mask = True
    elif callable(mask) and leaves.is_leaf(mask) and not is_nnx_object(mask):  # not a tree of booleans
        mask = mask(params)

    def spread(path: leaves.KeyPath, value: object, branch: PyTree) -> list[bool]:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"mask{keystr(path)}: expected a boolean, got {leaves.describe(value)}")
        return [bool(value)] * jax.tree.structure(branch).num_leaves

    mask = unwrap_mask(mask, params)
    if (difference := differences.find_prefix_difference(mask, arrays)) is not None:
        path, got, expected = difference
        raise ValueError(f"mask{path}: expected {expected} as in params, or a boolean, got {got}")
    return tuple(jax.tree.leaves(tree_map_with_path(spread, mask, arrays)))


def parse_step_size(
    step_size: ArrayLike | Schedule, shape: tuple[int, ...] = ()
) -> tuple[float | Schedule | None, jax.Array | None]:
    """Returns a static step size, which is a number or a schedule, and an array. One of them is None.

    Args:
      step_size: What the user gave.
      shape: The shape of an array: that of a population, which `vmap` has batched.
    """
    if callable(step_size):
        try:
            hash(step_size)
        except TypeError:
            raise TypeError(f"step_size: a schedule must be hashable, got {step_size!r}") from None
        return step_size, None
    if shape and isinstance(step_size, np.ndarray):
        step_size = jnp.asarray(step_size)
    checked = checks.check_step_size(step_size, shape)
    if isinstance(checked, float) and 0.9 <= checked < 1:
        warnings.warn(
            f"step_size={checked:.10g} copies almost all of the online parameters at once. A decay of "
            f"{checked:.10g} is step_size={1 - checked:.10g}; for a full copy use 1",
            UserWarning,
            stacklevel=3,
        )
    if isinstance(step_size, jax.Array | np.ndarray):
        array = jnp.array(step_size)
        # It is made strongly typed, so that assigning another one compiles nothing.
        return None, array.astype(array.dtype)
    return float(checked), None
