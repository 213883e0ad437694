"""Self-supervision in the style of DeepMind's BYOL (Grill et al., 2020), with Haiku.

There the target parameters, and the step that gives tau, are fields of an experiment state. Here a
target with a schedule replaces them. BatchNorm's state, which the forward passes use, is not averaged.
"""

import math
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.comparisons import arrays
from reference import assert_follows

from target_nets import EMATarget, schedules

BASE_TAU, MAX_STEPS = 0.7, 8
OPTIMIZER = optax.adam(1e-2)


def forward(images: jax.Array, is_training: bool) -> dict[str, jax.Array]:
    x = hk.Linear(8, name="encoder")(images)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training)
    projection = hk.Linear(4, name="projector")(jax.nn.relu(x))
    return {"projection": projection, "prediction": hk.Linear(4, name="predictor")(projection)}


NETWORK = hk.without_apply_rng(hk.transform_with_state(forward))


class ByolState(NamedTuple):
    online_params: hk.Params
    online_state: hk.State
    target: EMATarget[hk.Params]
    target_state: hk.State
    opt_state: optax.OptState


def make_initial_state(key: jax.Array, images: np.ndarray) -> ByolState:
    params, state = NETWORK.init(key, images, is_training=True)
    target = EMATarget(params, schedules.cosine(1 - BASE_TAU, MAX_STEPS))
    return ByolState(params, state, target, state, OPTIMIZER.init(params))


@jax.jit
def update_fn(state: ByolState, views: tuple[np.ndarray, np.ndarray]) -> ByolState:
    def loss_fn(online_params: hk.Params) -> tuple[jax.Array, tuple[Any, Any]]:
        loss, online_state, target_state = jnp.zeros(()), state.online_state, state.target_state
        for view, other in (views, views[::-1]):
            online, online_state = NETWORK.apply(online_params, online_state, view, is_training=True)
            slow, target_state = NETWORK.apply(
                state.target.params, target_state, other, is_training=True
            )
            projection = jax.lax.stop_gradient(slow["projection"])
            loss += jnp.mean(2 - 2 * optax.cosine_similarity(online["prediction"], projection))
        return loss, (online_state, target_state)

    grads, (online_state, target_state) = jax.grad(loss_fn, has_aux=True)(state.online_params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
    params = optax.apply_updates(state.online_params, updates)
    return ByolState(params, online_state, state.target.update(params), target_state, opt_state)


def test_tau_follows_the_cosine_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 6)).astype(np.float32)
    state = make_initial_state(jax.random.key(0), images)
    online = [arrays(state.online_params)]
    for _ in range(5):
        views = tuple(images + 0.1 * rng.normal(size=(2, *images.shape)).astype(np.float32))
        state = update_fn(state, views)
        online.append(arrays(state.online_params))

    def tau(k: int) -> float:  # section 3.3 of the paper
        return 1 - (1 - BASE_TAU) * (math.cos(math.pi * k / MAX_STEPS) + 1) / 2

    assert_follows(state.target.params, online, lambda k: 1 - tau(k))
    assert type(state.target.params) is type(state.online_params)
