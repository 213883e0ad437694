"""Long runs: memory stays flat, nothing is compiled again, and counters pass 2**31-1 unharmed."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from helpers.processes import process_memory
from helpers.targets import INT32_MAX, MAKERS, RUNS, jitted_update
from helpers.trees import ONLINE, START

from target_nets import EMATarget, PeriodicTarget


@contextmanager
def assert_nothing_grows(trace_counter: Callable[[], Any]) -> Iterator[None]:
    """Asserts that a block compiles nothing and leaves no memory, array or program behind."""
    on_linux = Path("/proc/self/status").exists()
    gc.collect()
    arrays_before = len(jax.live_arrays())
    memory_before = process_memory("VmRSS") if on_linux else 0
    with trace_counter() as compiled:
        yield
    gc.collect()
    assert not compiled
    assert len(jax.live_arrays()) <= arrays_before
    if on_linux:
        assert process_memory("VmRSS") - memory_before < 3e6


@pytest.mark.parametrize("kind", ["ema, schedule", "periodic"])
def test_50_000_eager_updates(kind: str, trace_counter: Any) -> None:
    target = MAKERS[kind](START)
    for _ in range(300):
        target.update(ONLINE)
    with assert_nothing_grows(trace_counter):
        for _ in range(50_000):
            target.update(ONLINE)
    assert target.step == 50_300


@jax.jit
def update_1000_times(target: Any, online: Any) -> Any:
    return jax.lax.fori_loop(0, 1000, lambda _, target: target.update(online), target)


@pytest.mark.parametrize("kind", ["ema", "ema, everything", "periodic"])
def test_a_million_jitted_updates(kind: str, trace_counter: Any) -> None:
    target = jax.jit(lambda target: target)(MAKERS[kind](START))
    target = jitted_update(update_1000_times(target, ONLINE), ONLINE)
    with assert_nothing_grows(trace_counter):
        for _ in range(990):
            target = update_1000_times(target, ONLINE)
        for _ in range(10_000):
            target = jitted_update(target, ONLINE)
    assert target.step == 1_001_001


def restore_at_step(target: Any, step: int) -> Any:
    """Returns the same target after so many updates, restored from a checkpoint."""
    saved = serialization.to_state_dict(target)
    skipped = {"skipped": 5} if "skipped" in saved else {}
    return serialization.from_state_dict(target, {**saved, "step": step, **skipped})


def quarters(n: jax.Array) -> jax.Array:
    """A schedule of period 4, which shows a wrong argument."""
    return (n % 4 + 1) / 8


@pytest.mark.parametrize(
    ("how", "period"),
    [("eager", 1), ("eager", 3), ("eager", 1000), ("jit", 1), ("jit", 3), ("scan", 1), ("scan", 1000)],
)
@pytest.mark.parametrize("cls", [EMATarget, PeriodicTarget])
def test_counters_past_the_largest_integer(cls: Any, period: int, how: str) -> None:
    """Compares the target with counters that have no end.

    The counter of the target keeps the period, and its schedule holds its last value.
    """
    last = INT32_MAX // period * period
    first_step = last - 4
    if cls is EMATarget:
        target = cls(START, quarters, update_period=period, skip_nonfinite=True)
    else:
        target = cls(START, period)
    target = restore_at_step(target, first_step)
    slow, skipped = 0.0, int(getattr(target, "skipped", 0))
    values = [float("nan") if cls is EMATarget and k in (2, 9) else 1.0 + k for k in range(12)]
    for k, value in enumerate(values, first_step + 1):
        if k % period == 0 or (k > last and (k - last) % period == 0):
            n = min(k, last) // period - 1 - skipped
            size = (n % 4 + 1) / 8 if cls is EMATarget else 1.0
            skipped += np.isnan(value)
            slow += 0.0 if np.isnan(value) else size * (value - slow)
    target = RUNS[how](target, [{"w": jnp.full(3, value)} for value in values])
    np.testing.assert_allclose(target.params["w"], slow, rtol=1e-6)
    assert getattr(target, "skipped", 0) == skipped
    past = first_step + len(values) - last
    assert target.step == last + past - period * -(-past // period)
    assert target.step.dtype == jnp.int32
