"""The rules over whole trees, one compiled call each.

`move` is the rule of both classes and of `incremental_update` and `periodic_update`.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from target_nets._src import arithmetic, checks, dtypes, placement, trees
from target_nets._src.state import (
    COPY_ALL,
    Count,
    Rule,
    Schedule,
    SlowCopy,
    compensation_leaves,
    next_count,
)
from target_nets._src.trees import Names, PyTree, Tree

Result = TypeVar("Result")

TENSORS = Names("new_tensors", "old_tensors")
UPDATES = Names("updates", "params")


def move(
    online: PyTree,
    slow: SlowCopy,
    rule: Rule,
    names: Names,
    *,
    skipped: Count | None = None,
    step_size: ArrayLike | None = None,
    n: Count | None = None,
    donate: bool = False,
) -> tuple[SlowCopy, Count | None]:
    """Averages or copies all leaves, in one compiled call.

    Args:
      online: The online parameters.
      slow: The slow copy, of the same structure and shapes.
      rule: Which leaves to average, and the step size if it is a number or a schedule.
      names: What to call both trees in messages.
      skipped: How many averagings were skipped so far, if nonfinite online parameters are to be skipped.
      step_size: The step size, if it is an array.
      n: How many averagings were due before this one, if the step size is a schedule.
      donate: Whether to reuse the memory of the slow copy.

    Returns:
      The new slow copy and the new count of skipped averagings.
    """
    online, compiled = trees.jit_argument(online), _donating_move if donate else _move
    return trees.naming_leaves(
        lambda: compiled(online, slow, skipped, step_size, n, rule=rule, names=names),
        (online, slow.params),
        names,
    )


def copy_if_due(new: PyTree, old: Tree, steps: ArrayLike, period: ArrayLike) -> Tree:
    """Copies all leaves if the number of steps is a multiple of the period. The device decides."""
    new = trees.jit_argument(new)
    return trees.naming_leaves(lambda: _copy_if_due(new, old, steps, period), (new, old), TENSORS)


def add(updates: PyTree, params: Tree) -> Tree:
    """Adds the updates to the parameters."""
    updates = trees.jit_argument(updates)
    return trees.naming_leaves(lambda: _add(updates, params), (updates, params), UPDATES)


# What is compiled


def _move_leaves(
    online: PyTree,
    slow: SlowCopy,
    skipped: jax.Array | None,
    step_size: jax.Array | None,
    n: jax.Array,
    *,
    rule: Rule,
    names: Names,
) -> tuple[SlowCopy, jax.Array | None]:
    pairs, treedef = trees.zip_leaves(online, slow.params, names)
    averaged = rule.averaged if isinstance(rule.averaged, tuple) else [rule.averaged] * len(pairs)
    rate = rule.step_size if step_size is None else step_size
    if callable(rate):
        rate = _call_schedule(rate, n, skipped)
    lerp, compensated_lerp = (
        _trace_once(arithmetic.lerp, rate),
        _trace_once(arithmetic.compensated_lerp, rate),
    )
    finite = None if skipped is None else arithmetic.all_finite([new for new, _ in pairs])

    moved: list[tuple[jax.Array, jax.Array | None]] = []
    for (new, old), old_error, average in zip(pairs, compensation_leaves(slow), averaged, strict=True):
        new = placement.shard_as(new, old)
        new = new if finite is None else arithmetic.zero_unless(finite, new)
        value, error = before = placement.to_device_memory((old, old_error))
        if not average:  # zeros that are computed from the error are also sharded as it is
            after = arithmetic.copy(new, value), None if error is None else error - error
        elif error is None:
            after = lerp(new, value), None
        else:
            after = compensated_lerp(new, value, error)
        if finite is not None:
            after = jax.tree.map(partial(lax.select, finite), after, before)
        moved.append(placement.to_memory_of(old, after))

    if skipped is not None and finite is not None:
        skipped = jnp.where(finite, skipped, next_count(skipped, 1))
    errors = [error for _, error in moved]
    compensation = None if slow.compensation is None else treedef.unflatten(errors)
    return SlowCopy(treedef.unflatten([value for value, _ in moved]), compensation), skipped


_move = jax.jit(_move_leaves, static_argnames=("rule", "names"))
# A copy does not read the slow copy. Its memory is reused only if it stays an argument all the same.
_donating_move = jax.jit(
    _move_leaves, static_argnames=("rule", "names"), donate_argnames="slow", keep_unused=True
)


def _call_schedule(schedule: Schedule, n: jax.Array, skipped: jax.Array | None) -> jax.Array:
    """Returns the step size after the averagings that were done: those due less those skipped."""
    step_size = schedule(n if skipped is None else jnp.maximum(n - skipped, 0))
    name, kinds = "step_size, as the schedule returned it", (dtypes.Kind.INTEGER, dtypes.Kind.FLOAT)
    checks.check_scalar(name, step_size, "a real scalar", *kinds)
    return jnp.asarray(step_size)


def _trace_once(leaf_rule: Callable[..., Result], step_size: ArrayLike | None) -> Callable[..., Result]:
    """Returns the rule for a leaf at a step size. All leaves of one shape share one trace of it."""
    return jax.jit(partial(leaf_rule, step_size=step_size))


@jax.jit
def _copy_if_due(new: PyTree, old: PyTree, steps: jax.Array, period: jax.Array) -> PyTree:
    is_due = steps % jnp.maximum(period, 1) == 0
    return lax.cond(is_due, lambda: move(new, SlowCopy(old), COPY_ALL, TENSORS)[0].params, lambda: old)


@jax.jit
def _add(updates: PyTree, params: PyTree) -> PyTree:
    pairs, treedef = trees.zip_leaves(updates, params, UPDATES)
    for index, (_, param) in enumerate(pairs):
        if dtypes.is_key(param.dtype):
            raise TypeError(f"updates{trees.leaf_path(updates, index)}: a PRNG key takes no update")
    return treedef.unflatten([arithmetic.add(update, param) for update, param in pairs])
