"""One update: count it and, where one is due, average the slow copy in one compiled call."""

import jax
from jax.core import Tracer

from target_nets._src import placement, records, trace, tree_rules, trees
from target_nets._src.counts import host_count, next_count
from target_nets._src.records import Count, Rule, Settings, State
from target_nets._src.trees import PyTree

NAMES = trees.Names("online_params", "the slow copy")


def advance(state: State, online: PyTree, settings: Settings, *, donate: bool) -> State:
    """Returns the state after one more update. With `donate` the old slow copy can no longer be read."""
    records.check_is_one_target(state, "update")
    is_traced, period = isinstance(state.step, Tracer), settings.update_period
    # A step that has been through jit is on the device. Reading it in Python waits for it, once.
    step = next_count(state.step if is_traced else int(state.step), period)
    is_due = step % period == 0
    if is_traced:
        is_due = is_due if period > 1 else None
        after = _move(state, online, settings.rule, step // period - 1, is_due, donate)
        return after._replace(step=step, is_checked=True)
    if is_due:
        state = _move(state, online, settings.rule, host_count(step // period - 1), None, donate)
    elif not state.is_checked:
        trees.zip_leaves(online, state.params, NAMES)
    return state._replace(step=host_count(step), is_checked=True)


def sync(state: State, online: PyTree, *, donate: bool) -> State:
    """Returns the state after a copy of all leaves. The counters stay as they are."""
    records.check_is_not_abstract(state, "sync")
    after = _move(state._replace(skipped=None), online, records.COPY_ALL, None, None, donate)
    return after._replace(skipped=state.skipped, is_checked=True)


def _move(
    state: State, online: PyTree, rule: Rule, n: Count | None, is_due: jax.Array | None, donate: bool
) -> State:
    """Applies the rule where the slow copy is, and leaves the results there."""
    slow, skipped = tree_rules.move(
        placement.place_as(online, state.params),
        state.slow,
        rule,
        NAMES,
        is_due=is_due,
        skipped=state.skipped,
        step_size=state.step_size,
        n=n if callable(rule.step_size) else None,  # in eager Python, a transfer to the device
        donate=donate and trace.is_eager(),
    )
    slow = placement.link_shardings(slow, state.slow)
    return state._replace(params=slow.params, compensation=slow.compensation, skipped=skipped)
