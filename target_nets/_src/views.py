"""What a user reads of a slow copy: its parameters, and its distance from the online parameters."""

from functools import partial

import jax
import jax.numpy as jnp

from target_nets._src import arithmetic, dtypes, placement, trace, trees
from target_nets._src.state import SlowCopy, State, check_is_one_target
from target_nets._src.trees import PyTree
from target_nets._src.unwrap import rewrap, unwrap
from target_nets._src.update import NAMES


def read_params(state: State) -> PyTree:
    """Returns the slow parameters as the target's user knows them: their dtypes and nnx objects."""
    params, param_dtypes = state.params, state.settings.param_dtypes
    if param_dtypes is not None:
        cast = partial(_cast_params, param_dtypes=param_dtypes)
        is_abstract = isinstance(state.step, jax.ShapeDtypeStruct)
        params = jax.eval_shape(cast, state.slow) if is_abstract else cast(state.slow)
    return rewrap(params, state.settings.nnx_objects)


def read_distance(state: State, online: PyTree) -> jax.Array:
    """Returns the global L2 norm of online - slow over the inexact leaves."""
    check_is_one_target(state, "distance")
    online = unwrap(online)
    if trace.is_eager(online, state.params):
        online, _ = placement.match_devices(online, state.params)
    return trees.call_naming_leaves(
        lambda: _distance(trees.jit_argument(online), state.slow), online, state.params, NAMES
    )


@partial(jax.jit, static_argnames="param_dtypes")
def _cast_params(slow: SlowCopy, param_dtypes: tuple[dtypes.DType | None, ...]) -> PyTree:
    params, treedef = jax.tree.flatten(slow.params)
    leaves = zip(params, slow.errors(), param_dtypes, strict=True)
    return treedef.unflatten([_cast_leaf(x, error, dtype) for x, error, dtype in leaves])


def _cast_leaf(stored: jax.Array, error: jax.Array | None, dtype: dtypes.DType | None) -> jax.Array:
    """Returns a slow leaf in this dtype. Its rounding error is added before it is rounded again."""
    if dtype is None:
        return stored
    value, error = placement.to_device_memory((stored, error))
    if error is not None:
        wide = dtypes.arithmetic_dtype(value.dtype, dtype)
        value = value.astype(wide) + error.astype(wide)
    return placement.match_memory(value.astype(dtype), stored)


@jax.jit
def _distance(online: PyTree, slow: SlowCopy) -> jax.Array:
    pairs, _ = trees.zip_leaves(online, slow.params, NAMES)
    leaves = zip(pairs, slow.errors(), strict=True)
    gaps = [_gap(*pair, error) for pair, error in leaves if dtypes.is_inexact(pair[1].dtype)]
    total = jnp.asarray(sum((jnp.sum(jnp.abs(gap) ** 2) for gap in gaps), 0.0))
    # The derivative of the square root is infinite at 0. This defines it as 0.
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), total)


def _gap(new: jax.Array, old: jax.Array, error: jax.Array | None) -> jax.Array:
    """Returns online - slow for one leaf, in at least float32."""
    new = placement.match_sharding(new, old)
    old, error = placement.to_device_memory((old, error))
    dtype = dtypes.arithmetic_dtype(new.dtype, old.dtype)
    gap = arithmetic.cast(new, dtype) - arithmetic.cast(old, dtype)
    return gap if error is None else gap - error.astype(dtype)
