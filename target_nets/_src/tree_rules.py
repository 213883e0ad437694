"""The rules over whole trees. Each is one compiled call.

`apply_plan` serves `EMATarget`, `PeriodicTarget`, `incremental_update` and `periodic_update`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from target_nets._src import arithmetic, checks, dtypes, leaves, placement, trees
from target_nets._src.compensation import compensated_lerp
from target_nets._src.differences import Names
from target_nets._src.leaves import PyTree, Tree
from target_nets._src.placement import Shardings
from target_nets._src.slow_copy import SlowCopy, Word
from target_nets._src.state import COPY_ALL, Count, Plan, next_count
from target_nets._src.stochastic_rounding import leaf_seeds
from target_nets._src.unwrap import find_nnx_objects, rewrap, unwrap_pair

TENSOR_NAMES = Names("new_tensors", "old_tensors")
UPDATE_NAMES = Names("updates", "params")


def apply_plan(
    plan: Plan,
    online: PyTree,
    slow: SlowCopy,
    names: Names,
    *,
    skipped: Count | None = None,
    step_size: ArrayLike | None = None,
    due_before: Count | None = None,
    shardings: Shardings = None,
    donate: bool = False,
) -> tuple[SlowCopy, Count | None]:
    """Averages or copies all leaves, in one compiled call.

    Args:
      plan: Which leaves to average, and the step size if it is a number or a schedule.
      online: The online parameters.
      slow: The slow copy, of the same structure and shapes.
      names: The names of both trees in error messages.
      skipped: How many averagings were skipped so far. None without `skip_nonfinite`.
      step_size: The step size if it is an array, else None.
      due_before: How many averagings were due before this one. Only some plans need it.
      shardings: The shardings of the slow leaves, if they are known; see `placement.match_sharding`.
      donate: Whether to reuse the memory of the slow copy.

    Returns:
      The new slow copy and the new count of skipped averagings.
    """
    compiled = _compiled_donating if donate else _compiled
    scalars = skipped, step_size, due_before
    try:
        return compiled(trees.jit_argument(online), slow, *scalars, plan, names, shardings)
    except trees.JIT_ERRORS as error:
        trees.raise_naming_leaf(error, online, slow.params, names, slow.values)
        raise


def apply_plan_to_tensors(
    plan: Plan, new: PyTree, old: Tree, step_size: ArrayLike | None = None
) -> Tree:
    """Averages or copies all leaves of two trees."""

    def rule(new: PyTree, old: PyTree) -> PyTree:
        return apply_plan(plan, new, SlowCopy(old), TENSOR_NAMES, step_size=step_size)[0].params

    return _call_rule(rule, new, old, TENSOR_NAMES)


def copy_if_due(new: PyTree, old: Tree, steps: ArrayLike, period: ArrayLike) -> Tree:
    """Copies all leaves if the number of steps is a multiple of the period. The device decides it."""
    return _call_rule(partial(_copy_if_due, steps=steps, period=period), new, old, TENSOR_NAMES)


def add(updates: PyTree, params: Tree) -> Tree:
    """Adds the updates to the parameters."""
    return _call_rule(_add, updates, params, UPDATE_NAMES)


def check_tensors(new: PyTree, old: PyTree) -> None:
    """Raises if two trees do not fit each other."""
    new_arrays, old_arrays = _unwrap(new, old, TENSOR_NAMES)
    trees.zip_leaves(new_arrays, old_arrays, TENSOR_NAMES)


def _unwrap(new: PyTree, old: PyTree, names: Names) -> tuple[PyTree, PyTree]:
    """Returns the arrays of both trees, or raises if jax would not keep the value of an integer."""
    new_arrays, old_arrays = unwrap_pair(new, old)
    if new_arrays is not new:  # jax arrays, the usual case, come back as they are
        trees.check_wide_integers(old_arrays, names.old)
        new_arrays = trees.fit_integers(new_arrays, old_arrays, names)
    return new_arrays, old_arrays


def _call_rule(rule: Callable[[PyTree, PyTree], PyTree], new: PyTree, old: Tree, names: Names) -> Tree:
    """Calls a compiled rule with the arrays of two trees, and returns a tree like the old one."""
    new_arrays, old_arrays = _unwrap(new, old, names)
    try:
        result = rule(trees.jit_argument(new_arrays), trees.jit_argument(old_arrays))
    except trees.JIT_ERRORS as error:
        trees.raise_naming_leaf(error, new_arrays, old_arrays, names)
        raise
    return result if old_arrays is old else rewrap(result, find_nnx_objects(old))


# Compiled functions


def _apply_to_leaves(
    online: PyTree,
    slow: SlowCopy,
    skipped: jax.Array | None,
    step_size: jax.Array | None,
    due_before: jax.Array,
    plan: Plan,
    names: Names,
    shardings: Shardings,
) -> tuple[SlowCopy, jax.Array | None]:
    words, treedef = slow.words(), jax.tree.structure(slow.params)
    pairs, _ = trees.zip_leaves(online, treedef.unflatten([value for value, _ in words]), names)
    placed = zip(pairs, shardings or [None] * len(pairs), strict=True)
    pairs = [(placement.match_sharding(*pair, sharding), pair[1]) for pair, sharding in placed]
    finite = None if skipped is None else _all_finite([new for new, _ in pairs], shardings)
    rate = step_size_now(plan, step_size, due_before, skipped)
    weights = arithmetic.weigh(rate, pairs, finite)

    # Compiled separately, so that all leaves of one shape and dtype share one trace.
    @partial(jax.jit, static_argnames="average")
    def apply(new: jax.Array, word: Word, seed: jax.Array | None, average: bool) -> Word:
        value, error = word
        no_error = None if error is None else jnp.zeros_like(error)
        if not average or not dtypes.is_inexact(value.dtype):  # integers, booleans and PRNG keys
            copied = arithmetic.copy(new, value)
            return copied if finite is None else jnp.where(finite, copied, value), no_error
        if error is None or no_error is None:
            return arithmetic.lerp(new, value, weights, seed), None
        return compensated_lerp((new, no_error), (value, error), weights)

    averaged = plan.averaged if isinstance(plan.averaged, tuple) else [plan.averaged] * len(pairs)
    seeds = leaf_seeds(len(pairs), due_before) if plan.is_random else []
    afters: list[Word] = []
    for index, ((new, old), word, average) in enumerate(zip(pairs, words, averaged, strict=True)):
        is_random = plan.is_random and average and dtypes.is_below_32_bits(old.dtype)
        afters.append(apply(new, word, seeds[index] if is_random else None, average))

    if skipped is not None and finite is not None:
        values = zip(pairs, afters, strict=True)
        narrow = [x for (new, old), (x, _) in values if dtypes.may_overflow(new.dtype, old.dtype)]
        if narrow:
            finite = finite & _all_finite(narrow, None)
            afters = jax.tree.map(partial(lax.select, finite), afters, words)
        skipped = lax.select(finite, skipped, next_count(skipped, 1))
    return slow.with_words(afters), skipped


def _all_finite(leaves: list[jax.Array], shardings: Shardings) -> jax.Array:
    groups = placement.group_alike(leaves, shardings)
    return arithmetic.all_finite(group for group in groups if dtypes.is_inexact(group[0].dtype))


_STATIC = ("plan", "names", "shardings")
_compiled = jax.jit(_apply_to_leaves, static_argnames=_STATIC)
# Copying does not read the old slow leaves, and jit drops arguments that are not read. Their memory can
# be reused only with `keep_unused`.
_compiled_donating = jax.jit(
    _apply_to_leaves, static_argnames=_STATIC, donate_argnames="slow", keep_unused=True
)


def step_size_now(
    plan: Plan, step_size: jax.Array | None, due_before: jax.Array, skipped: jax.Array | None
) -> ArrayLike:
    """Returns the step size of this averaging: an array, a number, or what the schedule returns."""
    if step_size is not None:
        return step_size
    if not callable(plan.step_size):
        return plan.step_size or 0.0  # None if no leaf is averaged
    # Skipped averagings do not advance a schedule. They may outnumber those that were due, since only
    # the count of updates goes back at the end of int32.
    done_before = due_before if skipped is None else jnp.maximum(due_before - skipped, 0)
    rate = plan.step_size(done_before)
    name, kinds = "step_size, as the schedule returned it", (dtypes.Kind.INTEGER, dtypes.Kind.FLOAT)
    checks.check_scalar(name, rate, "a real scalar", *kinds)
    return jnp.asarray(rate)


@jax.jit
def _copy_if_due(new: PyTree, old: PyTree, steps: jax.Array, period: jax.Array) -> PyTree:
    is_due = steps % jnp.maximum(period, 1) == 0  # a traced period cannot raise: it counts as 1
    return lax.cond(is_due, lambda: apply_plan_to_tensors(COPY_ALL, new, old), lambda: old)


@jax.jit
def _add(updates: PyTree, params: PyTree) -> PyTree:
    pairs, treedef = trees.zip_leaves(updates, params, UPDATE_NAMES)
    for index, (_, param) in enumerate(pairs):
        if dtypes.is_key(param.dtype):
            raise TypeError(f"updates{leaves.leaf_path(updates, index)}: a PRNG key takes no update")
    return treedef.unflatten([arithmetic.add(update, param) for update, param in pairs])
