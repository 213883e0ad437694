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

from target_nets._src import arithmetic, dtypes, placement
from target_nets._src.checks import check_scalar
from target_nets._src.compensated import DoubleWord, compensated_lerp
from target_nets._src.state import COPY_ALL, Count, Rule, SlowCopy, compensation_leaves, next_count
from target_nets._src.trees import (
    Names,
    PyTree,
    Tree,
    jit_argument,
    leaf_path,
    naming_leaves,
    zip_leaves,
)

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
    """Averages or copies all leaves, unless nonfinite ones are to be skipped and there are some.

    Args:
      online: The online parameters.
      slow: The slow copy, of the same structure and shapes.
      rule: Which leaves to average, and the step size if it is a number or a schedule.
      names: What to call both trees in messages.
      skipped: How many averagings were skipped so far, or None if none is to be skipped.
      step_size: The step size if it is an array, else None.
      n: How many averagings were due before this one. Only schedules need it.
      donate: Whether to reuse the memory of the slow copy.

    Returns:
      The new slow copy and the new count of skipped averagings.
    """
    online = jit_argument(online)
    with naming_leaves(online, slow.params, names):
        compiled = _donating_move if donate else _move
        return compiled(online, slow, skipped, step_size, n, rule=rule, names=names)


def copy_if_due(new: PyTree, old: Tree, steps: ArrayLike, update_period: ArrayLike) -> Tree:
    """Copies all leaves if the steps are a multiple of the period. The device decides it."""
    new = jit_argument(new)
    with naming_leaves(new, old, TENSORS):
        return _copy_if_due(new, old, steps, update_period)


def add(updates: PyTree, params: Tree) -> Tree:
    """Adds the updates to the parameters."""
    updates = jit_argument(updates)
    with naming_leaves(updates, params, UPDATES):
        return _add(updates, params)


# What is compiled


def _move_leaves(
    online: PyTree,
    slow: SlowCopy,
    skipped: jax.Array | None,
    step_size: jax.Array | None,
    n: jax.Array | None,
    *,
    rule: Rule,
    names: Names,
) -> tuple[SlowCopy, jax.Array | None]:
    pairs, treedef = zip_leaves(online, slow.params, names)
    averaged = rule.averaged if isinstance(rule.averaged, tuple) else [rule.averaged] * len(pairs)
    rate = _step_size_now(rule, step_size, n, skipped)
    lerp, compensated = _trace_once(arithmetic.lerp, rate), _trace_once(compensated_lerp, rate)
    finite = None if skipped is None else arithmetic.all_finite([new for new, _ in pairs])

    params: list[jax.Array] = []
    errors: list[jax.Array | None] = []
    for (new, old), old_error, average in zip(pairs, compensation_leaves(slow), averaged, strict=True):
        new = placement.shard_as(new, old)
        new = new if finite is None else arithmetic.zero_unless(finite, new)
        value, error = before = placement.to_device_memory((old, old_error))
        if not average:  # zeros that are computed from the error are also sharded as it is
            after = arithmetic.copy(new, value), None if error is None else error - error
        elif error is None:
            after = lerp(new, value), None
        else:
            after = tuple(compensated(new, DoubleWord(value, error)))
        if finite is not None:
            after = jax.tree.map(partial(lax.select, finite), after, before)
        value, error = placement.to_memory_of(old, after)
        params.append(value)
        errors.append(error)

    if skipped is not None and finite is not None:
        skipped = jnp.where(finite, skipped, next_count(skipped, 1))
    compensation = None if slow.compensation is None else treedef.unflatten(errors)
    return SlowCopy(treedef.unflatten(params), compensation), skipped


def _step_size_now(
    rule: Rule, step_size: jax.Array | None, n: jax.Array | None, skipped: jax.Array | None
) -> ArrayLike | None:
    """Returns the step size of this averaging: an array, a number, or what the schedule returns."""
    if not callable(rule.step_size):
        return rule.step_size if step_size is None else step_size
    n = n if skipped is None else jnp.maximum(n - skipped, 0)
    rate = rule.step_size(n)
    name = "step_size, as the schedule returned it"
    check_scalar(name, rate, "a real scalar", dtypes.Kind.INTEGER, dtypes.Kind.FLOAT)
    return jnp.asarray(rate)


def _trace_once(rule: Callable[..., Result], step_size: ArrayLike | None) -> Callable[..., Result]:
    """Returns the rule at a step size. All leaves of one shape share one trace of it."""
    return jax.jit(partial(rule, step_size=step_size))


_move = jax.jit(_move_leaves, static_argnames=("rule", "names"))
# A copy does not read the slow copy. Its memory is reused only if it stays an argument all the same.
_donating_move = jax.jit(
    _move_leaves, static_argnames=("rule", "names"), donate_argnames="slow", keep_unused=True
)


@jax.jit
def _copy_if_due(new: PyTree, old: PyTree, steps: jax.Array, update_period: jax.Array) -> PyTree:
    is_due = steps % jnp.maximum(update_period, 1) == 0
    return lax.cond(is_due, lambda: move(new, SlowCopy(old), COPY_ALL, TENSORS)[0].params, lambda: old)


@jax.jit
def _add(updates: PyTree, params: PyTree) -> PyTree:
    pairs, treedef = zip_leaves(updates, params, UPDATES)
    for index, (_, param) in enumerate(pairs):
        if dtypes.is_key(param.dtype):
            raise TypeError(f"updates{leaf_path(updates, index)}: a PRNG key takes no update")
    return treedef.unflatten([arithmetic.add(update, param) for update, param in pairs])
