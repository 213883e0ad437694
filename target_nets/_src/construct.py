"""What the constructors make of their arguments."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, keystr, tree_map_with_path
from jax.typing import ArrayLike

from target_nets._src import dtypes, placement
from target_nets._src.checks import check_step_size
from target_nets._src.leaves import describe, is_leaf
from target_nets._src.state import Count, Schedule, host_count
from target_nets._src.trace import is_eager
from target_nets._src.trees import PyTree, Tree, array_types

Mask: TypeAlias = (
    Any  # a tree prefix of booleans, a callable of the parameters that returns one, or None
)


def leaf_dtypes(params: PyTree) -> list[dtypes.DType]:
    """Returns the dtypes of the parameters as jax canonicalizes them. Raises if a leaf is no array."""
    return [known.dtype for known in array_types(params, "params")]


def start_slow_copy(params: Tree, stored_dtypes: Sequence[dtypes.DType]) -> Tree:
    """Returns copies of the parameters in these dtypes, strongly typed."""
    leaves, treedef = jax.tree.flatten(placement.copy_to_own_buffers(params))
    pairs = zip(leaves, stored_dtypes, strict=True)
    return treedef.unflatten([x if dtypes.is_key(dtype) else x.astype(dtype) for x, dtype in pairs])


def zero_compensation(slow: PyTree, averaged: Sequence[bool]) -> PyTree:
    """Returns zeros for the inexact leaves that are averaged, and None for the others."""
    leaves, treedef = jax.tree.flatten(slow)
    pairs = zip(leaves, averaged, strict=True)
    has_error = [average and dtypes.is_inexact(x.dtype) for x, average in pairs]
    zeros = [_zeros_at(x) if has else None for x, has in zip(leaves, has_error, strict=True)]
    return treedef.unflatten(zeros)


def _zeros_at(x: jax.Array) -> jax.Array:
    """Returns zeros where the array is. In eager Python jax puts them there by itself."""
    zeros = jnp.zeros_like(x)
    if is_eager():
        return zeros
    return placement.link_shardings(placement.to_memory_of(x, placement.shard_as(zeros, x)), x)


def zero_counter(slow: PyTree) -> Count:
    """Returns a counter that starts where updates will leave it: on the devices of the slow copy."""
    shardings = [sharding for x in jax.tree.leaves(slow) if (sharding := placement.sharding_of(x))]
    if not shardings:
        return host_count(0)
    mesh = shardings[0].mesh if isinstance(shardings[0], NamedSharding) else None
    return jax.device_put(host_count(0), NamedSharding(mesh, PartitionSpec()) if mesh else shardings[0])


def resolve_mask(mask: Mask, params: PyTree) -> tuple[bool, ...]:
    """Returns which leaves to average, one boolean for each."""
    if mask is None:
        mask = True
    elif callable(mask) and is_leaf(mask):  # a Module of booleans is callable, too
        mask = mask(params)

    def spread(path: KeyPath, value: object, branch: PyTree) -> list[bool]:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"mask{keystr(path)}: expected a boolean, got {describe(value)}")
        return [bool(value)] * jax.tree.structure(branch).num_leaves

    try:
        return tuple(jax.tree.leaves(tree_map_with_path(spread, mask, params)))
    except ValueError as error:
        raise ValueError(f"mask: expected a tree prefix of params; {error}") from None


def parse_step_size(step_size: ArrayLike | Schedule) -> tuple[float | Schedule | None, jax.Array | None]:
    """Returns a number or a schedule, which is static, or else an array. The other one is None."""
    if callable(step_size):
        try:
            hash(step_size)
        except TypeError:
            raise TypeError(f"step_size: a schedule must be hashable, got {step_size!r}") from None
        return step_size, None
    checked = check_step_size(step_size)
    if isinstance(step_size, jax.Array | np.ndarray):
        return None, jnp.array(step_size)
    return float(checked), None
