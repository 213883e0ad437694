"""A learner in the style of Acme's `SGDLearner` for DQN (Hoffman et al., 2020).

There the training state is a NamedTuple with `target_params` and `steps` for `rlax.periodic_update`.
Here one field, the target, replaces both.
"""

import itertools
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.comparisons import arrays, assert_same
from reference import assert_follows

from target_nets import PeriodicTarget


class Transition(NamedTuple):
    observation: Any
    action: Any
    reward: Any
    discount: Any
    next_observation: Any


class TrainingState(NamedTuple):
    params: hk.Params
    target: PeriodicTarget[hk.Params]
    opt_state: optax.OptState


class SGDLearner:
    def __init__(
        self,
        network: hk.Transformed,
        optimizer: optax.GradientTransformation,
        data_iterator: Iterator[Transition],
        target_update_period: int,
        random_key: jax.Array,
    ) -> None:
        def loss(params: hk.Params, target_params: hk.Params, batch: Transition) -> jax.Array:
            """Double Q-learning (van Hasselt et al., 2016)."""
            rows = jnp.arange(len(batch.action))
            q_tm1 = network.apply(params, batch.observation)[rows, batch.action]
            selected = jnp.argmax(network.apply(params, batch.next_observation), axis=-1)
            q_t = network.apply(target_params, batch.next_observation)[rows, selected]
            goal = jax.lax.stop_gradient(batch.reward + batch.discount * q_t)
            return jnp.mean(optax.huber_loss(q_tm1, goal))

        def sgd_step(state: TrainingState, batch: Transition) -> tuple[TrainingState, jax.Array]:
            value, grads = jax.value_and_grad(loss)(state.params, state.target.params, batch)
            updates, opt_state = optimizer.update(grads, state.opt_state)
            params = optax.apply_updates(state.params, updates)
            return TrainingState(params, state.target.update(params), opt_state), value

        self._sgd_step = jax.jit(sgd_step)
        self._data_iterator = data_iterator
        params = network.init(random_key, jnp.zeros((1, 4)))
        self._state = TrainingState(
            params, PeriodicTarget(params, target_update_period), optimizer.init(params)
        )

    def step(self) -> None:
        self._state, _ = self._sgd_step(self._state, next(self._data_iterator))

    def get_variables(self, names: list[str]) -> list[hk.Params]:
        variables = {"policy": self._state.params, "target": self._state.target.params}
        return [variables[name] for name in names]

    def save(self) -> TrainingState:
        return self._state

    def restore(self, state: TrainingState) -> None:
        self._state = state


def transitions(seed: int) -> Iterator[Transition]:
    rng = np.random.default_rng(seed)
    while True:
        yield Transition(
            observation=rng.normal(size=(8, 4)).astype(np.float32),
            action=rng.integers(3, size=8),
            reward=rng.normal(size=8).astype(np.float32),
            discount=np.full(8, 0.99, np.float32),
            next_observation=rng.normal(size=(8, 4)).astype(np.float32),
        )


def make_learner(data: Iterator[Transition]) -> SGDLearner:
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 3])(x)))
    return SGDLearner(network, optax.adam(1e-2), data, 3, jax.random.key(0))


def test_the_target_in_the_state_of_a_learner() -> None:
    learner = make_learner(transitions(0))
    (params,) = learner.get_variables(["policy"])
    online = [arrays(params)]
    for _ in range(8):
        learner.step()
        online.append(arrays(learner.get_variables(["policy"])))
    (slow,) = learner.get_variables(["target"])
    assert_follows(slow, online[::3], step_size=1)


def test_a_restored_learner_resumes_bit_for_bit() -> None:
    learner = make_learner(transitions(0))
    for _ in range(4):
        learner.step()
    saved = pickle.dumps(learner.save())
    resumed = make_learner(itertools.islice(transitions(0), 4, None))
    resumed.restore(pickle.loads(saved))
    for _ in range(4):
        learner.step()
        resumed.step()
    names = ["policy", "target"]
    assert_same(resumed.get_variables(names), learner.get_variables(names))
    assert resumed.save().target.step == 8
