"""What a user reads of a slow copy: its parameters, and its distance from the online parameters."""

from functools import partial

import jax
import jax.numpy as jnp

from target_nets._src import arithmetic, dtypes, placement, trees
from target_nets._src.state import SlowCopy, State, check_is_one_target, compensation_leaves
from target_nets._src.trees import PyTree
from target_nets._src.update import NAMES


def read_params(slow: SlowCopy, param_dtypes: tuple[dtypes.DType, ...] | None) -> PyTree:
    """Returns the slow parameters in these dtypes. With None they are stored in the right ones."""
    if param_dtypes is None:
        return jax.tree.map(lambda x: x, slow.params)  # new containers, which the user may change
    try:
        return _cast_params(slow, param_dtypes)
    except TypeError:  # the target is abstract, from jax.eval_shape, and so are its parameters
        return jax.eval_shape(partial(_cast_params, param_dtypes=param_dtypes), slow)


def read_distance(state: State, online: PyTree) -> jax.Array:
    """Returns the global L2 norm of online - slow over the inexact leaves."""
    check_is_one_target(state, "distance")
    online = trees.jit_argument(placement.place_as(online, state.params))
    return trees.naming_leaves(lambda: _distance(online, state.slow), (online, state.params), NAMES)


@partial(jax.jit, static_argnames="param_dtypes")
def _cast_params(slow: SlowCopy, param_dtypes: tuple[dtypes.DType, ...]) -> PyTree:
    params, treedef = jax.tree.flatten(slow.params)
    leaves = zip(params, compensation_leaves(slow), param_dtypes, strict=True)
    return treedef.unflatten([_cast_leaf(x, error, dtype) for x, error, dtype in leaves])


def _cast_leaf(stored: jax.Array, error: jax.Array | None, dtype: dtypes.DType) -> jax.Array:
    """Returns a slow leaf in another dtype. A compensated one is summed before it is rounded."""
    if stored.dtype == dtype:
        return stored
    value, error = placement.to_device_memory((stored, error))
    if error is not None:
        wide = dtypes.arithmetic_dtype(value.dtype, dtype)
        value = value.astype(wide) + error.astype(wide)
    return placement.to_memory_of(stored, value.astype(dtype))


@jax.jit
def _distance(online: PyTree, slow: SlowCopy) -> jax.Array:
    pairs, _ = trees.zip_leaves(online, slow.params, NAMES)
    leaves = zip(pairs, compensation_leaves(slow), strict=True)
    gaps = [_gap(*pair, error) for pair, error in leaves if dtypes.is_inexact(pair[1].dtype)]
    total = jnp.asarray(sum((jnp.sum(jnp.abs(gap) ** 2) for gap in gaps), 0.0))
    # The derivative of the square root is infinite at 0. That of this one is 0 there.
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), total)


def _gap(new: jax.Array, old: jax.Array, error: jax.Array | None) -> jax.Array:
    """Returns how far an online leaf is from the slow one, in at least float32."""
    new, (old, error) = placement.shard_as(new, old), placement.to_device_memory((old, error))
    dtype = dtypes.arithmetic_dtype(new.dtype, old.dtype)
    gap = arithmetic.cast(new, dtype) - arithmetic.cast(old, dtype)
    return gap if error is None else gap - error.astype(dtype)
