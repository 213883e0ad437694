"""The average is right up to the rounding of its dtype, at any step size and for any values."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.serialization import to_state_dict
from helpers.comparisons import bits
from hypothesis import example, given, settings
from hypothesis import strategies as st

from target_nets import EMATarget, incremental_update

LOW = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float16]
REAL = [*LOW, jnp.float32]
HUGE = 2.0**126
TINY = float(np.finfo(np.float32).tiny)

# Examples are batches of a fixed length, so that there is one compiled function for each dtype.
LENGTH = 8
step_sizes = st.sampled_from([0.0, TINY, 1e-6, 0.005, 0.5, 1 - 1e-6, 1.0]) | st.floats(0, 1, width=32)


def values(dtype: Any) -> st.SearchStrategy[np.ndarray]:
    largest = float(jnp.finfo(dtype).max)
    info = jnp.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.0, largest, -largest, float(info.tiny), float(info.smallest_subnormal)]
    number = st.sampled_from(special) | st.floats(-min(largest, HUGE), min(largest, HUGE), width=32)
    return st.lists(number, min_size=LENGTH, max_size=LENGTH).map(
        lambda xs: np.asarray(xs, np.float32).astype(dtype)
    )


pairs = st.sampled_from(REAL).flatmap(lambda dtype: st.tuples(values(dtype), values(dtype)))


def average_in_float64(new: Any, old: Any, step_size: float) -> np.ndarray:
    new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
    return old + np.float64(np.float32(step_size)) * (new - old)


@settings(max_examples=300, deadline=None)
@given(pairs, step_sizes)
def test_the_average_is_that_of_float64_up_to_rounding(
    pair: tuple[np.ndarray, np.ndarray], step_size: float
) -> None:
    new, old = pair
    got = np.asarray(incremental_update(new, old, step_size))
    assert got.dtype == old.dtype
    info = ml_dtypes.finfo(old.dtype)
    expected = average_in_float64(new, old, step_size)
    # Float32 arithmetic errs by a few units of the larger value; then the result is rounded once.
    scale = np.maximum(np.abs(np.asarray(new, np.float64)), np.abs(np.asarray(old, np.float64)))
    arithmetic = 3 * np.finfo(np.float32).eps * scale
    rounding = 0.0 if old.dtype == np.float32 else 0.5 * float(info.eps) * np.abs(expected)
    smallest = max(float(info.smallest_subnormal), TINY)
    np.testing.assert_array_less(
        np.abs(got.astype(np.float64) - expected), arithmetic + rounding * 1.001 + smallest
    )


@settings(max_examples=200, deadline=None)
@given(pairs, step_sizes)
def test_a_constant_online_value_is_the_exact_fixed_point(pair: Any, step_size: float) -> None:
    value = np.where(np.abs(pair[0].astype(np.float32)) < TINY, np.abs(pair[1] * 0), pair[0])
    # Denormals were left out, since XLA may flush them to zero.
    assert bits(incremental_update(value, value, step_size)) == bits(value)


@settings(max_examples=200, deadline=None)
@given(pairs)
def test_both_ends_are_exact(pair: Any) -> None:
    new, old = pair
    assert bits(incremental_update(new, old, 1)) == bits(new)
    assert bits(incremental_update(new, old, 0)) == bits(old)
    assert bits(incremental_update(new, old, jnp.float32(1))) == bits(new)


@settings(max_examples=200, deadline=None)
@given(pairs, step_sizes)
@example((np.full(LENGTH, 3e38, np.float32), np.full(LENGTH, -3e38, np.float32)), 0.5)
def test_the_average_lies_between_and_never_overflows(pair: Any, step_size: float) -> None:
    new, old = pair
    got = np.asarray(incremental_update(new, old, step_size), np.float64)
    low = np.minimum(np.asarray(new, np.float64), np.asarray(old, np.float64))
    high = np.maximum(np.asarray(new, np.float64), np.asarray(old, np.float64))
    slack = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    assert np.isfinite(got).all()
    if old.dtype == np.float32:
        low, high = low - slack, high + slack
    low, high = np.where(np.abs(low) <= TINY, -TINY, low), np.where(np.abs(high) <= TINY, TINY, high)
    assert ((low <= got) & (got <= high)).all()  # XLA may flush a denormal to zero


NONFINITE = [jnp.float8_e5m2, jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64]


@pytest.mark.parametrize("dtype", NONFINITE)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_both_ends_are_exact_if_the_other_side_is_nonfinite(dtype: Any, bad: float) -> None:
    one, other = np.ones(2, dtype), np.full(2, bad).astype(dtype)
    for number in (int, jnp.float32):
        assert bits(incremental_update(one, other, number(1))) == bits(one)
        assert bits(incremental_update(other, one, number(0))) == bits(one)


@pytest.mark.parametrize("dtype", NONFINITE[:-1])
@pytest.mark.parametrize("step_size", [0.1, 0.9])
def test_inf_stays_inf_and_nan_stays_nan(dtype: Any, step_size: float) -> None:
    inf, one = np.array(np.inf, dtype), np.array(1, dtype)
    for new, old in [(inf, inf), (inf, one), (one, inf)]:
        assert np.isposinf(float(incremental_update(new, old, step_size)))
    assert np.isnan(float(incremental_update(inf, -inf, step_size)))
    assert np.isnan(float(incremental_update(np.array(np.nan, dtype), one, step_size)))


def test_the_parts_of_a_complex_number_do_not_mix() -> None:
    new, old = np.complex64(complex(np.inf, 2)), np.complex64(complex(1, 4))
    got = complex(incremental_update(new, old, 0.5))
    assert got.real == np.inf
    assert got.imag == 3


@pytest.mark.parametrize(("step_size", "counts_as"), [(-1.0, 0), (2.0, 1), (np.nan, 0), (np.inf, 1)])
def test_a_traced_step_size_is_clipped(step_size: float, counts_as: int) -> None:
    got = jax.jit(incremental_update)(3.0, 5.0, step_size)
    assert got == (3.0 if counts_as else 5.0)
    assert incremental_update(3.0, 5.0, jnp.float32(step_size)) == got


@settings(max_examples=50, deadline=None)
@given(values(jnp.float32), values(jnp.float32), step_sizes)
def test_float64_under_x64(new: np.ndarray, old: np.ndarray, step_size: float) -> None:
    new, old = new.astype(np.float64), old.astype(np.float64)
    with jax.enable_x64(True):
        got = np.asarray(incremental_update(new, old, step_size))
    expected = old + step_size * (new - old)
    scale = np.maximum(np.abs(new), np.abs(old))
    np.testing.assert_array_less(np.abs(got - expected), 3 * np.finfo(np.float64).eps * scale + 1e-300)


@settings(max_examples=50, deadline=None)
@given(values(jnp.float32), values(jnp.float32), step_sizes)
def test_complex_is_averaged_part_by_part(new: np.ndarray, old: np.ndarray, step_size: float) -> None:
    both = (
        np.stack([new, old], -1).view(np.complex64)[..., 0],
        np.stack([old, -new], -1).view(np.complex64)[..., 0],
    )
    got = incremental_update(*both, step_size)
    assert bits(got.real) == bits(incremental_update(new, old, step_size))
    assert bits(got.imag) == bits(incremental_update(old, -new, step_size))


def test_a_bfloat16_average_arrives_where_the_textbook_formula_stands_still() -> None:
    online = {"w": jnp.full(3, 1.5, jnp.bfloat16)}
    target = EMATarget({"w": jnp.ones(3, jnp.bfloat16)}, 0.005)

    @jax.jit
    def run(target: Any) -> Any:
        return jax.lax.scan(lambda t, _: (t.update(online), None), target, length=10_000)[0]

    assert run(target).params["w"].tolist() == [1.5] * 3


@pytest.mark.parametrize("settings", [{}, {"compensated": True}, {"accumulator_dtype": jnp.bfloat16}])
def test_bfloat16_parameters_are_rounded_before_the_average_in_the_same_program(settings: Any) -> None:
    x = jnp.linspace(-1, 1, 64, dtype=jnp.bfloat16)

    def train(x: jax.Array) -> jax.Array:
        return x + x * x * jnp.bfloat16(0.33)

    @jax.jit
    def step(x: jax.Array, target: Any, copied: Any) -> tuple[Any, Any, Any, Any]:
        x = train(x)
        return x, target.update(x), copied.sync(x), copied.distance(x)

    def make_two() -> tuple[Any, Any]:
        return EMATarget(x, 0.3, **settings), EMATarget(x, 0.3, **settings)

    online, target, copied, distance = step(x, *make_two())
    expected, expected_copy = make_two()
    assert bits(to_state_dict(target)["params"]) == bits(
        to_state_dict(expected.update(online))["params"]
    )
    assert bits(to_state_dict(copied)["params"]) == bits(
        to_state_dict(expected_copy.sync(online))["params"]
    )
    assert distance == 0
