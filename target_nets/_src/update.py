"""One update: count it and, where one is due, average the slow copy in one compiled call."""

from jax import lax
from jax.core import Tracer

from target_nets._src import state as states
from target_nets._src.placement import link_shardings, place_as
from target_nets._src.state import COPY_ALL, Count, Rule, Settings, SlowCopy, State
from target_nets._src.trace import is_eager
from target_nets._src.tree_rules import move
from target_nets._src.trees import Names, PyTree, zip_leaves

NAMES = Names("online_params", "the slow copy")


def advance(state: State, online: PyTree, settings: Settings, *, donate: bool) -> State:
    """Returns the state after one more update. With `donate` the old slow copy can no longer be read."""
    states.check_is_one_target(state, "update")
    period = settings.update_period
    if isinstance(state.step, Tracer):
        return _advance_traced(state, online, settings.rule, period)
    # A step that has been through jit is on the device. Reading it waits for the device, once.
    step = states.next_count(int(state.step), period)
    slow, skipped = state.slow, state.skipped
    if step % period == 0:
        # Only schedules need n, and in eager Python each transfer to the device takes time.
        n = states.host_count(step // period - 1) if callable(settings.rule.step_size) else None
        slow, skipped = _move(state, online, settings.rule, n, skipped, donate)
    elif not state.is_checked:
        zip_leaves(online, state.params, NAMES)
    return State(slow.params, states.host_count(step), skipped, slow.compensation, state.step_size, True)


def _advance_traced(state: State, online: PyTree, rule: Rule, period: int) -> State:
    """Does the same where a transformation traces the step."""
    step = states.next_count(state.step, period)

    def average() -> tuple[SlowCopy, Count | None]:
        n = step // period - 1
        return _move(state, online, rule, n, state.skipped, donate=False)

    if period == 1:
        slow, skipped = average()
    else:
        slow, skipped = lax.cond(step % period == 0, average, lambda: (state.slow, state.skipped))
    return State(slow.params, step, skipped, slow.compensation, state.step_size, True)


def sync(state: State, online: PyTree, *, donate: bool) -> State:
    """Returns the state after a copy of all leaves. The counters stay as they are."""
    states.check_is_not_abstract(state, "sync")
    slow, _ = _move(state, online, COPY_ALL, None, None, donate)
    return state._replace(**slow._asdict(), is_checked=True)


def _move(
    state: State, online: PyTree, rule: Rule, n: Count | None, skipped: Count | None, donate: bool
) -> tuple[SlowCopy, Count | None]:
    """Applies the rule where the slow copy is, and leaves the results there."""
    eager, slow = is_eager(), state.slow
    online = place_as(online, slow.params) if eager else online
    donate = donate and eager
    after, skipped = move(
        online, slow, rule, NAMES, skipped=skipped, step_size=state.step_size, n=n, donate=donate
    )
    return (after if eager else link_shardings(after, slow)), skipped
