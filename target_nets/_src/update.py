"""One update: count it and, where one is due, average the slow copy in one compiled call."""

from functools import partial

import jax
from jax import lax
from jax.core import Tracer

from target_nets._src import placement, trace, trees
from target_nets._src import state as states
from target_nets._src.state import COPY_ALL, Count, Rule, Settings, SlowCopy, State
from target_nets._src.tree_rules import move
from target_nets._src.trees import PyTree

NAMES = trees.Names("online_params", "the slow copy")


def advance(state: State, online: PyTree, settings: Settings, *, donate: bool) -> State:
    """Returns the state after one more update. With `donate` the old slow copy can no longer be read."""
    states.check_is_one_target(state, "update")
    if isinstance(state.step_size, jax.ShapeDtypeStruct):
        raise TypeError(
            "update: the step size is abstract and was not saved; restore into a target with it"
        )
    rule, period, slow, skipped = settings.rule, settings.update_period, state.slow, state.skipped
    if isinstance(state.step, Tracer):
        step = states.next_count(state.step, period)
        average = partial(_move, state, online, rule, step // period - 1, donate)
        if period == 1:
            slow, skipped = average()
        else:
            slow, skipped = lax.cond(step % period == 0, average, lambda: (slow, skipped))
        return state.after(slow, step, skipped)
    # A step that has been through jit is on the device. Reading it in Python waits for it, once.
    step = states.next_count(int(state.step), period)
    if step % period == 0:
        # Only schedules need n. In eager Python it is a transfer to the device.
        n = states.host_count(step // period - 1) if callable(rule.step_size) else None
        slow, skipped = _move(state, online, rule, n, donate)
    elif not state.is_checked:
        trees.zip_leaves(online, slow.params, NAMES)
    return state.after(slow, states.host_count(step), skipped)


def sync(state: State, online: PyTree, *, donate: bool) -> State:
    """Returns the state after a copy of all leaves. The counters stay as they are."""
    states.check_is_not_abstract(state, "sync")
    slow, _ = _move(state._replace(skipped=None), online, COPY_ALL, None, donate)
    return state.after(slow, state.step, state.skipped)


def _move(
    state: State, online: PyTree, rule: Rule, n: Count | None, donate: bool
) -> tuple[SlowCopy, Count | None]:
    """Applies the rule where the slow copy is, and leaves the results there."""
    online, slow = placement.place_as(online, state.params), state.slow
    after, skipped = move(
        online,
        slow,
        rule,
        NAMES,
        skipped=state.skipped,
        step_size=state.step_size,
        n=n,
        donate=donate and trace.is_eager(),
    )
    return placement.link_shardings(after, slow), skipped
