"""`updated` is pure: it returns a new target and leaves the old one as it was, wherever it is called."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparisons import assert_close, assert_same, bits
from helpers.targets import MAKERS, update
from helpers.trees import MIXED, ONLINE, START, TREES, make_tree, perturb, stack

from target_nets import EMATarget, PeriodicTarget


class State(NamedTuple):
    params: Any
    target: Any


def updated(target: Any, online: Any) -> Any:
    return target.updated(online)


@pytest.mark.parametrize("kind", MAKERS)
def test_it_returns_what_update_makes_and_leaves_the_old_target_alone(kind: str) -> None:
    pure, in_place = MAKERS[kind](MIXED), MAKERS[kind](MIXED)
    for online in (perturb(MIXED), perturb(MIXED, 2), perturb(MIXED, 3)):
        before, structure = bits(pure), repr(pure)
        new = pure.updated(online)
        assert new is not pure
        assert type(new) is type(pure)
        assert (bits(pure), repr(pure)) == (before, structure)
        assert_same(new, in_place.update(online))
        pure = new


@pytest.mark.parametrize("name", TREES)
def test_any_tree(name: str) -> None:
    target, online = EMATarget(make_tree(name), 0.5), perturb(make_tree(name))
    before = bits(target)
    new = target.updated(online)
    assert bits(target) == before
    assert_same(new.params, target.update(online).params)


@pytest.mark.parametrize("change", ["update", "sync"])
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "donate" in kind])
@pytest.mark.parametrize("first", ["old", "new"])
def test_a_donating_target_shares_no_memory_with_its_successor(
    kind: str, change: str, first: str
) -> None:
    for steps in range(3):  # the next update averages in some of them, and in the others it does not
        old = MAKERS[kind](MIXED)
        for step in range(steps):
            old.update(perturb(MIXED, step))
        new = old.updated(perturb(MIXED))
        donating, other = (old, new) if first == "old" else (new, old)
        before = bits(other)
        getattr(donating, change)(perturb(MIXED, 2))
        assert bits(other) == before


def test_an_earlier_read_stays_correct() -> None:
    target = EMATarget(START, 0.5, donate=True)
    slow = target.params
    target.updated(ONLINE)
    np.testing.assert_array_equal(slow["w"], np.zeros(3))


# Wherever the target comes from


def closed_over(transform: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda target, online: transform(lambda x: target.updated(x), online)


CLOSED_OVER: dict[str, Callable[[Any, Any], Any]] = {
    "jit": closed_over(lambda f, x: jax.jit(f)(x)),
    "checkpoint": closed_over(lambda f, x: jax.checkpoint(f)(x)),
    "grad": closed_over(lambda f, x: jax.grad(lambda s: (s, f(x)), has_aux=True)(1.0)[1]),
    "cond": closed_over(lambda f, x: jax.lax.cond(jnp.bool_(True), f, f, x)),
    "cond in jit": closed_over(lambda f, x: jax.jit(lambda x: jax.lax.cond(True, f, f, x))(x)),
    "scan": closed_over(
        lambda f, x: jax.tree.map(
            lambda leaf: leaf[1], jax.lax.scan(lambda c, x: (c, f(x)), 0, stack([x, x]))[1]
        )
    ),
    "cond in scan in jit": closed_over(
        lambda f, x: jax.tree.map(
            lambda leaf: leaf[1],
            jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, jax.lax.cond(c < 2, f, f, x)), 0, xs)[1])(
                stack([x, x])
            ),
        )
    ),
    "vmap": closed_over(lambda f, x: jax.tree.map(lambda leaf: leaf[1], jax.vmap(f)(stack([x, x])))),
    "vmap of a cond in a scan": closed_over(
        lambda f, x: jax.tree.map(
            lambda leaf: leaf[1, 0],
            jax.vmap(lambda xs: jax.lax.scan(lambda c, x: (c, jax.lax.cond(c < 2, f, f, x)), 0, xs)[1])(
                stack([stack([x, x])] * 2)
            ),
        )
    ),
}


@pytest.mark.parametrize("kind", ["ema", "ema, donate", "ema, everything", "periodic, donate"])
@pytest.mark.parametrize("way", CLOSED_OVER)
def test_a_target_that_a_transformation_closes_over(way: str, kind: str) -> None:
    for steps in range(2):
        old = MAKERS[kind](START)
        for _ in range(steps):
            old.update(START)
        before = bits(old)
        new = CLOSED_OVER[way](old, ONLINE)
        assert bits(old) == before
        expected = old.updated(ONLINE)
        assert_close(new.params, expected.params)
        assert int(new.step) == int(expected.step)
        new.update(ONLINE)  # nothing was leaked, so both go on
        old.update(ONLINE)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_target_that_is_passed_in(kind: str) -> None:
    target, online = MAKERS[kind](MIXED), perturb(MIXED)
    before = bits(target)
    assert_same(jax.jit(updated)(target, online), jax.jit(update)(target, online))
    batch = stack([online] * 3)
    scans = [
        jax.jit(lambda t, xs, f=f: jax.lax.scan(lambda t, x: (f(t, x), None), t, xs)[0])
        for f in (updated, update)
    ]
    assert_same(*(scan(target, batch) for scan in scans))
    assert bits(target) == before


def test_a_closed_over_target_keeps_its_compensation() -> None:
    rng = np.random.default_rng(0)
    start, online = (rng.standard_normal(1000).astype(np.float32) for _ in range(2))
    target = EMATarget({"w": jnp.asarray(start)}, 1e-3, compensated=True)
    passed_in = jax.jit(updated)(target, {"w": online})
    assert_same(jax.jit(lambda x: target.updated(x))({"w": jnp.asarray(online)}), passed_in)
    mixed = EMATarget(MIXED, 0.5, compensated=True)  # all kinds of leaves
    assert_same(jax.jit(lambda x: mixed.updated(x).params)(MIXED), mixed.updated(MIXED).params)


# Programs of a functional style


def test_a_read_of_the_old_state_after_the_update() -> None:
    def step(state: State) -> tuple[State, jax.Array]:
        new = state.params + 1
        return State(new, state.target.updated(new)), state.target.params.sum()

    for run in (step, jax.jit(step)):
        state, old_sum = run(State(jnp.ones(2), EMATarget(jnp.ones(2), 0.5)))
        assert float(old_sum) == 2.0
        np.testing.assert_array_equal(state.target.params, [1.5, 1.5])


@pytest.mark.parametrize("bad", [True, False])
def test_a_step_that_is_rolled_back(bad: bool) -> None:
    def step(state: State, bad: Any) -> State:
        new = state.params + 1
        new_state = State(new, state.target.updated(new))
        return jax.tree.map(lambda old, new: jnp.where(bad, old, new), state, new_state)

    for run in (step, jax.jit(step)):
        start = State(jnp.ones(2), EMATarget(jnp.ones(2), 0.5, donate=True))
        state = run(start, bad)
        np.testing.assert_array_equal(state.target.params, [1.0, 1.0] if bad else [1.5, 1.5])
        assert int(state.target.step) == (0 if bad else 1)


def test_a_branch_of_cond_that_closes_over_the_state() -> None:
    @jax.jit
    def step(state: State, learn: jax.Array) -> State:
        def gradient_step() -> State:
            new = state.params + 1
            return State(new, state.target.updated(new))

        return jax.lax.cond(learn, gradient_step, lambda: state)

    state = State(jnp.ones(2), PeriodicTarget(jnp.ones(2), 2))
    for learn in (True, False, True):
        state = step(state, learn)
    np.testing.assert_array_equal(state.target.params, [3.0, 3.0])
    assert int(state.target.step) == 2


def test_multi_steps_of_optax() -> None:
    optimizer = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=2)

    @jax.jit
    def step(state: State, opt_state: Any) -> tuple[State, Any]:
        updates, opt_state = optimizer.update(jnp.full(2, -1.0), opt_state, state.params)
        new = optax.apply_updates(state.params, updates)
        target = jax.lax.cond(
            optimizer.has_updated(opt_state),
            lambda: state.target.updated(new),
            lambda: state.target,
        )
        return State(new, target), opt_state

    params = jnp.zeros(2)
    state, opt_state = State(params, EMATarget(params, 0.5)), optimizer.init(params)
    for _ in range(4):
        state, opt_state = step(state, opt_state)
    assert int(state.target.step) == 2
    np.testing.assert_allclose(state.target.params, [1.25, 1.25])  # 0 to 0.5 to (0.5 + 2) / 2


# What it costs, and what it refuses


@pytest.mark.parametrize("kind", MAKERS)
def test_inside_jit_it_compiles_to_what_update_compiles_to(kind: str) -> None:
    def text(method: Callable[[Any, Any], Any]) -> str:
        def step(target: Any, online: Any) -> Any:
            return method(target, online)

        target = jax.jit(lambda t: t)(MAKERS[kind](MIXED))
        return jax.jit(step, donate_argnums=0).lower(target, MIXED).as_text()  # without source lines

    assert text(updated) == text(update)


def test_an_update_that_fails_leaves_the_target_as_it_was() -> None:
    target = EMATarget(START, 0.5)
    with pytest.raises(ValueError, match=r"online_params\['w'\]: expected float32\[3\]"):
        target.updated({"w": jnp.ones(4)})
    assert int(target.step) == 0
    with pytest.raises(RuntimeError, match="`updated`"):
        jax.jit(lambda x: target.update(x).params)(ONLINE)
