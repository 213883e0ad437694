"""A user's editor knows that `target.params` has the type of what went in: pyright checks this file."""

from typing import Any, NamedTuple, assert_type

import jax
import jax.numpy as jnp
from flax import nnx

import target_nets
from target_nets import EMATarget, PeriodicTarget, posthoc


class Params(NamedTuple):
    w: jax.Array
    b: jax.Array


def test_a_dict() -> None:
    params: dict[str, jax.Array] = {"w": jnp.ones(2)}
    target = EMATarget(params, 0.1)
    assert_type(target, EMATarget[dict[str, jax.Array]])
    assert_type(target.params, dict[str, jax.Array])
    assert_type(target.update(params), EMATarget[dict[str, jax.Array]])
    assert_type(target.update(params).sync(params).params, dict[str, jax.Array])
    assert_type(target.distance(params), jax.Array)
    assert isinstance(target.params, dict)


def test_a_named_tuple() -> None:
    target = PeriodicTarget(Params(jnp.ones(2), jnp.zeros(2)), 10)
    assert_type(target, PeriodicTarget[Params])
    assert_type(target.params.w, jax.Array)
    assert isinstance(target.params, Params)


def test_an_nnx_module() -> None:
    target = EMATarget(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 0.1)
    assert_type(target.params, nnx.Linear)
    assert target.params(jnp.ones((1, 2))).shape == (1, 2)


def test_the_rules() -> None:
    params = Params(jnp.ones(2), jnp.zeros(2))
    assert_type(target_nets.incremental_update(params, params, 0.5), Params)
    assert_type(target_nets.periodic_update(params, params, 1, 2), Params)
    updates: Any = params
    assert_type(target_nets.apply_updates(params, updates), Params)


def test_reconstructed_parameters() -> None:
    params = Params(jnp.ones(2), jnp.zeros(2))

    def load() -> Params:
        return params

    given = posthoc.reconstruct([(1, 6.0, params), (jnp.int32(1), 16.0, params)], gamma=10)
    assert_type(given, Params)
    loaded = posthoc.reconstruct([(1, 6.0, load), (1, 16.0, load)], sigma_rel=0.08)
    assert_type(loaded, Params)
    assert isinstance(given, Params)
    assert isinstance(loaded, Params)
