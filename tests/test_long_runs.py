"""A million updates and more: flat memory, nothing compiled again, and counters past 2**31-1."""

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

from target_nets import EMATarget, PeriodicTarget, schedules, targets

LAST = 2**31 - 1
START, ONLINE = {"w": jnp.zeros(64)}, {"w": jnp.ones(64)}
MAKERS: dict[str, Callable[[], Any]] = {
    "ema": lambda: EMATarget(START, 1e-4),
    "ema, schedule": lambda: EMATarget(START, schedules.uniform(), update_period=2),
    "ema, everything": lambda: EMATarget(
        START, jnp.float32(1e-4), compensated=True, skip_nonfinite=True, donate=True
    ),
    "periodic": lambda: PeriodicTarget(START, 3),
}


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def compiled() -> int:
    """How many programs the package's own compiled functions hold."""
    return sum(function._cache_size() for function in targets._MOVE.values())


@contextmanager
def flat() -> Iterator[None]:
    """Nothing new is held afterwards: no memory to speak of, no array, no program."""
    gc.collect()
    programs, arrays = compiled(), len(jax.live_arrays())
    memory = resident() if Path("/proc/self/status").exists() else None
    yield
    gc.collect()
    assert compiled() == programs
    assert len(jax.live_arrays()) <= arrays
    if memory is not None:
        assert resident() - memory < 4e6


@pytest.mark.parametrize("kind", ["ema, schedule", "periodic"])
def test_100_000_eager_updates(kind: str) -> None:
    target = MAKERS[kind]()
    for _ in range(300):
        target.update(ONLINE)
    with flat():
        for _ in range(100_000):
            target.update(ONLINE)
    assert target.step == 100_300


@jax.jit
def thousand(target: Any, online: Any) -> Any:
    return jax.lax.fori_loop(0, 1000, lambda _, target: target.update(online), target)


@jax.jit
def once(target: Any, online: Any) -> Any:
    return target.update(online)


@pytest.mark.parametrize("kind", ["ema", "ema, everything", "periodic"])
def test_a_million_jitted_updates(kind: str) -> None:
    target = jax.jit(lambda target: target)(MAKERS[kind]())
    target = once(thousand(target, ONLINE), ONLINE)
    programs = thousand._cache_size(), once._cache_size()
    with flat():
        for _ in range(990):
            target = thousand(target, ONLINE)
        for _ in range(10_000):
            target = once(target, ONLINE)
    assert (thousand._cache_size(), once._cache_size()) == programs
    assert target.step == 1_001_001


def near_the_end(target: Any, before: int) -> Any:
    """The same target after almost 2**31 updates, as a checkpoint would have it."""
    saved = serialization.to_state_dict(target)
    skipped = {"skipped": 5} if "skipped" in saved else {}
    return serialization.from_state_dict(target, {**saved, "step": LAST - before, **skipped})


def eager(target: Any, onlines: list[Any]) -> Any:
    for online in onlines:
        target.update(online)
    return target


def jitted(target: Any, onlines: list[Any]) -> Any:
    for online in onlines:
        target = once(target, online)
    return target


def scanned(target: Any, onlines: list[Any]) -> Any:
    batch = jax.tree.map(lambda *xs: jnp.stack(xs), *onlines)
    return jax.lax.scan(lambda t, p: (t.update(p), None), target, batch)[0]


HOW = {"eager": eager, "jit": jitted, "scan": scanned}


def quarters(n: jax.Array) -> jax.Array:
    return (n % 4 + 1) / 8


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("period", [1, 3, 1000])
@pytest.mark.parametrize("cls", [EMATarget, PeriodicTarget])
def test_counters_past_the_largest_integer(cls: Any, period: int, how: str) -> None:
    """Against counters without an end, of which those of a target keep period and last value."""
    last = LAST // period * period
    if cls is EMATarget:
        target = cls(START, quarters, update_period=period, skip_nonfinite=True)
    else:
        target = cls(START, period)
    before = LAST - last + 4
    target = near_the_end(target, before)
    slow, skipped = 0.0, int(getattr(target, "skipped", 0))
    onlines = [float("nan") if cls is EMATarget and k in (2, 9) else 1.0 + k for k in range(12)]
    for k, online in enumerate(onlines, LAST - before + 1):
        if k % period == 0 or (k > last and (k - last) % period == 0):
            n = min(k, last) // period - 1 - skipped
            size = (n % 4 + 1) / 8 if cls is EMATarget else 1.0
            skipped += np.isnan(online)
            slow += 0.0 if np.isnan(online) else size * (online - slow)
    target = HOW[how](target, [{"w": jnp.full(64, online)} for online in onlines])
    np.testing.assert_allclose(target.params["w"], slow, rtol=1e-6)
    assert getattr(target, "skipped", 0) == skipped
    past = LAST - before + len(onlines) - last
    assert target.step == last + past - period * -(-past // period)
    assert target.step.dtype == jnp.int32
