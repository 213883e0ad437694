"""Random sequences of uses, compared with a model of the contract in float64 NumPy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from helpers.targets import (
    COPIES,
    INT32_MAX,
    UPDATES,
    jitted_sync,
    jitted_update,
    scan_updates,
    sync,
    update,
)
from helpers.trees import MIXED, MIXED_MASK, mixed, stack
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

Values = dict[str, Any]  # the values of each leaf in float64


@attrs.define
class Model:
    """What the contract says of a target."""

    slow: Values
    step_size: Callable[[int], float]
    period: int
    averaged: tuple[str, ...]  # the other leaves are copied
    skipping: bool = False
    step: int = 0
    skipped: int = 0

    def update(self, online: Values) -> None:
        last = INT32_MAX // self.period * self.period
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


NAMES = ("w", "h", "copied", "n", "on", "key")
FIRST = {name: MIXED[name] for name in NAMES}
SHAPES = {name: (x.shape, x.dtype) for name, x in FIRST.items()}
MASK = {name: MIXED_MASK[name] for name in NAMES}


def params(seed: int, bad: bool = False) -> Any:
    """Returns online parameters, with a nan if they are to be bad."""
    online = mixed(seed)
    if bad:
        online["w"] = online["w"].at[0, 0].set(jnp.nan)
    return {name: online[name] for name in NAMES}


def values(tree: Any) -> Values:
    numbers = {**tree, "key": jax.random.key_data(tree["key"])}
    return {name: np.asarray(x, np.float64) for name, x in numbers.items()}


def ema(step_size: Any, function: Callable[[int], float], period: int = 1, **settings: Any) -> Any:
    averaged = ("w", "h") if "mask" in settings else ("w", "h", "copied")
    skipping = settings.get("skip_nonfinite", False)
    return (
        lambda: EMATarget(FIRST, step_size, update_period=period, **settings),
        lambda: Model(values(FIRST), function, period, averaged, skipping),
    )


def periodic(period: int, **settings: Any) -> Any:
    return (
        lambda: PeriodicTarget(FIRST, period, **settings),
        lambda: Model(values(FIRST), lambda n: 1.0, period, ()),
    )


CASES = {
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


ALL_UPDATES = UPDATES | {"jit, donated": jax.jit(update, donate_argnums=0)}
SYNCS: dict[str, Callable[[Any, Any], Any]] = {"eager": sync, "jit": jitted_sync}
update_population = jax.jit(jax.vmap(update, in_axes=(None, 0)))
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
CONSTANT = params(1)
seeds = st.integers(0, 31)
batches = st.lists(st.builds(params, seeds, st.booleans()), min_size=3, max_size=3)


@attrs.define(eq=False)
class Pair:
    """A target and its model."""

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
        expected = self.model.distance(values(CONSTANT))
        np.testing.assert_allclose(self.target.distance(CONSTANT), expected, rtol=1e-3, atol=1e-5)


class Uses(RuleBasedStateMachine):
    """Uses one target and copies of it, each with a model."""

    kind = "ema"
    pairs = Bundle("pairs")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Pair] = []

    def add(self, target: Any, model: Model) -> Pair:
        self.all.append(Pair(target, model))
        return self.all[-1]

    @initialize(target=pairs)
    def make(self) -> Pair:
        target, model = CASES[self.kind]
        return self.add(target(), model())

    @rule(
        it=pairs, batch=batches, how=st.sampled_from([*ALL_UPDATES]), via=st.sampled_from([*ROUND_TRIPS])
    )
    def update(self, it: Pair, batch: list[Any], how: str, via: str) -> None:
        it.target = ROUND_TRIPS[via](it.target)
        for online in batch:
            it.model.update(values(online))
            it.target = ALL_UPDATES[how](it.target, online)
            for x in jax.tree.leaves(online):  # as a train step that donates them does
                x.delete()

    @rule(it=pairs, seed=seeds, how=st.sampled_from([*SYNCS]))
    def sync(self, it: Pair, seed: int, how: str) -> None:
        online = params(seed)
        it.model.sync(values(online))
        it.target = SYNCS[how](it.target, online)
        for x in jax.tree.leaves(online):
            x.delete()

    @rule(it=pairs, batch=batches)
    def scan(self, it: Pair, batch: list[Any]) -> None:
        for online in batch:
            it.model.update(values(online))
        it.target = scan_updates(it.target, stack(batch))

    @rule(it=pairs, batch=batches, member=st.integers(0, 2))
    def population(self, it: Pair, batch: list[Any], member: int) -> None:
        it.model.update(values(batch[member]))
        it.target = jax.tree.map(lambda x: x[member], update_population(it.target, stack(batch)))

    @rule(target=pairs, it=pairs, how=st.sampled_from([*COPIES]))
    def copy(self, it: Pair, how: str) -> Pair:
        return self.add(COPIES[how](it.target), attrs.evolve(it.model, slow=dict(it.model.slow)))

    @rule(it=pairs, left=st.integers(0, 4))
    def almost_2_31_updates(self, it: Pair, left: int) -> None:
        saved = serialization.to_state_dict(it.target)
        it.model.step = INT32_MAX - left
        it.target = serialization.from_state_dict(it.target, {**saved, "step": it.model.step})

    @rule(it=pairs, case=st.sampled_from([*MISTAKES]))
    def mistake(self, it: Pair, case: str) -> None:
        calls = [it.target.sync, it.target.distance, partial(jitted_update, it.target)]
        if it.model.period == 1:  # between periods an update checks nothing
            calls.append(it.target.update)
        for call in calls:
            with pytest.raises((ValueError, TypeError)):
                call(MISTAKES[case]())
        with pytest.raises(RuntimeError, match=r"[Pp]ass the target"):
            jax.jit(it.target.update)(params(0))

    @invariant()
    def every_target_equals_its_model(self) -> None:
        for it in self.all:
            it.check()


@pytest.mark.parametrize("kind", CASES)
def test_any_sequence_of_uses(kind: str) -> None:
    machine = type(Uses.__name__, (Uses,), {"kind": kind})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12, stateful_step_count=15, deadline=None)
    )
