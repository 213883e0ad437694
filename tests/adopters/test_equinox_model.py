"""A model in the style of Equinox's examples (Kidger and Garcia, 2021): a denoiser, and its average.

One samples from the average of a diffusion model (Ho et al., 2020). Its step size warms up.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from helpers.comparisons import arrays
from reference import assert_follows

from target_nets import EMATarget, schedules

OPTIM = optax.adam(1e-2)


class Denoiser(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        self.mlp = eqx.nn.MLP(3, 2, width_size=8, depth=1, activation=jax.nn.silu, key=key)

    def __call__(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        return self.mlp(jnp.append(x, jnp.log(sigma)))


def compute_loss(model: Denoiser, x: jax.Array, key: jax.Array) -> jax.Array:
    noise_key, sigma_key = jax.random.split(key)
    sigma = jnp.exp(jax.random.normal(sigma_key, (len(x),)))
    noisy = x + sigma[:, None] * jax.random.normal(noise_key, x.shape)
    return jnp.mean((jax.vmap(model)(noisy, sigma) - x) ** 2)


@eqx.filter_jit
def make_step(
    model: Denoiser,
    target: EMATarget[Denoiser],
    opt_state: optax.OptState,
    x: jax.Array,
    key: jax.Array,
) -> tuple[Denoiser, EMATarget[Denoiser], optax.OptState, jax.Array]:
    loss, grads = eqx.filter_value_and_grad(compute_loss)(model, x, key)
    updates, opt_state = OPTIM.update(grads, opt_state)
    model = eqx.apply_updates(model, updates)
    return model, target.update(eqx.filter(model, eqx.is_array)), opt_state, loss


def test_the_average_of_a_filtered_model() -> None:
    data_key, model_key, *keys = jax.random.split(jax.random.key(0), 9)
    x = jax.random.normal(data_key, (16, 2)) + 2
    model = Denoiser(model_key)
    params, static = eqx.partition(model, eqx.is_array)
    target = EMATarget(params, schedules.inverse_power(power=3 / 4, min_step_size=0.2))
    opt_state = OPTIM.init(eqx.filter(model, eqx.is_inexact_array))

    online = [arrays(params)]
    for key in keys:
        model, target, opt_state, _ = make_step(model, target, opt_state, x, key)
        online.append(arrays(eqx.filter(model, eqx.is_array)))
    # The warm-up begins with a copy and goes on with a power of n. The minimum would begin at n = 8.
    assert_follows(target.params, online, lambda n: max((1 + n) ** -0.75, 0.2))

    averaged = eqx.combine(target.params, static)
    assert averaged(x[0], jnp.ones(())).shape == (2,)
