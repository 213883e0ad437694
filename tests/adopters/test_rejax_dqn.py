"""A DQN in the style of rejax (Liesen et al., 2024): the algorithm is a struct made of mixins.

There a mixin holds the decay `polyak`, a leaf that may be traced, and the period
`target_update_freq`, in environment steps. One iteration steps all environments at once, so it can
cross a multiple of the period without hitting it. Here the mixin makes the target and updates it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.training.train_state import TrainState
from reference import assert_follows, entry

from target_nets import EMATarget

CELLS, ITERATIONS = 5, 9
NETWORK = nn.Dense(2)


class SlowCopyMixin(struct.PyTreeNode):
    target_update_freq: int = struct.field(pytree_node=False, default=1)
    polyak: Any = 0.99

    def make_target(self, params: Any) -> EMATarget[Any]:
        return EMATarget(params, 1 - jnp.asarray(self.polyak))

    def update_target(self, target: EMATarget[Any], params: Any, before: Any, after: Any) -> Any:
        crossed = after // self.target_update_freq > before // self.target_update_freq
        return jax.lax.cond(crossed, lambda: target.updated(params), lambda: target)


class ManyEnvironmentsMixin(struct.PyTreeNode):
    num_envs: int = struct.field(pytree_node=False, default=1)

    def step_all(self, position: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A corridor: one cell to the left or to the right, with a reward at its right end."""

        def step(position: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
            position = jnp.clip(position + 2 * action - 1, 0, CELLS - 1)
            return position, (position == CELLS - 1).astype(jnp.float32)

        return jax.vmap(step)(position, action)


class Progress(struct.PyTreeNode):
    q: TrainState
    target: EMATarget[Any]
    position: jax.Array
    rng: jax.Array
    global_step: Any = 0


class DQN(SlowCopyMixin, ManyEnvironmentsMixin):
    gamma: float = 0.9

    def init_state(self, rng: jax.Array) -> Progress:
        rng, rng_init = jax.random.split(rng)
        params = NETWORK.init(rng_init, jnp.zeros(CELLS))
        q = TrainState.create(apply_fn=NETWORK.apply, params=params, tx=optax.sgd(0.3))
        return Progress(q, self.make_target(params), jnp.zeros(self.num_envs, int), rng)

    def train_iteration(self, progress: Progress) -> Progress:
        rng, rng_action = jax.random.split(progress.rng)
        action = jax.random.randint(rng_action, (self.num_envs,), 0, 2)
        position, reward = self.step_all(progress.position, action)
        obs, next_obs = (jax.nn.one_hot(p, CELLS) for p in (progress.position, position))
        goal = reward + self.gamma * NETWORK.apply(progress.target.params, next_obs).max(axis=-1)

        def loss(params: Any) -> jax.Array:
            chosen = jnp.take_along_axis(NETWORK.apply(params, obs), action[:, None], axis=-1)[:, 0]
            return jnp.mean((chosen - goal) ** 2)

        q = progress.q.apply_gradients(grads=jax.grad(loss)(progress.q.params))
        after = progress.global_step + self.num_envs
        target = self.update_target(progress.target, q.params, progress.global_step, after)
        return Progress(q, target, position, rng, after)

    def train(self, rng: jax.Array) -> tuple[Progress, Any, Any]:
        """Returns the end, the first parameters, and those after each iteration."""

        def body(progress: Progress, _: None) -> tuple[Progress, Any]:
            progress = self.train_iteration(progress)
            return progress, progress.q.params

        start = self.init_state(rng)
        end, trained = jax.lax.scan(body, start, length=ITERATIONS)
        return end, start.q.params, trained


def test_a_population_of_polyak_factors_with_a_period_that_is_crossed() -> None:
    polyak, rngs = jnp.array([0.9, 0.5, 0.0]), jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def train(polyak: jax.Array, rngs: jax.Array) -> Any:
        algorithm = DQN(target_update_freq=10, polyak=polyak, num_envs=4)
        return jax.vmap(lambda rng: algorithm.train(rng))(rngs)

    updates = [2, 4, 7]  # 8 to 12 crosses 10, 16 to 20 hits 20, and 28 to 32 crosses 30
    end, start, trained = jax.device_get(jax.vmap(train, in_axes=(0, None))(polyak, rngs))
    np.testing.assert_array_equal(end.target.step, np.full((3, 2), len(updates)))
    for lane in np.ndindex(3, 2):
        online = [entry(start, *lane), *(entry(trained, *lane, t) for t in updates)]
        assert_follows(entry(end.target.params, *lane), online, float(1 - polyak[lane[0]]))
