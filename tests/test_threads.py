"""While one thread updates a target, other threads read it: each reading is of one update."""

import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from helpers.comparisons import bits
from helpers.faults import run_with_action_at
from helpers.targets import COPIES, MAKERS, make_makers
from helpers.trees import mixed

from target_nets import EMATarget

ACTORS = 4
FIRST, *ONLINES = ({name: mixed(seed)[name] for name in ("w", "h", "n")} for seed in range(98))
TARGETS: dict[str, Callable[[Any], Any]] = {
    **{kind: MAKERS[kind] for kind in ("ema", "ema, schedule", "ema, everything")},
    "periodic": make_makers(period=3)["periodic"],
}


def step_and_params(target: Any) -> tuple[int, tuple[bytes, ...]]:
    """Reads step and parameters of a target that no other thread changes."""
    return int(target.step), bits(target.params)


def learn(target: Any, updates: int) -> Iterator[Any]:
    for k in range(updates):
        yield target.update(ONLINES[k % len(ONLINES)])


@pytest.fixture(name="switching", autouse=True)
def _switching() -> Iterator[None]:
    """Makes threads take turns as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def read_while_learning(target: Any, updates: int, read: Callable[[Any], Any]) -> list[Any]:
    """Returns what each actor reads while the learner updates, and after the last update."""
    learning = True

    def act() -> list[Any]:
        reads = []
        while learning:
            reads.append(read(target))
        return [*reads, read(target)]

    with ThreadPoolExecutor(ACTORS) as actors:
        futures = [actors.submit(act) for _ in range(ACTORS)]
        try:
            for _ in learn(target, updates):
                pass
        finally:
            learning = False
        return [future.result() for future in futures]


@pytest.mark.parametrize("kind", TARGETS)
def test_every_read_is_a_complete_slow_copy(kind: str) -> None:
    updates = 5_000 if kind in ("ema", "periodic") else 1_000
    alone = TARGETS[kind](FIRST)
    known = {bits(alone.params)} | {bits(t.params) for t in learn(alone, updates)}
    for reads in read_while_learning(TARGETS[kind](FIRST), updates, lambda target: bits(target.params)):
        assert set(reads) <= known
        assert len(set(reads)) > 1  # the target changed meanwhile
        assert reads[-1] == bits(alone.params)


COPIES_IN_MEMORY: dict[str, Callable[[Any], Any]] = {
    **{how: COPIES[how] for how in ("copy", "deepcopy", "pickle")},
    "pytree": lambda target: jax.tree.map(lambda x: x, target),
    "pytree with keys": lambda target: jax.tree_util.tree_map_with_path(lambda _, x: x, target),
}
ALL_COPIES = COPIES_IN_MEMORY | COPIES


@pytest.mark.parametrize("how", ALL_COPIES)
def test_every_copy_is_of_one_update(how: str) -> None:
    make, updates = MAKERS["ema, everything"], 500
    alone = make(FIRST)
    known = [step_and_params(alone), *(step_and_params(target) for target in learn(alone, updates))]
    copies = read_while_learning(make(FIRST), updates, lambda t: step_and_params(ALL_COPIES[how](t)))
    for reads in copies:
        assert all(read == known[read[0]] for read in reads)
        assert [step for step, _ in reads] == sorted(step for step, _ in reads)
        assert reads[-1] == known[-1]


READS: dict[str, Callable[[Any], Any]] = {
    "params": lambda target: bits(target.params),
    "distance": lambda target: float(target.distance(FIRST)),
    "state dict": lambda target: jax.tree.map(np.asarray, serialization.to_state_dict(target)),
    "repr": repr,
    **{
        how: lambda target, how=how: step_and_params(COPIES_IN_MEMORY[how](target))
        for how in COPIES_IN_MEMORY
    },
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [*(("ema, everything", how) for how in READS), ("periodic", "params"), ("periodic", "copy")],
)
def test_an_update_between_any_two_instructions_of_a_read(kind: str, how: str) -> None:
    """Interrupts a reading at every moment, as another thread does by chance."""

    def read(target: Any) -> str:
        return repr(READS[how](target))

    def make_target() -> Any:
        target = TARGETS[kind](FIRST)
        return target.update(ONLINES[0]).update(ONLINES[1])

    before, after = read(make_target()), read(make_target().update(ONLINES[2]))
    got = []
    for moment in itertools.count():
        target = make_target()
        result, updated = run_with_action_at(
            partial(read, target), partial(target.update, ONLINES[2]), moment, "opcode"
        )
        if not updated:
            break
        assert result in (before, after)
        got.append(result)
    assert set(got) == {before, after}


@pytest.mark.parametrize("kind", ["ema", "ema, donate", "periodic"])
def test_threads_that_update_take_turns(kind: str) -> None:
    target, online = MAKERS[kind](FIRST), ONLINES[0]

    def act(_: int) -> None:
        for _ in range(500):
            target.update(online)

    with ThreadPoolExecutor(ACTORS) as actors:
        list(actors.map(act, range(ACTORS)))
    expected = MAKERS[kind](FIRST)
    for _ in range(500 * ACTORS):
        expected.update(online)
    assert target.step == 500 * ACTORS
    assert bits(target) == bits(expected)


def test_a_step_size_that_another_thread_assigns_is_kept() -> None:
    target, learning = EMATarget(FIRST, jnp.float32(0.5)), True

    def learn_on() -> None:
        while learning:
            target.update(ONLINES[0])

    with ThreadPoolExecutor(1) as learner:
        future = learner.submit(learn_on)
        try:
            for n in range(200):
                target.step_size = jnp.float32(n / 200)
                assert target.step_size == np.float32(n / 200)
        finally:
            learning = False
        future.result()
