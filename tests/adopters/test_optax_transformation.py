"""A trainer that takes an optax transformation and nothing else.

The target is the state of a transformation at the end of the chain, as the recipes have it. It must
equal a target that the loop updates by hand: alone, in a chain, and inside `optax.MultiSteps`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers.comparisons import arrays, assert_close
from reference import assert_follows

from target_nets import EMATarget, PeriodicTarget, schedules

EVERY = 2
START = {"w": jnp.zeros((3, 2)), "b": jnp.ones(2)}


def keep_target(make_target: Callable[[Any], Any]) -> optax.GradientTransformation:
    def update(updates: Any, target: Any, params: Any) -> tuple[Any, Any]:
        return updates, target.updated(optax.apply_updates(params, updates))

    return optax.GradientTransformation(make_target, update)


def train(tx: Any, mini_steps: int) -> tuple[Any, list[Any]]:
    """The trainer: it knows nothing of targets. Returns its optimizer's state and all parameters."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((x @ params["w"] + params["b"] - x.sum(axis=-1, keepdims=True)) ** 2)

    @jax.jit
    def step(state: TrainState, x: jax.Array) -> TrainState:
        return state.apply_gradients(grads=jax.grad(loss)(state.params, x))

    state = TrainState.create(apply_fn=None, params=START, tx=tx)
    online = [arrays(state.params)]
    for x in np.random.default_rng(0).normal(size=(mini_steps, 8, 3)).astype(np.float32):
        state = step(state, x)
        online.append(arrays(state.params))
    return state.opt_state, online


MAKERS: dict[str, Callable[[Any], Any]] = {
    "average": lambda params: EMATarget(params, 0.3),
    "schedule": lambda params: EMATarget(params, schedules.uniform(), skip_nonfinite=True),
    "period": lambda params: PeriodicTarget(params, 3),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_in_a_chain_it_equals_the_loop_by_hand(kind: str) -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1), keep_target(MAKERS[kind]))
    opt_state, online = train(tx, 7)
    target, by_hand = opt_state[-1], MAKERS[kind](online[0])
    for params in online[1:]:
        by_hand.update(params)
    assert target.step == by_hand.step == 7
    assert_close(arrays(target.params), by_hand.params)
    if kind == "average":
        assert_follows(target.params, online, 0.3)


def test_inside_of_multi_steps_it_averages_when_the_parameters_change() -> None:
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), keep_target(MAKERS["average"])), EVERY)
    opt_state, online = train(tx, 8)
    target = opt_state.inner_opt_state[-1]
    assert target.step == 8 / EVERY
    assert_follows(target.params, online[::EVERY], 0.3)
