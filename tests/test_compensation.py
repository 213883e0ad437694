"""With `compensated=True` the average is right to one unit in the last place, however long the run."""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from helpers.comparisons import arrays, assert_same
from helpers.processes import run_program
from helpers.targets import RUNS, scan_updates, through_bytes
from helpers.trees import perturb
from hypothesis import given, settings
from hypothesis import strategies as st

from target_nets import EMATarget

LENGTH = 4
F32 = np.float32
finite = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: abs(x) > 2.0**-80 or x == 0)
batches = st.lists(finite, min_size=LENGTH, max_size=LENGTH).map(lambda xs: np.array(xs, F32))
# Random pairs seldom are equal or nearly cancel, so those are drawn on purpose.
pairs = st.tuples(batches, batches) | batches.flatmap(
    lambda x: st.tuples(st.just(x), st.integers(-4, 4).map(lambda n: x * F32(1 + n * 2.0**-23)))
)
step_sizes = st.sampled_from([1e-7, 1e-5, 1e-3, 0.1, 0.5, 0.9, 1 - 2.0**-24]) | st.floats(
    2.0**-30, 1, width=32
)


def value_and_error(target: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the slow value of the leaf "w" and its rounding error, the compensation."""
    state = serialization.to_state_dict(target)
    return np.array(state["params"]["w"]), np.array(state["compensation"]["w"])


def make_target(value: Any, error: Any, step_size: Any, **settings: Any) -> Any:
    """Returns a target that has a slow value and its rounding error, restored from a checkpoint."""
    template = EMATarget({"w": value}, step_size, compensated=True, **settings)
    saved = {"step": 0, "params": {"w": value}, "compensation": {"w": error}}
    return serialization.from_state_dict(template, saved)


@settings(max_examples=300, deadline=None)
@given(pairs, st.floats(-0.5, 0.5), step_sizes)
def test_one_update_is_that_of_exact_arithmetic(pair: Any, cut: float, step_size: float) -> None:
    new, old = pair
    error = (cut * np.spacing(np.abs(old))).astype(F32)
    target = make_target(old, error, jnp.float32(step_size))  # an array: one program for all
    value, left = value_and_error(target.update({"w": new}))
    s = Fraction(float(F32(step_size)))
    for x, y, e, got, rest in zip(new, old, error, value, left, strict=True):
        x, y, e = (Fraction(float(z)) for z in (x, y, e))
        expected = y + e + s * (x - y - e)
        scale = max(abs(x), abs(y))
        assert abs(Fraction(float(got)) + Fraction(float(rest)) - expected) <= scale * Fraction(2) ** -44
        # The value is the one nearest to the sum, so the error is at most half a unit.
        assert abs(float(rest)) <= 0.5 * float(np.spacing(np.abs(got))) + np.finfo(F32).tiny


@settings(max_examples=100, deadline=None)
@given(batches, step_sizes)
def test_a_constant_online_value_is_the_exact_fixed_point(value: np.ndarray, step_size: float) -> None:
    target = EMATarget({"w": value}, jnp.float32(step_size), compensated=True)
    got, error = value_and_error(target.update({"w": value}))
    assert got.tobytes() == value.tobytes()
    assert not error.any()


@settings(max_examples=100, deadline=None)
@given(pairs)
def test_both_ends_are_exact(pair: Any) -> None:
    new, old = pair
    error = np.spacing(old) / 4
    got, left = value_and_error(make_target(old, error, 1).update({"w": new}))
    assert got.tobytes() == new.tobytes()
    assert not left.any()
    got, left = value_and_error(make_target(old, error, 0).update({"w": new}))
    assert (got.tobytes(), left.tobytes()) == (old.tobytes(), error.tobytes())


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 3.4e38])
@pytest.mark.parametrize("step_size", [0, 0.1, 0.8, 1])
def test_nonfinite_values_are_averaged_as_without_compensation(bad: float, step_size: float) -> None:
    cases = [(bad, 1), (1, bad), (bad, -bad), (bad, bad)]
    new, old = (np.array(column, F32) for column in zip(*cases, strict=True))
    got, left = value_and_error(make_target(old, np.zeros(4, F32), step_size).update({"w": new}))
    plain = EMATarget({"w": old}, step_size).update({"w": new}).params["w"]
    np.testing.assert_allclose(got, plain, rtol=1e-7)
    assert np.isfinite(left).all()
    again = value_and_error(make_target(got, left, 1).update({"w": np.ones(4, F32)}))[0]
    assert again.tolist() == [1] * 4  # a copy of finite values repairs it


@pytest.mark.parametrize(
    ("step_size", "updates"), [(0.5, 200), (0.1, 1000), (1e-2, 2000), (1e-3, 20_000), (1e-5, 60_000)]
)
def test_noisy_parameters_are_averaged_to_one_unit_in_the_last_place(
    step_size: float, updates: int
) -> None:
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(32)
    exact = np.zeros(32, np.longdouble)  # an average near zero is the hard case
    target = EMATarget({"w": jnp.zeros(32)}, step_size, compensated=True)
    s = np.longdouble(F32(step_size))
    for batch in np.split(np.arange(updates), max(1, updates // 10_000)):
        online = (mean + rng.standard_normal((len(batch), 32))).astype(F32)
        target = scan_updates(target, {"w": online})
        for x in online.astype(np.longdouble):
            exact += s * (x - exact)
    units = np.abs(value_and_error(target)[0] - exact) / np.spacing(np.abs(exact).astype(F32))
    assert units.max() < 0.51


DTYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32"]


@pytest.mark.parametrize("accumulator", DTYPES)
def test_the_compiler_removes_no_rounding(accumulator: str) -> None:
    """Compares compiled updates with the same operations one by one."""
    rng = np.random.default_rng(0)
    onlines = {"w": 16 * rng.standard_normal((5, 64)).astype(F32)}
    target = EMATarget({"w": jnp.zeros(64)}, 0.1, accumulator_dtype=accumulator, compensated=True)

    def run(how: str) -> tuple[np.ndarray, np.ndarray]:
        start = jax.tree.map(lambda x: x, target)
        return value_and_error(RUNS[how](start, [{"w": row} for row in onlines["w"]]))

    compiled = run("eager")
    with jax.disable_jit():
        one_by_one = run("eager")
    assert np.count_nonzero(compiled[1]) > 40  # there are rounding errors to lose
    for value, error in (run("jit"), run("scan"), one_by_one):
        assert_same(value, compiled[0])
        # The error may differ in its last bits, where multiplication and addition are fused.
        scale, eps = np.abs(onlines["w"]).max(), float(jnp.finfo(accumulator).eps)
        np.testing.assert_allclose(error.astype(float), compiled[1].astype(float), atol=scale * eps**2)


def test_a_bfloat16_value_and_its_error_have_twice_the_bits_of_bfloat16() -> None:
    online = {"w": np.linspace(1, 2, 64, dtype=F32)}
    settings = {"accumulator_dtype": jnp.bfloat16}

    def lag(compensated: bool) -> float:
        target = EMATarget({"w": jnp.zeros(64)}, 1e-2, compensated=compensated, **settings)
        target = jax.lax.scan(lambda t, _: (t.update(online), None), target, length=4000)[0]
        assert {x.dtype.name for x in jax.tree.leaves(target) if x.ndim} == {"bfloat16"}
        return float(np.abs(np.asarray(target.params["w"]) - online["w"]).max())

    assert lag(compensated=True) < 0.002 < 0.004 < lag(compensated=False)


def test_float64_under_x64() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        exact, online = np.zeros(16, np.longdouble), rng.standard_normal((5000, 16))
        target = EMATarget({"w": jnp.zeros(16)}, 1e-2, compensated=True)
        target = jax.lax.scan(lambda t, x: (t.update({"w": x}), None), target, online)[0]
        # The sum has a rounding error of about 2**-64 in longdouble, too.
        for x in online.astype(np.longdouble):
            exact += np.longdouble(0.01) * (x - exact)
        assert value_and_error(target)[0].dtype == np.float64
        assert (
            np.abs(value_and_error(target)[0] - exact) <= 0.6 * np.spacing(np.abs(exact).astype(float))
        ).all()


@pytest.mark.parametrize("jit", [True, False])
def test_one_update_in_float64_is_that_of_exact_arithmetic(jit: bool) -> None:
    new, old = np.random.default_rng(0).standard_normal((2, 500))
    with jax.enable_x64(True), jax.disable_jit(not jit):  # a compiled product may be fused, and so exact
        value, left = value_and_error(EMATarget({"w": old}, 0.3, compensated=True).update({"w": new}))
    exact = [[Fraction(x) for x in column.tolist()] for column in (new, old, value, left)]
    for x, y, got, rest in zip(*exact, strict=True):
        expected = y + Fraction(0.3) * (x - y)
        assert abs(got + rest - expected) <= max(abs(x), abs(y)) * Fraction(2) ** -102


def test_complex_is_compensated_part_by_part() -> None:
    rng = np.random.default_rng(0)
    online = rng.standard_normal((300, 8, 2)).astype(F32).view(np.complex64)[..., 0]

    def run(online: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        target = EMATarget({"w": jnp.zeros_like(online[0])}, 1e-2, compensated=True)
        return value_and_error(jax.lax.scan(lambda t, x: (t.update({"w": x}), None), target, online)[0])

    for whole, real, imaginary in zip(run(online), run(online.real), run(online.imag), strict=True):
        assert_same((whole.real.copy(), whole.imag.copy()), (real, imaginary))


LEAVES = {
    "bfloat16": jnp.ones(3, jnp.bfloat16),
    "float32": jnp.ones(3),
    "complex": jnp.ones(3, jnp.complex64),
    "copied": jnp.ones(3),
    "integer": jnp.arange(3),
    "key": jax.random.key(0),
    "none": None,
}
MASK = {name: name != "copied" for name in LEAVES if name != "none"} | {"none": None}


def test_only_averaged_leaves_have_a_compensation() -> None:
    target = EMATarget(LEAVES, 0.3, mask=MASK, compensated=True)
    errors = serialization.to_state_dict(target)["compensation"]
    dtypes = {name: error.dtype for name, error in errors.items() if error is not None}
    assert dtypes == {"bfloat16": jnp.float32, "complex": jnp.complex64, "float32": jnp.float32}
    assert "compensated=True, arrays=6, parameters=16" in repr(target)


def test_the_compensation_is_saved_and_refused_by_a_target_without_one() -> None:
    def make(**settings: Any) -> Any:
        return EMATarget(LEAVES, 0.3, mask=MASK, **settings)

    target = make(compensated=True).update(perturb(LEAVES, 0.7))
    state = serialization.to_state_dict(target)
    assert list(state) == ["step", "params", "compensation"]
    assert state["compensation"]["integer"] is state["compensation"]["copied"] is None
    restored = through_bytes(target, make(compensated=True))
    assert_same(arrays(restored), arrays(target))
    with pytest.raises(ValueError, match=r"\./compensation: unexpected"):
        serialization.from_state_dict(make(), state)
    with pytest.raises(ValueError, match=r"\./compensation: missing"):
        serialization.from_state_dict(make(compensated=True), serialization.to_state_dict(make()))
    state["compensation"]["float32"] = np.ones(4, F32)
    with pytest.raises(
        ValueError, match=r"\./compensation/float32: expected float32\[3\], .* float32\[4\]"
    ):
        serialization.from_state_dict(target, state)


def test_sync_clears_the_compensation() -> None:
    target = EMATarget({"w": jnp.zeros(8)}, 0.3, compensated=True).update({"w": jnp.arange(8) + 0.7})
    assert value_and_error(target)[1].any()
    assert not value_and_error(target.sync({"w": jnp.ones(8)}))[1].any()


def test_distance_and_params_include_the_compensation() -> None:
    value, error = jnp.ones(1), jnp.full(1, -(2.0**-26))
    target = make_target(value, error, 0.5)
    assert target.distance({"w": jnp.ones(1)}) == 2.0**-26
    nearby = {"w": jnp.full(1, 1 - 2.0**-20)}
    np.testing.assert_allclose(target.distance(nearby), 2.0**-20 - 2.0**-26, rtol=1e-6)
    coarse = make_target(
        jnp.ones(1, jnp.bfloat16), jnp.full(1, 2.0**-10, jnp.bfloat16), 0.5, accumulator_dtype="bfloat16"
    )
    assert coarse.params["w"].dtype == jnp.bfloat16
    wide = EMATarget({"w": jnp.ones(1)}, 0.5, accumulator_dtype="bfloat16", compensated=True)
    wide = serialization.from_state_dict(wide, serialization.to_state_dict(coarse))
    assert wide.params["w"] == 1 + 2.0**-10


@pytest.mark.parametrize("accumulator", ["float32", "bfloat16", "float8_e5m2"])
def test_the_derivative_is_that_of_the_average(accumulator: str) -> None:
    def average(new: jax.Array, old: jax.Array, step_size: jax.Array) -> jax.Array:
        target = EMATarget({"w": old}, step_size, accumulator_dtype=accumulator, compensated=True)
        return target.update({"w": new}).params["w"]

    for x, y in ((2.0, 3.0), (2.0, 2.0)):
        got = jax.grad(average, argnums=(0, 1, 2))(jnp.float32(x), jnp.float32(y), jnp.float32(0.25))
        np.testing.assert_allclose(got, (0.25, 0.75, x - y))


SHARDED_SYNC = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from target_nets import EMATarget
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("d"))
params = jax.device_put({"w": jnp.zeros(4)}, sharding)
target = EMATarget(params, 0.3, compensated=True).update(params).sync(params)
for t in (target, jax.jit(lambda t, p: t.sync(p))(target, params)):
    for x in jax.tree.leaves(t):
        assert not x.ndim or x.addressable_shards[0].data.shape == (2,), x.sharding
"""


def test_sync_keeps_the_sharding_of_the_compensation() -> None:
    run_program(SHARDED_SYNC, devices=2)


def test_many_arrays_are_one_compiled_call(trace_counter: Any) -> None:
    params = [jnp.zeros(5)] * 20
    target, online = EMATarget(params, 0.3, compensated=True), perturb(params)
    with trace_counter() as compiled:
        for _ in range(3):
            target.update(online)
    assert len(compiled) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float32])
def test_a_negative_zero_keeps_its_sign(dtype: Any) -> None:
    zeros = {"w": jnp.array([-0.0, 0.0, 1.0], dtype)}
    for step_size, change in ((1.0, "update"), (0.3, "sync")):
        target = EMATarget({"w": jnp.ones(3, dtype)}, step_size, compensated=True)
        got = getattr(target, change)(zeros).params["w"]
        np.testing.assert_array_equal(np.signbit(got.astype(jnp.float32)), [True, False, False])
