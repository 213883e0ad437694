"""Pyright checks this file: `target.params` has the type of the parameters given to the target."""

from typing import Any, NamedTuple, assert_type

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import target_nets
from target_nets import EMATarget, PeriodicTarget, posthoc, schedules


class Params(NamedTuple):
    w: jax.Array
    b: jax.Array


def test_the_type_of_a_dict() -> None:
    params: dict[str, jax.Array] = {"w": jnp.ones(2)}
    target = EMATarget(params, 0.1)
    assert_type(target, EMATarget[dict[str, jax.Array]])
    assert_type(target.params, dict[str, jax.Array])
    assert_type(target.update(params), EMATarget[dict[str, jax.Array]])
    assert_type(target.update(params).sync(params).params, dict[str, jax.Array])
    assert_type(target.distance(params), jax.Array)
    assert isinstance(target.params, dict)


def test_the_type_of_a_named_tuple() -> None:
    target = PeriodicTarget(Params(jnp.ones(2), jnp.zeros(2)), 10)
    assert_type(target, PeriodicTarget[Params])
    assert_type(target.params.w, jax.Array)
    assert_type(target.update(target.params), PeriodicTarget[Params])
    assert_type(target.sync(target.params), PeriodicTarget[Params])
    assert isinstance(target.params, Params)


def test_the_type_of_an_nnx_state() -> None:
    state: nnx.State[Any, Any] = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    target = EMATarget(state, 0.1)
    assert_type(target.params, nnx.State[Any, Any])
    assert_type(target.update(state), EMATarget[nnx.State[Any, Any]])
    assert isinstance(target.params, nnx.State)


def test_the_type_of_an_nnx_module() -> None:
    target = EMATarget(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 0.1)
    assert_type(target.params, nnx.Linear)
    assert target.params(jnp.ones((1, 2))).shape == (1, 2)


def test_the_type_of_a_field() -> None:
    class Agent(NamedTuple):
        params: Params
        target: EMATarget[Params]

    def step(agent: Agent) -> Agent:
        return agent._replace(target=agent.target.update(agent.params))

    params = Params(jnp.ones(2), jnp.zeros(2))
    agent = step(Agent(params, EMATarget(params, 0.1)))
    assert_type(agent.target.params.w, jax.Array)


def test_the_types_of_step_sizes_and_masks() -> None:
    params = {"w": jnp.ones(2)}
    for step_size in (0.1, 1, jnp.float32(0.1), schedules.uniform(), lambda n: 1 / (n + 1)):
        assert_type(EMATarget(params, step_size), EMATarget[dict[str, jax.Array]])
    for mask in (None, True, {"w": True}, lambda params: jax.tree.map(lambda _: True, params)):
        assert_type(EMATarget(params, 0.1, mask=mask), EMATarget[dict[str, jax.Array]])


def test_an_argument_of_another_type_is_an_error() -> None:
    target = EMATarget({"w": jnp.ones(2)}, 0.1)
    with pytest.raises(ValueError, match="online_params"):
        target.update(Params(jnp.ones(2), jnp.zeros(2)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="update_period"):
        PeriodicTarget({"w": jnp.ones(2)}, 2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="total_steps"):
        schedules.cosine(0.1, 2.5)  # pyright: ignore[reportArgumentType]


def test_the_types_of_the_rules() -> None:
    params = Params(jnp.ones(2), jnp.zeros(2))
    assert_type(target_nets.incremental_update(params, params, 0.5), Params)
    assert_type(target_nets.periodic_update(params, params, 1, 2), Params)
    updates: Any = params
    assert_type(target_nets.apply_updates(params, updates), Params)


def test_the_type_of_reconstructed_parameters() -> None:
    params = Params(jnp.ones(2), jnp.zeros(2))

    def load() -> Params:
        return params

    given = posthoc.reconstruct([(1, 6.0, params), (jnp.int32(1), 16.0, params)], gamma=10)
    assert_type(given, Params)
    loaded = posthoc.reconstruct([(1, 6.0, load), (1, 16.0, load)], sigma_rel=0.08)
    assert_type(loaded, Params)
    assert isinstance(given, Params)
    assert isinstance(loaded, Params)
