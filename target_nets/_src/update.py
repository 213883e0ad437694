"""One update of a target: count it and, if an averaging is due, do it in one compiled call."""

from functools import partial

import jax
from jax import lax
from jax.core import Tracer

from target_nets._src import differences, placement, trace, trees
from target_nets._src.leaves import PyTree
from target_nets._src.slow_copy import SlowCopy
from target_nets._src.state import (
    COPY_ALL,
    Count,
    Plan,
    State,
    check_is_not_abstract,
    check_is_one_target,
    host_count,
    next_count,
)
from target_nets._src.tree_rules import apply_plan
from target_nets._src.unwrap import fits_as_it_is, unwrap

NAMES = differences.Names("online_params", "the slow copy")


def advance(state: State, online: PyTree, *, donate: bool) -> State:
    """Returns the state after one more update. With `donate` the old slow copy can no longer be read."""
    check_is_one_target(state, "update")
    if isinstance(state.step_size, jax.ShapeDtypeStruct):
        raise TypeError(
            "update: the step size is abstract, since checkpoints do not hold it; restore into a target "
            "that has a step size"
        )
    is_traced = isinstance(state.step, Tracer)
    return (_advance_traced if is_traced else _advance_counted)(state, online, donate)


def _advance_traced(state: State, online: PyTree, donate: bool) -> State:
    """An update of a traced step: the device decides whether an averaging is due."""
    period, plan = state.settings.update_period, state.settings.plan
    step = next_count(state.step, period)
    arrays = _unwrap_online(online, state)
    average = partial(_apply_in_place, plan, arrays, state, step // period - 1, donate)
    if period == 1:
        slow, skipped = average()
    else:
        slow, skipped = lax.cond(step % period == 0, average, lambda: (state.slow, state.skipped))
    return state.after_update(slow, step, skipped)


def _advance_counted(state: State, online: PyTree, donate: bool) -> State:
    """An update whose step Python knows: between two averagings nothing runs on the device."""
    period, plan = state.settings.update_period, state.settings.plan
    # After jit the step is on the device. `int` waits for the device, once: the new step is on the host.
    step = next_count(int(state.step), period)
    slow, skipped = state.slow, state.skipped
    if step % period == 0:
        # It takes time to send the count to the device.
        due_before = host_count(step // period - 1) if plan.needs_count else None
        arrays = _unwrap_online(online, state)
        slow, skipped = _apply_in_place(plan, arrays, state, due_before, donate)
    elif state.treedef is None:
        trees.zip_leaves(_unwrap_online(online, state), slow.values(), NAMES)
    return state.after_update(slow, host_count(step), skipped)


def sync(state: State, online: PyTree, *, donate: bool) -> State:
    """Returns the state after a copy of all leaves, including nonfinite ones. The counters stay."""
    check_is_not_abstract(state, "sync")
    copied = state._replace(skipped=None, step_size=None)
    slow, _ = _apply_in_place(COPY_ALL, _unwrap_online(online, state), copied, None, donate)
    return state.after_update(slow, state.step, state.skipped)


def _unwrap_online(online: PyTree, state: State) -> PyTree:
    if fits_as_it_is(online, state.treedef or jax.tree.structure(state.params)):
        return online
    return trees.fit_integers(unwrap(online), state.params, NAMES)


def _apply_in_place(
    plan: Plan, online: PyTree, state: State, due_before: Count | None, donate: bool
) -> tuple[SlowCopy, Count | None]:
    """Applies a plan where the slow copy is placed, and leaves the results there."""
    shardings = None
    if eager := trace.is_eager(online, state.params):
        leaves = jax.tree.leaves(state.params)
        online, shardings = placement.match_devices(online, state.params, leaves)
        if donate:
            online = placement.copy_shared(online, leaves)
    else:
        donate = False  # the user's jit decides whose memory it reuses
    slow, skipped = apply_plan(
        plan,
        online,
        state.slow,
        NAMES,
        skipped=state.skipped,
        step_size=state.step_size,
        due_before=due_before,
        shardings=shardings,
        donate=donate,
    )
    return (slow if eager else placement.link_shardings(slow, state.slow)), skipped
