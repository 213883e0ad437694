"""An agent in the style of PureJaxRL's `dqn.py` (Lu et al., 2022): the whole run is one jitted function.

There the target parameters are a field of the state in the carry of a scan, a `lax.cond` replaces them,
and the run is vmapped over seeds. Here the target is that field, and vmap goes over step sizes, too.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from reference import assert_follows, entry

from target_nets import EMATarget

CONFIG: dict[str, Any] = {
    "NUM_ENVS": 4,
    "NUM_UPDATES": 9,
    "TARGET_UPDATE_INTERVAL": 2,
    "LR": 1e-2,
    "GAMMA": 0.9,
    "EPSILON": 0.3,
    "CELLS": 5,
}


class QNetwork(nn.Module):
    action_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(self.action_dim)(x)


class CustomTrainState(TrainState):
    target: EMATarget[Any]


def env_step(position: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A corridor: one cell to the left or to the right, with a reward at its right end."""
    position = jnp.clip(position + 2 * action - 1, 0, CONFIG["CELLS"] - 1)
    return position, (position == CONFIG["CELLS"] - 1).astype(jnp.float32)


def make_train(config: dict[str, Any]) -> Any:
    network = QNetwork(action_dim=2)

    def train(rng: jax.Array, tau: jax.Array) -> dict[str, Any]:
        rng, _rng = jax.random.split(rng)
        network_params = network.init(_rng, jnp.zeros(config["CELLS"]))
        train_state = CustomTrainState.create(
            apply_fn=network.apply,
            params=network_params,
            tx=optax.adam(config["LR"]),
            target=EMATarget(network_params, tau, update_period=config["TARGET_UPDATE_INTERVAL"]),
        )

        def _update_step(runner_state: Any, _: None) -> tuple[Any, Any]:
            train_state, position, rng = runner_state

            rng, rng_a, rng_e = jax.random.split(rng, 3)
            obs = jax.nn.one_hot(position, config["CELLS"])
            greedy = jnp.argmax(network.apply(train_state.params, obs), axis=-1)
            explore = jax.random.uniform(rng_e, greedy.shape) < config["EPSILON"]
            action = jnp.where(explore, jax.random.randint(rng_a, greedy.shape, 0, 2), greedy)
            position, reward = jax.vmap(env_step)(position, action)

            next_obs = jax.nn.one_hot(position, config["CELLS"])
            q_next = network.apply(train_state.target.params, next_obs).max(axis=-1)
            goal = reward + config["GAMMA"] * q_next

            def _loss_fn(params: Any) -> jax.Array:
                q_vals = network.apply(params, obs)
                chosen = jnp.take_along_axis(q_vals, action[:, None], axis=-1)[:, 0]
                return jnp.mean((chosen - goal) ** 2)

            train_state = train_state.apply_gradients(grads=jax.grad(_loss_fn)(train_state.params))
            train_state = train_state.replace(target=train_state.target.update(train_state.params))
            return (train_state, position, rng), {"params": train_state.params}

        runner_state = (train_state, jnp.zeros(config["NUM_ENVS"], int), rng)
        runner_state, metrics = jax.lax.scan(_update_step, runner_state, None, config["NUM_UPDATES"])
        return {"runner_state": runner_state, "metrics": metrics, "network_params": network_params}

    return train


def test_sixteen_seeds_by_three_step_sizes_in_one_program() -> None:
    rngs, taus = jax.random.split(jax.random.key(0), 16), jnp.array([0.1, 0.5, 1.0])
    train_vjit = jax.jit(jax.vmap(jax.vmap(make_train(CONFIG), in_axes=(0, None)), in_axes=(None, 0)))
    outs = train_vjit(rngs, taus)
    target = outs["runner_state"][0].target
    np.testing.assert_array_equal(target.step, np.full((3, 16), CONFIG["NUM_UPDATES"]))

    slow, start, trained = jax.device_get(
        (target.params, outs["network_params"], outs["metrics"]["params"])
    )
    for lane in np.ndindex(3, 16):
        given = [entry(trained, *lane, t) for t in range(1, CONFIG["NUM_UPDATES"], 2)]
        online = [entry(start, *lane), *given]
        assert_follows(entry(slow, *lane), online, step_size=float(taus[lane[0]]))
