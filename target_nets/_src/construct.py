"""What the constructors make of their arguments."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_map_with_path
from jax.typing import ArrayLike, DTypeLike

from target_nets._src import checks, dtypes, placement, trees
from target_nets._src.state import Count, Schedule, host_count
from target_nets._src.trees import PyTree, Tree

Mask: TypeAlias = (
    Any  # a tree prefix of booleans, a callable of the parameters that returns one, or None
)


def leaf_dtypes(params: PyTree) -> list[dtypes.DType]:
    """Returns the dtypes of the parameters as jax canonicalizes them. Raises if a leaf is no array."""
    trees.check_arrays(params, "params")
    return [trees.array_type(x).dtype for x in jax.tree.leaves(params)]


def storage_dtypes(
    params: Sequence[dtypes.DType], averaged: Sequence[bool], accumulator: DTypeLike | None
) -> list[dtypes.DType]:
    """Returns the dtypes that the slow copy is stored in. Leaves that are copied keep their own."""
    wanted = None if accumulator is None else checks.check_accumulator_dtype(accumulator)
    pairs = zip(params, averaged, strict=True)
    return [dtypes.storage_dtype(dtype, wanted) if average else dtype for dtype, average in pairs]


def start_slow_copy(params: Tree, stored: Sequence[dtypes.DType]) -> Tree:
    """Returns copies of the parameters in these dtypes, strongly typed."""
    copies, treedef = jax.tree.flatten(placement.copy_to_own_buffers(params))
    pairs = zip(copies, stored, strict=True)
    return treedef.unflatten([x if dtypes.is_key(dtype) else x.astype(dtype) for x, dtype in pairs])


def zero_compensation(slow: PyTree, averaged: Sequence[bool]) -> PyTree:
    """Returns zeros for the inexact leaves that are averaged, each where its leaf is, else None."""

    def zeros(x: jax.Array, average: bool) -> jax.Array | None:
        if not average or not dtypes.is_inexact(x.dtype):
            return None
        like = placement.shard_as(jnp.zeros_like(x), x)
        return placement.link_shardings(placement.to_memory_of(x, like), x)

    params, treedef = jax.tree.flatten(slow)
    return treedef.unflatten(list(map(zeros, params, averaged)))


def zero_counter(slow: PyTree) -> Count:
    """Returns a counter that starts where updates will leave it: on the devices of the slow copy."""
    shardings = [sharding for x in jax.tree.leaves(slow) if (sharding := placement.sharding_of(x))]
    if not shardings:
        return host_count(0)
    first = shardings[0]
    replicated = (
        NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first
    )
    return jax.device_put(host_count(0), replicated)


def resolve_mask(mask: Mask, params: PyTree) -> tuple[bool, ...]:
    """Returns which leaves to average, one boolean for each."""
    if mask is None:
        mask = True
    elif callable(mask) and trees.is_leaf(mask):  # a Module of booleans is callable, too, but is a node
        mask = mask(params)

    def spread(path: trees.KeyPath, value: object, branch: PyTree) -> list[bool]:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"mask{keystr(path)}: expected a boolean, got {trees.describe(value)}")
        return [bool(value)] * jax.tree.structure(branch).num_leaves

    try:
        spread_mask = tree_map_with_path(spread, mask, params)
    except ValueError as error:
        raise ValueError(f"mask: expected a tree prefix of params; {error}") from None
    return tuple(jax.tree.leaves(spread_mask))


def parse_step_size(step_size: ArrayLike | Schedule) -> tuple[float | Schedule | None, jax.Array | None]:
    """Returns a number or a schedule, which is static, or else an array. The other one is None."""
    if callable(step_size):
        try:
            hash(step_size)
        except TypeError:
            raise TypeError(f"step_size: a schedule must be hashable, got {step_size!r}") from None
        return step_size, None
    checked = checks.check_step_size(step_size)
    is_array = isinstance(step_size, jax.Array | np.ndarray)
    return (None, jnp.array(step_size)) if is_array else (float(checked), None)
