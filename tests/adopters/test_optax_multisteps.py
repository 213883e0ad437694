"""Gradients accumulated with `optax.MultiSteps`: most mini-steps leave the parameters as they are.

The target should average once for each update of the parameters. An `update_period` of as many
mini-steps does that. If the number of mini-steps changes, `has_updated` says when to average.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.comparisons import arrays
from reference import assert_follows, entry

from target_nets import EMATarget

STEP_SIZE = 0.3


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


def fresh() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return {
        "w1": jax.random.normal(keys[0], (3, 8)),
        "b1": jnp.zeros(8),
        "w2": jax.random.normal(keys[1], (8,)) / 8,
    }


def data(mini_steps: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(mini_steps, 4, 3)).astype(np.float32)
    return x, x.sum(-1)


def test_an_update_period_equal_to_the_number_of_mini_steps() -> None:
    params, every = fresh(), 4
    optimizer = optax.MultiSteps(optax.adam(1e-2), every_k_schedule=every)
    opt_state, target = optimizer.init(params), EMATarget(params, STEP_SIZE, update_period=every)

    @jax.jit
    def mini_step(params: Any, opt_state: Any, target: Any, x: jax.Array, y: jax.Array) -> Any:
        updates, opt_state = optimizer.update(jax.grad(loss)(params, x, y), opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, target.update(params)

    online = [arrays(params)]
    for x, y in zip(*data(12), strict=True):
        params, opt_state, target = mini_step(params, opt_state, target, x, y)
        online.append(arrays(params))
    assert_follows(target.params, [online[0], online[4], online[8], online[12]], STEP_SIZE)


def test_averages_when_has_updated_is_true() -> None:
    params = fresh()
    optimizer = optax.MultiSteps(optax.adam(1e-2), every_k_schedule=lambda step: step + 1)
    carry = params, optimizer.init(params), EMATarget(params, STEP_SIZE)

    def mini_step(carry: Any, batch: Any) -> Any:
        params, opt_state, target = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params, *batch), opt_state, params)
        params = optax.apply_updates(params, updates)
        target = jax.lax.cond(
            optimizer.has_updated(opt_state), EMATarget.update, lambda target, _: target, target, params
        )
        return (params, opt_state, target), params

    (_, _, target), trained = jax.lax.scan(mini_step, carry, data(8))
    assert target.step == 3
    assert_follows(target.params, [params, *(entry(trained, t) for t in (0, 2, 5))], STEP_SIZE)
