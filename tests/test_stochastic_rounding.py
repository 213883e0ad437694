"""Accumulators of less than 32 bits are rounded stochastically: without bias, and alike in every run."""

from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparisons import assert_same, bits
from helpers.targets import RUNS, scan_updates, through_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from target_nets import EMATarget, incremental_update

DTYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
F32 = np.float32


def make(params: Any, step_size: Any = 0.005, dtype: str = "bfloat16", **settings: Any) -> Any:
    return EMATarget(params, step_size, accumulator_dtype=dtype, **settings)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_an_average_has_no_bias_and_noise_of_the_predicted_size(dtype: str) -> None:
    step_size, size = 0.005, 1 << 12
    online = 1.5 + 2 * jax.random.normal(jax.random.key(0), (1000, size))
    start = jnp.full(size, 1.5)
    got = scan_updates(make(start, step_size, dtype), online).params
    error = np.asarray(got - scan_updates(EMATarget(start, step_size), online).params, np.float64)
    unit = float(jnp.finfo(dtype).eps)  # the spacing from 1 to 2
    noise = unit * np.sqrt(1 / (12 * step_size))
    assert abs(error.mean()) < 5 * noise / np.sqrt(size)
    assert 0.9 < error.std() / noise < 1.1


def test_an_average_moves_by_increments_far_below_a_unit() -> None:
    online = jnp.full((2000, 4096), 1.5)
    target = scan_updates(make(jnp.ones(4096)), online)
    assert jax.tree.leaves(target)[0].dtype == jnp.bfloat16
    expected = 1.5 - 0.5 * 0.995**2000
    assert abs(float(jnp.mean(target.params)) - expected) < 1e-3
    assert bits(incremental_update(jnp.full(4, 1.5), jnp.ones(4, jnp.bfloat16), 0.001)) == bits(
        jnp.ones(4, jnp.bfloat16)
    )  # a rule has no count, and rounds to nearest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [0, 6, -40])
def test_a_value_is_rounded_up_with_the_right_probability(dtype: str, power: int) -> None:
    info, size = jnp.finfo(dtype), 1 << 16
    exponent = max(power, info.minexp - 2)  # also below the smallest normal number
    unit = 2.0 ** max(exponent - info.nmant, info.minexp - info.nmant)
    for sign in (1, -1):
        for part in (0.125, 0.5, 0.8125):
            lower = sign * 2.0**exponent
            value = lower + sign * part * unit
            # At step size one half, the average of two neighbours of the value is the value itself.
            target = make(jnp.full(size, lower), 0.5, dtype).update(jnp.full(size, 2 * value - lower))
            up = np.asarray(jax.tree.leaves(target)[0], np.float64) != lower
            assert set(np.unique(np.abs(jax.tree.leaves(target)[0].astype(F32)))) <= {
                F32(abs(lower)),
                F32(abs(lower) + unit),
            }
            assert abs(up.mean() - part) < 5 * np.sqrt(part * (1 - part) / size)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(DTYPES), st.floats(-200, 200, width=16), st.sampled_from([0, 0.005, 0.3, 0.7, 1]))
