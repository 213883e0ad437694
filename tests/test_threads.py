"""One thread learns while others read: whatever they read is of one and the same update."""

import copy
import itertools
import pickle
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
from helpers.comparisons import arrays
from helpers.faults import run_with_action_at

from target_nets import EMATarget, PeriodicTarget

ACTORS = 4
START = {"w": jnp.zeros(16), "h": jnp.zeros(4, jnp.bfloat16), "n": jnp.int32(0)}
ONLINES = [
    {
        "w": jax.random.normal(jax.random.key(k), 16),
        "h": jax.random.normal(jax.random.key(-k), 4, jnp.bfloat16),
        "n": jnp.int32(k),
    }
    for k in range(1, 98)
]


def half(n: jax.Array) -> jax.Array:
    return 0.5 + 0 * n


MAKERS: dict[str, Callable[[], Any]] = {
    "ema": lambda: EMATarget(START, 0.5),
    "ema, schedule": lambda: EMATarget(START, half, update_period=2),
    # What is read is the slow copy and its compensation together.
    "ema, compensated": lambda: EMATarget(
        START, jnp.float32(0.3), accumulator_dtype="bfloat16", compensated=True, skip_nonfinite=True
    ),
    "periodic": lambda: PeriodicTarget(START, 3),
}


def bits(tree: Any) -> tuple[bytes, ...]:
    return tuple(x.tobytes() for x in arrays(tree))


def whole(target: Any) -> tuple[int, tuple[bytes, ...]]:
    """Step and parameters of a target that nobody changes."""
    return int(target.step), bits(target.params)


def learn(target: Any, updates: int) -> Iterator[Any]:
    for k in range(updates):
        yield target.update(ONLINES[k % len(ONLINES)])


@pytest.fixture(name="switching", autouse=True)
def _switching() -> Iterator[None]:
    """Threads take turns as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def read_while_learning(target: Any, updates: int, read: Callable[[Any], Any]) -> list[Any]:
    """What the actors read in turn while the learner updates, and after its last update."""
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


@pytest.mark.parametrize("kind", MAKERS)
def test_every_read_is_a_complete_slow_copy(kind: str) -> None:
    updates = 10_000 if kind in ("ema", "periodic") else 1_000
    alone = MAKERS[kind]()
    known = {bits(alone.params)} | {bits(t.params) for t in learn(alone, updates)}
    for reads in read_while_learning(MAKERS[kind](), updates, lambda target: bits(target.params)):
        assert set(reads) <= known
        assert len(set(reads)) > 1  # the target did move meanwhile
        assert reads[-1] == bits(alone.params)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda target: pickle.loads(pickle.dumps(target)),
    "pytree": lambda target: jax.tree.map(lambda x: x, target),
    "pytree with keys": lambda target: jax.tree_util.tree_map_with_path(lambda _, x: x, target),
    "checkpoint": lambda target: serialization.from_state_dict(
        target, serialization.to_state_dict(target)
    ),
}


@pytest.mark.parametrize("how", COPIES)
def test_every_copy_is_of_one_and_the_same_update(how: str) -> None:
    make, updates = MAKERS["ema, compensated"], 500
    alone = make()
    known = [whole(alone), *(whole(target) for target in learn(alone, updates))]
    for reads in read_while_learning(make(), updates, lambda target: whole(COPIES[how](target))):
        assert all(read == known[read[0]] for read in reads)
        assert [step for step, _ in reads] == sorted(step for step, _ in reads)
        assert reads[-1] == known[-1]


READS: dict[str, Callable[[Any], Any]] = {
    "params": lambda target: bits(target.params),
    "distance": lambda target: float(target.distance(START)),
    "state dict": lambda target: jax.tree.map(np.asarray, serialization.to_state_dict(target)),
    "repr": repr,
    **{how: lambda target, how=how: whole(COPIES[how](target)) for how in COPIES if how != "checkpoint"},
}


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("kind", ["ema, compensated", "periodic"])
def test_an_update_between_any_two_instructions_of_a_read(kind: str, how: str) -> None:
    """What threads do by chance, moment by moment."""

    def read(target: Any) -> str:
        return repr(READS[how](target))

    def third() -> Any:
        target = MAKERS[kind]()
        return target.update(ONLINES[0]).update(ONLINES[1])

    before, after = read(third()), read(third().update(ONLINES[2]))
    got = []
    for moment in itertools.count():
        target = third()
        result, done = run_with_action_at(
            partial(read, target), partial(target.update, ONLINES[2]), moment, "opcode"
        )
        if not done:
            break
        assert result in (before, after)
        got.append(result)
    assert set(got) == {before, after}
