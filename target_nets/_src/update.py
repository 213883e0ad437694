"""One update: count it and, where one is due, average the slow copy in one compiled call."""

import jax
from jax.core import Tracer

from target_nets._src import placement, trace, tree_rules, trees
from target_nets._src.state import (
    COPY_ALL,
    Count,
    Rule,
    Settings,
    State,
    check_is_not_abstract,
    check_is_one_target,
    host_count,
    next_count,
)
from target_nets._src.trees import PyTree

NAMES = trees.Names("online_params", "the slow copy")


def advance(state: State, online: PyTree, settings: Settings, *, donate: bool) -> State:
    """Returns the state after one more update. With `donate` the old slow copy can no longer be read."""
    check_is_one_target(state, "update")
    if isinstance(state.step_size, jax.ShapeDtypeStruct):
        raise TypeError(
            "update: the step size is abstract and was not saved; restore into a target with it"
        )
    rule, period = settings.rule, settings.update_period
    if isinstance(state.step, Tracer):
        step = next_count(state.step, period)
        due = (step, period) if period > 1 else (None, None)
        state = _move(state, online, rule, n=step // period - 1, steps=due[0], period=due[1])
        return state._replace(step=step, is_checked=True)
    # A step that has been through jit is on the device. Reading it in Python waits for it, once.
    step = next_count(int(state.step), period)
    if step % period == 0:
        state = _move(state, online, rule, n=host_count(step // period - 1), donate=donate)
    elif not state.is_checked:
        trees.zip_leaves(online, state.params, NAMES)
    return state._replace(step=host_count(step), is_checked=True)


def sync(state: State, online: PyTree, *, donate: bool) -> State:
    """Returns the state after a copy of all leaves. The counters stay as they are."""
    check_is_not_abstract(state, "sync")
    after = _move(state._replace(skipped=None), online, COPY_ALL, donate=donate)
    return after._replace(skipped=state.skipped, is_checked=True)


def _move(
    state: State,
    online: PyTree,
    rule: Rule,
    *,
    n: Count | None = None,
    steps: jax.Array | None = None,
    period: int | None = None,
    donate: bool = False,
) -> State:
    """Applies the rule where the slow copy is, and leaves the results there."""
    slow, skipped = tree_rules.move(
        placement.place_as(online, state.params),
        state.slow,
        rule,
        NAMES,
        steps=steps,
        period=period,
        skipped=state.skipped,
        step_size=state.step_size,
        n=n if callable(rule.step_size) else None,  # in eager Python it is sent to the device
        donate=donate and trace.is_eager(),
    )
    slow = placement.link_shardings(slow, state.slow)
    return state._replace(params=slow.params, compensation=slow.compensation, skipped=skipped)