def test_a_constant_value_and_both_ends_are_exact(dtype: str, value: float, step_size: float) -> None:
    constant = jnp.full(8, value).astype(dtype)
    for rate in (step_size, jnp.float32(step_size)):
        target = make(constant, rate, dtype).update(constant)
        assert bits(jax.tree.leaves(target)[0]) == bits(constant)
        if step_size in (0, 1):
            other = jnp.full(8, value + 1 / 3)
            target = make(constant, rate, dtype).update(other)
            assert bits(jax.tree.leaves(target)[0]) == bits(other.astype(dtype) if rate else constant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_values_come_out_as_without_rounding(dtype: str) -> None:
    with np.errstate(invalid="ignore"):
        online = np.array([np.inf, -np.inf, np.nan, -0.0, 1e30], F32)
        online[2:3].view(np.uint32)[0] = 0x7FFFFFFF
        got = np.asarray(jax.tree.leaves(make(jnp.zeros(5), 0.25, dtype).update(online))[0], F32)
        expected = np.asarray((jnp.asarray(online) * 0.25).astype(dtype), F32)
    np.testing.assert_array_equal(got[:4], expected[:4])
    if dtype != "bfloat16":
        np.testing.assert_array_equal(got[4], expected[4])


def test_every_run_gets_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    onlines = [
        {"a": rng.standard_normal((3, 5, 7)).astype(F32), "b": rng.standard_normal(()).astype(F32)}
        for _ in range(6)
    ]
    start = jax.tree.map(jnp.zeros_like, onlines[0])
    expected = make(start)
    for online in onlines:
        expected.update(online)
    for run in RUNS.values():
        assert_same(run(make(start), onlines).params, expected.params)
    resumed = RUNS["jit"](
        through_bytes(RUNS["eager"](make(start), onlines[:3]), make(start)), onlines[3:]
    )
    assert_same(resumed.params, expected.params)
    pure = make(start)
    for online in onlines:
        pure = pure.updated(online)
    assert_same(pure.params, expected.params)

    population = jax.vmap(lambda s: make(start, s))(jnp.array([0.005, 0.3]))
    batch = jax.tree.map(lambda *xs: np.stack(xs), *onlines)
    population = jax.vmap(scan_updates, in_axes=(0, None))(population, batch)
    for index, step_size in enumerate([0.005, 0.3]):
        alone = RUNS["eager"](make(start, jnp.float32(step_size)), onlines)
        assert_same(jax.tree.map(itemgetter(index), population.params), alone.params)


def test_no_two_leaves_updates_or_elements_share_their_bits() -> None:
    # Each element goes up with probability one half, so that the results are the bits.
    size, leaves, updates = 1 << 12, 6, 5
    between = jnp.full(size, 1 + 2.0**-8)
    target = make({f"{i}": jnp.ones(size) for i in range(leaves)}, jnp.float32(1 - 2.0**-20))
    rows = []
    for _ in range(updates):
        target.update({f"{i}": between for i in range(leaves)})
        rows += [np.asarray(x, F32) > 1 for x in target.params.values()]
    ups = np.array(rows) * 2.0 - 1
    assert np.abs(ups.mean(axis=1)).max() < 5 / np.sqrt(size)
    together = np.abs(ups @ ups.T / size - np.eye(len(ups)))
    assert together.max() < 5 / np.sqrt(size)
    for shift in (1, 2, 16, 64, 1024):
        assert np.abs((ups * np.roll(ups, shift, axis=1)).mean(axis=1)).max() < 5 / np.sqrt(size)
        # No row holds the bits of another one in another place.
        assert np.abs(ups @ np.roll(ups, shift, axis=1).T / size).max() < 5 / np.sqrt(size)


def test_only_averaged_leaves_are_rounded_stochastically() -> None:
    params = {"averaged": jnp.ones(64), "copied": jnp.ones(64), "small": jnp.ones(64, jnp.bfloat16)}
    online = jax.tree.map(lambda x: jnp.full(64, 1 + 2.0**-8), params)
    target = make(params, 0.5, mask={"averaged": True, "copied": False, "small": False}).update(online)
    stored = dict(zip(params, jax.tree.leaves(target), strict=False))
    assert len(np.unique(stored["averaged"].astype(F32))) == 2
    assert_same(stored["copied"], online["copied"])
    assert_same(stored["small"], online["small"].astype(jnp.bfloat16))


@pytest.mark.parametrize("settings", [{"skip_nonfinite": True}, {"update_period": 2}, {"donate": True}])
def test_it_goes_with_the_other_settings(settings: Any) -> None:
    start, online = jnp.zeros(1000), jnp.full(1000, 0.3)
    target, plain = make(start, 0.01, **settings), make(start, 0.01)
    for _ in range(4):
        target.update(online)
        plain.update(online)
    assert (target.params == 0).mean() < 0.1
    if settings.get("update_period"):
        plain = make(start, 0.01).update(online).update(online)
    assert_same(target.params, plain.params)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_its_derivative_is_that_of_the_average(dtype: str) -> None:
    target = make({"w": jnp.ones(3)}, jnp.float32(0.25), dtype)

    def total(online: Any) -> jax.Array:
        return target.updated({"w": online}).params["w"].sum()

    np.testing.assert_allclose(jax.grad(total)(jnp.full(3, 1.5)), 0.25)
    np.testing.assert_allclose(jax.jvp(total, (jnp.full(3, 1.5),), (jnp.ones(3),))[1], 0.75)
