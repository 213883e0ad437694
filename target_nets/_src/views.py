"""What a user reads of a slow copy: its parameters, and its distance from the online parameters."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from target_nets._src import arithmetic, dtypes, placement, trace, trees
from target_nets._src.leaves import PyTree
from target_nets._src.slow_copy import SlowCopy, Word
from target_nets._src.state import (
    Plan,
    State,
    check_is_not_abstract,
    check_is_one_target,
)
from target_nets._src.tree_rules import step_size_now
from target_nets._src.unwrap import fits_as_it_is, rewrap, unwrap
from target_nets._src.update import NAMES


def read_params(state: State) -> PyTree:
    """Returns the slow parameters as the target's user knows them: their dtypes and nnx objects."""
    params, param_dtypes = state.params, state.settings.param_dtypes
    has_arrays = all(hasattr(x, "dtype") for x in jax.tree.leaves(params))  # not shardings, for example
    if param_dtypes is not None and has_arrays:
        cast = partial(_cast_params, param_dtypes=param_dtypes)
        is_abstract = isinstance(state.step, jax.ShapeDtypeStruct)
        params = jax.eval_shape(cast, state.slow) if is_abstract else cast(state.slow)
    return rewrap(params, state.settings.nnx_objects)


def read_step_size(state: State) -> jax.Array:
    """Returns the step size of the next averaging, for each member of a population."""
    check_is_not_abstract(state, "next_step_size")
    plan, period = state.settings.plan, state.settings.update_period
    counts: Any = state.step, state.skipped  # which jit takes from the host, too
    return _next_step_size(*counts, state.step_size, plan, period)


def read_distance(state: State, online: PyTree) -> jax.Array:
    """Returns the global L2 norm of online - slow over the inexact leaves."""
    check_is_one_target(state, "distance")
    if not fits_as_it_is(online, jax.tree.structure(state.params)):
        online = trees.fit_integers(unwrap(online), state.params, NAMES)
    if trace.is_eager(online, state.params):
        online, _ = placement.match_devices(online, state.params, jax.tree.leaves(state.params))
    try:
        return _distance(trees.jit_argument(online), state.slow)
    except trees.JIT_ERRORS as error:
        trees.raise_naming_leaf(error, online, state.params, NAMES, state.slow.values)
        raise


@partial(jax.jit, static_argnames=("plan", "period"))
def _next_step_size(
    step: jax.Array, skipped: jax.Array | None, step_size: jax.Array | None, plan: Plan, period: int
) -> jax.Array:
    def now(step: jax.Array, skipped: jax.Array | None, step_size: jax.Array | None) -> jax.Array:
        rate = step_size_now(plan, step_size, step // period, skipped)
        return arithmetic.clip_step_size(jnp.asarray(rate, float))

    for _ in step.shape:  # of a population
        now = jax.vmap(now)
    return now(step, skipped, step_size)


@partial(jax.jit, static_argnames="param_dtypes")
def _cast_params(slow: SlowCopy, param_dtypes: tuple[dtypes.DType | None, ...]) -> PyTree:
    trees.check_enabled(slow.values(), NAMES.old)
    stored, treedef = jax.tree.flatten(slow.params)
    leaves = zip(stored, slow.words(), param_dtypes, strict=True)
    return treedef.unflatten(
        [x if dtype is None else _cast_leaf(x, word, dtype) for x, word, dtype in leaves]
    )


def _cast_leaf(stored: jax.Array, word: Word, dtype: dtypes.DType) -> jax.Array:
    """Returns a slow leaf in this dtype. Its rounding error is added before it is rounded again."""
    value, error = word
    if error is not None and dtype != value.dtype:
        wide = dtypes.arithmetic_dtype(value.dtype, dtype)
        # Without the `where` a sum with an error of 0 would lose the sign of -0.0.
        value = jnp.where(error == 0, value.astype(wide), value.astype(wide) + error.astype(wide))
    return placement.match_memory(value.astype(dtype), stored)


@jax.jit
def _distance(online: PyTree, slow: SlowCopy) -> jax.Array:
    words = slow.words()
    values = jax.tree.structure(slow.params).unflatten([value for value, _ in words])
    pairs, _ = trees.zip_leaves(online, values, NAMES)
    leaves = zip(pairs, words, strict=True)
    inexact = [(new, *word) for (new, _), word in leaves if dtypes.is_inexact(word[0].dtype)]
    wide = [dtypes.arithmetic_dtype(new.dtype, old.dtype) for new, old, _ in inexact]
    dtype = max(map(dtypes.real_dtype, wide), key=lambda dtype: dtype.itemsize, default=jnp.dtype("f4"))
    limit = jnp.finfo(dtype).maxexp  # 128 for float32

    def norm_at(scale: jax.Array) -> jax.Array:
        total = jnp.zeros((), dtype)
        for leaf in inexact:
            scaled = jnp.abs(_gap(*leaf)).astype(dtype) * scale
            total += jnp.sum(scaled * scaled)
        # The derivative of the square root is infinite at 0. This defines it as 0.
        return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), total) / scale

    # The squares of values above 2**(limit/2) overflow, and those below 2**(-limit/2) vanish. A power of
    # two brings very large or very small values to where neither can happen, nor in the derivative.
    norm = norm_at(jnp.ones((), dtype))
    is_small, is_large = norm < 2.0 ** (-limit // 4), norm > 2.0 ** (3 * limit // 8)
    scale = jnp.where(is_small, 2.0 ** (limit * 9 // 16), 2.0 ** (-limit * 5 // 8)).astype(dtype)
    return lax.cond(is_small | is_large, norm_at, lambda _: norm, scale)


def _gap(new: jax.Array, old: jax.Array, error: jax.Array | None) -> jax.Array:
    """Returns online - slow for one leaf, in at least float32."""
    new = placement.match_sharding(new, old)
    dtype = dtypes.arithmetic_dtype(new.dtype, old.dtype)
    gap = arithmetic.cast(new, dtype) - arithmetic.cast(old, dtype)
    return gap if error is None else gap - error.astype(dtype)
