"""Any sequence of uses, against a model of the contract in plain float64 NumPy."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from target_nets import EMATarget, PeriodicTarget, schedules

LAST = 2**31 - 1
Values = dict[str, Any]  # of each leaf, in float64 where it is averaged


@attrs.define
class Model:
    """What a target is to be, by the contract alone."""

    slow: Values
    step_size: Callable[[int], float]
    period: int
    averaged: tuple[str, ...]  # the leaves that are; the others are copied
    skipping: bool = False
    step: int = 0
    skipped: int = 0

    def update(self, online: Values) -> None:
        last = LAST // self.period * self.period
        self.step += 1 - (self.period if self.step >= last else 0)
        if self.step % self.period:
            return
        if self.skipping and not all(np.isfinite(x).all() for x in online.values()):
            self.skipped += 1
            return
        n = max(self.step // self.period - 1 - self.skipped, 0)
        size = min(max(self.step_size(n), 0), 1)
        for name, x in online.items():
            old = self.slow[name]
            if name not in self.averaged or size == 1:
                self.slow[name] = x
            elif size > 0:
                self.slow[name] = old + size * (x - old)

    def sync(self, online: Values) -> None:
        self.slow = dict(online)

    def distance(self, online: Values) -> float:
        return float(np.sqrt(sum(np.sum((online[k] - self.slow[k]) ** 2) for k in ("w", "h", "copied"))))


START = {
    "w": jnp.zeros((2, 2)),
    "h": jnp.zeros(3, jnp.bfloat16),
    "copied": jnp.zeros(()),
    "n": jnp.int32(0),
    "on": jnp.bool_(False),
    "key": jax.random.key(0),
}
SHAPES = {name: (x.shape, x.dtype) for name, x in START.items()}
MASK = {name: name != "copied" for name in START}


def params(seed: int, bad: bool = False) -> Any:
    """Online parameters."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(2, 2))
    w[0, 0] = np.nan if bad else w[0, 0]
    return {
        "w": jnp.asarray(w, jnp.float32),
        "h": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
        "copied": jnp.float32(rng.normal()),
        "n": jnp.int32(seed),
        "on": jnp.bool_(seed % 2),
        "key": jax.random.key(seed),
    }


def values(tree: Any) -> Values:
    held = {**tree, "key": jax.random.key_data(tree["key"])}
    return {name: np.asarray(x, np.float64) for name, x in held.items()}


def ema(step_size: Any, function: Callable[[int], float], period: int = 1, **settings: Any) -> Any:
    averaged = ("w", "h") if "mask" in settings else ("w", "h", "copied")
    skipping = settings.get("skip_nonfinite", False)
    return (
        lambda: EMATarget(START, step_size, update_period=period, **settings),
        lambda: Model(values(START), function, period, averaged, skipping),
    )


def periodic(period: int, **settings: Any) -> Any:
    return (
        lambda: PeriodicTarget(START, period, **settings),
        lambda: Model(values(START), lambda n: 1.0, period, ()),
    )


KINDS = {
    "ema": ema(0.3, lambda n: 0.3),
    "ema, schedule": ema(schedules.uniform(), lambda n: 1 / (n + 1), period=2, donate=True),
    "ema, out of range": ema(jnp.float32(1.5), lambda n: 1.5, mask=MASK),
    "ema, everything": ema(
        schedules.ramp(0.1),
        lambda n: max(0.1, 9 / (10 + n)),
        mask=MASK,
        compensated=True,
        skip_nonfinite=True,
    ),
    "periodic": periodic(1),
    "periodic, donate": periodic(3, donate=True),
}


def update(target: Any, online: Any) -> Any:
    return target.update(online)


def scanned(target: Any, onlines: Any) -> Any:
    return jax.lax.scan(lambda t, p: (t.update(p), None), target, onlines)[0]


UPDATES: dict[str, Callable[[Any, Any], Any]] = {
    "eager": update,
    "jit": jax.jit(update),
    "jit, donated": jax.jit(update, donate_argnums=0),
}
SYNCS: dict[str, Callable[[Any, Any], Any]] = {
    "eager": lambda target, online: target.sync(online),
    "jit": jax.jit(lambda target, online: target.sync(online)),
}
SCAN = jax.jit(scanned)
POPULATION = jax.jit(jax.vmap(update, in_axes=(None, 0)))
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda target: pickle.loads(pickle.dumps(target)),
    "bytes": lambda target: serialization.from_bytes(target, serialization.to_bytes(target)),
}
ROUND_TRIPS: dict[str, Callable[[Any], Any]] = {
    "none": lambda target: target,
    "jit": jax.jit(lambda target: target),
    "pytree": lambda target: jax.tree.map(lambda x: x, target),
    "leaves": lambda target: jax.tree.structure(target).unflatten(jax.tree.leaves(target)),
}
MISTAKES: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "empty": dict,
    "more": lambda: {**params(0), "more": 1.0},
    "shape": lambda: {**params(0), "w": jnp.zeros((2, 1))},
    "kind": lambda: {**params(0), "n": 0.5},
    "string": lambda: {**params(0), "h": "x"},
    "key": lambda: {**params(0), "key": jax.random.key(0, impl="rbg")},
}
ONLINE = params(1)
seeds = st.integers(0, 31)
batches = st.lists(st.builds(params, seeds, st.booleans()), min_size=3, max_size=3)


