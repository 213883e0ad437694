"""The rules over whole trees. Each is one compiled call.

`apply_plan` serves `EMATarget`, `PeriodicTarget`, `incremental_update` and `periodic_update`.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from target_nets._src import arithmetic, checks, dtypes, leaves, placement, trees
from target_nets._src.differences import Names
from target_nets._src.leaves import PyTree, Tree
from target_nets._src.placement import Shardings
from target_nets._src.state import COPY_ALL, Count, Plan, SlowCopy, next_count
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
      due_before: How many averagings were due before this one. Only schedules need it.
      shardings: The shardings of the slow leaves, if they are known; see `placement.match_sharding`.
      donate: Whether to reuse the memory of the slow copy.

    Returns:
      The new slow copy and the new count of skipped averagings.
    """
    compiled = _compiled_donating if donate else _compiled

    def call() -> tuple[SlowCopy, Count | None]:
        scalars = skipped, step_size, due_before
        return compiled(trees.jit_argument(online), slow, *scalars, plan, names, shardings)

    return trees.call_naming_leaves(call, online, slow.params, names)


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

    def call() -> PyTree:
        return rule(trees.jit_argument(new_arrays), trees.jit_argument(old_arrays))

    result = trees.call_naming_leaves(call, new_arrays, old_arrays, names)
    return result if old_arrays is old else rewrap(result, find_nnx_objects(old))


# Compiled functions

# The value of a slow leaf and its rounding error, if that is kept.
Values: TypeAlias = tuple[jax.Array, jax.Array | None]


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
    pairs, treedef = trees.zip_leaves(online, slow.params, names)
    averaged = plan.averaged if isinstance(plan.averaged, tuple) else [plan.averaged] * len(pairs)
    rate = step_size_now(plan, step_size, due_before, skipped)
    # Compiled separately, so that all leaves of one shape and dtype share one trace.
    lerp = jax.jit(partial(arithmetic.lerp, step_size=rate))
    compensated_lerp = jax.jit(partial(arithmetic.compensated_lerp, step_size=rate))
    finite = None if skipped is None else arithmetic.all_finite([new for new, _ in pairs])

    befores: list[Values] = []
    afters: list[Values] = []
    leaves = zip(pairs, slow.errors(), averaged, shardings or [None] * len(pairs), strict=True)
    for (new, old), old_error, average, sharding in leaves:
        new = placement.match_sharding(new, old, sharding)
        new = new if finite is None else arithmetic.zero_unless(finite, new)
        value, error = placement.to_device_memory((old, old_error))
        befores.append((value, error))
        if not average:
            # `error - error` is 0, since errors are finite, and unlike new zeros it keeps their
            # sharding.
            afters.append((arithmetic.copy(new, value), None if error is None else error - error))
        elif error is None:
            afters.append((lerp(new, value), None))
        else:
            afters.append(compensated_lerp(new, value, error))

    if skipped is not None and finite is not None:
        values = zip(pairs, afters, strict=True)
        narrow = [
            after for (new, old), (after, _) in values if dtypes.may_overflow(new.dtype, old.dtype)
        ]
        finite = finite & arithmetic.all_finite(narrow) if narrow else finite
        afters = jax.tree.map(partial(lax.select, finite), afters, befores)
        skipped = lax.select(finite, skipped, next_count(skipped, 1))
    slow_leaves = zip(afters, pairs, strict=True)
    results = [placement.match_memory(after, old) for after, (_, old) in slow_leaves]
    errors = [error for _, error in results]
    compensation = None if slow.compensation is None else treedef.unflatten(errors)
    return SlowCopy(treedef.unflatten([value for value, _ in results]), compensation), skipped


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
