"""TD3 (Fujimoto et al., 2018) in the style of single-file agents: a class whose `train` takes batches.

Its three targets, of the actor and of both critics, follow every delayed policy update. Everything that
is trained is donated to the jitted steps, and the targets reuse their own memory.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.comparisons import arrays
from reference import assert_follows

from target_nets import EMATarget

DISCOUNT, POLICY_NOISE, NOISE_CLIP, POLICY_FREQ, TAU = 0.99, 0.2, 0.5, 2, 0.1
OPTIMIZER = optax.adam(1e-2)


class Actor(nn.Module):
    @nn.compact
    def __call__(self, state: jax.Array) -> jax.Array:
        return nn.tanh(nn.Dense(1)(nn.relu(nn.Dense(8)(state))))


class Critic(nn.Module):
    @nn.compact
    def __call__(self, state: jax.Array, action: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(8)(jnp.concatenate([state, action], axis=-1)))
        return nn.Dense(1)(x)[..., 0]


class TD3:
    def __init__(self, state_dim: int, key: jax.Array) -> None:
        self.key, *keys = jax.random.split(key, 4)
        state, action = jnp.zeros(state_dim), jnp.zeros(1)
        self.params = {
            "actor": Actor().init(keys[0], state),
            "critic_1": Critic().init(keys[1], state, action),
            "critic_2": Critic().init(keys[2], state, action),
        }
        self.opt_states = {name: OPTIMIZER.init(params) for name, params in self.params.items()}
        self.targets = {
            name: EMATarget(params, TAU, update_period=POLICY_FREQ, donate=True)
            for name, params in self.params.items()
        }
        self.total_it = 0

    def train(self, batch: dict[str, np.ndarray]) -> None:
        self.total_it += 1
        self.key, key = jax.random.split(self.key)
        slow = {name: target.params for name, target in self.targets.items()}
        goal = q_goal(slow, batch, key)
        for name in ("critic_1", "critic_2"):
            self._step(name, train_critic, batch, goal)
        if self.total_it % POLICY_FREQ == 0:
            self._step("actor", train_actor, batch, self.params["critic_1"])
        for name, target in self.targets.items():
            target.update(self.params[name])  # averages at every POLICY_FREQ-th call

    def _step(self, name: str, step: Any, *args: Any) -> None:
        self.params[name], self.opt_states[name] = step(self.params[name], self.opt_states[name], *args)


@jax.jit
def q_goal(slow: dict[str, Any], batch: dict[str, np.ndarray], key: jax.Array) -> jax.Array:
    """Returns the smaller of both critics' values of a smoothed action."""
    noise = jnp.clip(
        POLICY_NOISE * jax.random.normal(key, batch["action"].shape), -NOISE_CLIP, NOISE_CLIP
    )
    action = jnp.clip(Actor().apply(slow["actor"], batch["next_state"]) + noise, -1, 1)
    q1, q2 = (
        Critic().apply(slow[name], batch["next_state"], action) for name in ("critic_1", "critic_2")
    )
    return batch["reward"] + batch["not_done"] * DISCOUNT * jnp.minimum(q1, q2)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_critic(params: Any, opt_state: Any, batch: dict[str, np.ndarray], goal: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        return jnp.mean((Critic().apply(params, batch["state"], batch["action"]) - goal) ** 2)

    updates, opt_state = OPTIMIZER.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_actor(params: Any, opt_state: Any, batch: dict[str, np.ndarray], critic: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        return -jnp.mean(Critic().apply(critic, batch["state"], Actor().apply(params, batch["state"])))

    updates, opt_state = OPTIMIZER.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state


def sample(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns a batch, as a replay buffer does."""
    return {
        "state": rng.normal(size=(8, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, (8, 1)).astype(np.float32),
        "next_state": rng.normal(size=(8, 3)).astype(np.float32),
        "reward": rng.normal(size=8).astype(np.float32),
        "not_done": (rng.random(8) > 0.1).astype(np.float32),
    }


def test_three_targets_follow_the_delayed_policy() -> None:
    agent, rng = TD3(3, jax.random.key(0)), np.random.default_rng(0)
    online = [{name: arrays(params) for name, params in agent.params.items()}]
    for _ in range(9):
        agent.train(sample(rng))
        online.append({name: arrays(params) for name, params in agent.params.items()})
    for name, target in agent.targets.items():
        assert target.step == 9
        assert_follows(target.params, [params[name] for params in online[::POLICY_FREQ]], TAU)