def stacked(onlines: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *onlines)


@attrs.define(eq=False)
class Held:
    """A target and what it is to be."""

    target: Any
    model: Model

    def check(self) -> None:
        assert self.target.step == self.model.step
        assert getattr(self.target, "skipped", 0) == self.model.skipped
        got = self.target.params
        assert {k: (x.shape, x.dtype) for k, x in got.items()} == SHAPES
        for name, x in values(got).items():
            exact = name in ("n", "on", "key")
            tolerance = {
                "rtol": 0 if exact else 2**-8 if name == "h" else 1e-5,
                "atol": 0 if exact else 1e-6,
            }
            np.testing.assert_allclose(x, self.model.slow[name], **tolerance)
        expected = self.model.distance(values(ONLINE))
        np.testing.assert_allclose(self.target.distance(ONLINE), expected, rtol=1e-3, atol=1e-5)


class Uses(RuleBasedStateMachine):
    """One target at first, then copies of it, each with its own model."""

    kind = "ema"
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Held] = []

    def hold(self, target: Any, model: Model) -> Held:
        self.all.append(Held(target, model))
        return self.all[-1]

    @initialize(target=held)
    def begin(self) -> Held:
        target, model = KINDS[self.kind]
        return self.hold(target(), model())

    @rule(it=held, batch=batches, how=st.sampled_from([*UPDATES]), via=st.sampled_from([*ROUND_TRIPS]))
    def update(self, it: Held, batch: list[Any], how: str, via: str) -> None:
        it.target = ROUND_TRIPS[via](it.target)
        for online in batch:
            it.model.update(values(online))
            it.target = UPDATES[how](it.target, online)
            for x in jax.tree.leaves(online):  # as a train step that reuses their memory does
                x.delete()

    @rule(it=held, seed=seeds, how=st.sampled_from([*SYNCS]))
    def sync(self, it: Held, seed: int, how: str) -> None:
        online = params(seed)
        it.model.sync(values(online))
        it.target = SYNCS[how](it.target, online)
        for x in jax.tree.leaves(online):
            x.delete()

    @rule(it=held, batch=batches)
    def scan(self, it: Held, batch: list[Any]) -> None:
        for online in batch:
            it.model.update(values(online))
        it.target = SCAN(it.target, stacked(batch))

    @rule(it=held, batch=batches, member=st.integers(0, 2))
    def population(self, it: Held, batch: list[Any], member: int) -> None:
        it.model.update(values(batch[member]))
        it.target = jax.tree.map(lambda x: x[member], POPULATION(it.target, stacked(batch)))

    @rule(target=held, it=held, how=st.sampled_from([*COPIES]))
    def copy(self, it: Held, how: str) -> Held:
        return self.hold(COPIES[how](it.target), attrs.evolve(it.model, slow=dict(it.model.slow)))

    @rule(it=held, left=st.integers(0, 4))
    def almost_2_31_updates(self, it: Held, left: int) -> None:
        saved = serialization.to_state_dict(it.target)
        it.model.step = LAST - left
        it.target = serialization.from_state_dict(it.target, {**saved, "step": it.model.step})

    @rule(it=held, case=st.sampled_from([*MISTAKES]))
    def mistake(self, it: Held, case: str) -> None:
        calls = [it.target.sync, it.target.distance, partial(UPDATES["jit"], it.target)]
        if it.model.period == 1:  # else between its periods nothing is looked at
            calls.append(it.target.update)
        for call in calls:
            with pytest.raises((ValueError, TypeError)):
                call(MISTAKES[case]())
        with pytest.raises(RuntimeError, match="Pass the target"):
            jax.jit(it.target.update)(params(0))

    @invariant()
    def as_the_model_says(self) -> None:
        for it in self.all:
            it.check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_uses(kind: str) -> None:
    machine = type(Uses.__name__, (Uses,), {"kind": kind})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=20, stateful_step_count=15, deadline=None)
    )
