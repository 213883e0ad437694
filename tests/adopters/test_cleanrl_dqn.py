"""A DQN in the style of CleanRL's `dqn_jax.py` (Huang et al., JMLR 2022).

There the TrainState has a field `target_params`, which the loop replaces every
`target_network_frequency` steps with an average of weight `tau`. Here the field is the target itself.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from helpers.comparisons import arrays
from reference import assert_follows

from target_nets import EMATarget

GAMMA = 0.99
TRAIN_FREQUENCY, TARGET_NETWORK_FREQUENCY = 2, 4


class QNetwork(nn.Module):
    action_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(self.action_dim)(x)


class TrainState(train_state.TrainState):
    target: EMATarget[Any]


@jax.jit
def update(q_state: TrainState, data: dict[str, np.ndarray]) -> tuple[TrainState, jax.Array]:
    q_next = q_state.apply_fn(q_state.target.params, data["next_observations"]).max(axis=-1)
    goal = data["rewards"] + (1 - data["dones"]) * GAMMA * q_next

    def mse_loss(params: Any) -> jax.Array:
        q_pred = q_state.apply_fn(params, data["observations"])
        q_pred = q_pred[jnp.arange(len(goal)), data["actions"]]
        return jnp.mean((q_pred - goal) ** 2)

    loss, grads = jax.value_and_grad(mse_loss)(q_state.params)
    return q_state.apply_gradients(grads=grads), loss


def sample(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns a batch, as a replay buffer does."""
    return {
        "observations": rng.normal(size=(8, 4)).astype(np.float32),
        "actions": rng.integers(2, size=8),
        "next_observations": rng.normal(size=(8, 4)).astype(np.float32),
        "rewards": rng.normal(size=8).astype(np.float32),
        "dones": (rng.random(8) < 0.2).astype(np.float32),
    }


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_target_as_a_field_of_the_train_state(tau: float) -> None:
    q_network = QNetwork(action_dim=2)
    params = q_network.init(jax.random.key(1), jnp.zeros(4))
    q_state = TrainState.create(
        apply_fn=q_network.apply, params=params, tx=optax.adam(1e-2), target=EMATarget(params, tau)
    )
    rng = np.random.default_rng(1)
    online = [arrays(params)]
    for global_step in range(1, 14):
        if global_step % TRAIN_FREQUENCY == 0:
            q_state, _ = update(q_state, sample(rng))
        if global_step % TARGET_NETWORK_FREQUENCY == 0:
            q_state.target.update(q_state.params)
            online.append(arrays(q_state.params))
    assert q_state.target.step == 3
    assert_follows(q_state.target.params, online, tau)
