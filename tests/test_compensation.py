"""`compensated=True`: the average is right to one unit in the last place, however many updates."""

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from helpers.comparisons import arrays, assert_same
from helpers.trees import perturb
from hypothesis import given, settings
from hypothesis import strategies as st

from target_nets import EMATarget, rules

LENGTH = 4
F32 = np.float32
finite = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: abs(x) > 2.0**-80 or x == 0)
batches = st.lists(finite, min_size=LENGTH, max_size=LENGTH).map(lambda xs: np.array(xs, F32))
# Of equal values, and of values that nearly cancel, there are few among random ones.
pairs = st.tuples(batches, batches) | batches.flatmap(
    lambda x: st.tuples(st.just(x), st.integers(-4, 4).map(lambda n: x * F32(1 + n * 2.0**-23)))
)
step_sizes = st.sampled_from([1e-7, 1e-5, 1e-3, 0.1, 0.5, 0.9, 1 - 2.0**-24]) | st.floats(
    2.0**-30, 1, width=32
)


def held(target: Any) -> tuple[np.ndarray, np.ndarray]:
    """The slow value of a single leaf and its compensation."""
    state = serialization.to_state_dict(target)
    return np.array(state["params"]["w"]), np.array(state["compensation"]["w"])


def target_of(value: Any, error: Any, step_size: float, **settings: Any) -> Any:
    template = EMATarget({"w": value}, step_size, compensated=True, **settings)
    saved = {"step": 0, "params": {"w": value}, "compensation": {"w": error}}
    return serialization.from_state_dict(template, saved)


@settings(max_examples=300, deadline=None)
@given(pairs, st.floats(-0.5, 0.5), step_sizes)
def test_one_update_is_that_of_exact_arithmetic(pair: Any, cut: float, step_size: float) -> None:
    new, old = pair
    error = (cut * np.spacing(np.abs(old))).astype(F32)
    value, left = held(target_of(old, error, step_size).update({"w": new}))
    s = Fraction(float(F32(step_size)))
    for x, y, e, got, rest in zip(new, old, error, value, left, strict=True):
        x, y, e = (Fraction(float(z)) for z in (x, y, e))
        expected = y + e + s * (x - y - e)
        scale = max(abs(x), abs(y))
        assert abs(Fraction(float(got)) + Fraction(float(rest)) - expected) <= scale * Fraction(2) ** -44
        # The value is the one nearest to the sum, so that what is left is at most half a unit.
        assert abs(float(rest)) <= 0.5 * float(np.spacing(np.abs(got))) + np.finfo(F32).tiny


@settings(max_examples=100, deadline=None)
@given(batches, step_sizes)
def test_a_constant_online_value_is_the_exact_fixed_point(value: np.ndarray, step_size: float) -> None:
    target = EMATarget({"w": value}, step_size, compensated=True)
    got, error = held(target.update({"w": value}))
    assert got.tobytes() == value.tobytes()
    assert not error.any()


@settings(max_examples=100, deadline=None)
@given(pairs)
def test_both_ends_are_exact(pair: Any) -> None:
    new, old = pair
    error = np.spacing(old) / 4
    got, left = held(target_of(old, error, 1).update({"w": new}))
    assert got.tobytes() == new.tobytes()
    assert not left.any()
    got, left = held(target_of(old, error, 0).update({"w": new}))
    assert (got.tobytes(), left.tobytes()) == (old.tobytes(), error.tobytes())


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 3.4e38])
@pytest.mark.parametrize("step_size", [0, 0.1, 0.9, 1])
def test_what_is_not_finite_is_as_without_compensation(bad: float, step_size: float) -> None:
    cases = [(bad, 1), (1, bad), (bad, -bad), (bad, bad)]
    new, old = (np.array(column, F32) for column in zip(*cases, strict=True))
    got, left = held(target_of(old, np.zeros(4, F32), step_size).update({"w": new}))
    plain = EMATarget({"w": old}, step_size).update({"w": new}).params["w"]
    np.testing.assert_allclose(got, plain, rtol=1e-7)
    assert np.isfinite(left).all()
    again = held(target_of(got, left, 1).update({"w": np.ones(4, F32)}))[0]
    assert again.tolist() == [1] * 4  # a copy of finite values mends it


@pytest.mark.parametrize(
    ("step_size", "updates"), [(0.5, 200), (0.1, 1000), (1e-2, 2000), (1e-3, 20_000), (1e-5, 100_000)]
)
def test_noisy_parameters_are_averaged_to_one_unit_in_the_last_place(
    step_size: float, updates: int
) -> None:
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(32)
    exact = np.zeros(32, np.longdouble)  # from zero, and near zero: the hard case
    target = EMATarget({"w": jnp.zeros(32)}, step_size, compensated=True)

    @jax.jit
    def run(target: Any, batch: jax.Array) -> Any:
        return jax.lax.scan(lambda t, x: (t.update({"w": x}), None), target, batch)[0]

    s = np.longdouble(F32(step_size))
    for batch in np.split(np.arange(updates), max(1, updates // 10_000)):
        online = (mean + rng.standard_normal((len(batch), 32))).astype(F32)
        target = run(target, online)
        for x in online.astype(np.longdouble):
            exact += s * (x - exact)
    units = np.abs(held(target)[0] - exact) / np.spacing(np.abs(exact).astype(F32))
    assert units.max() < 0.51


DTYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32"]


@pytest.mark.parametrize("accumulator", DTYPES)
def test_the_compiler_leaves_every_rounding_in_place(accumulator: str) -> None:
    """What is compiled, alone or in a scan, is what its operations give one by one."""
    rng = np.random.default_rng(0)
    onlines = {"w": 16 * rng.standard_normal((5, 64)).astype(F32)}
    target = EMATarget({"w": jnp.zeros(64)}, 0.1, accumulator_dtype=accumulator, compensated=True)

    def run(update: Callable[[Any, Any], Any]) -> tuple[np.ndarray, np.ndarray]:
        moving = jax.tree.map(lambda x: x, target)
        for row in onlines["w"]:
            moving = update(moving, {"w": row})
        return held(moving)

    compiled = run(lambda t, p: t.update(p))
    jitted = run(jax.jit(lambda t, p: t.update(p)))
    scanned = held(jax.lax.scan(lambda t, p: (t.update(p), None), target, onlines)[0])
    with jax.disable_jit():
        one_by_one = run(lambda t, p: t.update(p))
    assert np.count_nonzero(compiled[1]) > 40  # there is an error, and it is not lost
    for value, error in (jitted, scanned, one_by_one):
        assert_same(value, compiled[0])
        # What is left may differ in its own last bits, where multiplication and addition are fused.
        scale, eps = np.abs(onlines["w"]).max(), float(jnp.finfo(accumulator).eps)
        np.testing.assert_allclose(error.astype(float), compiled[1].astype(float), atol=scale * eps**2)


def test_bfloat16_and_its_error_have_twice_the_bits() -> None:
    online = {"w": np.linspace(1, 2, 64, dtype=F32)}
    settings = {"accumulator_dtype": jnp.bfloat16}

    def lag(compensated: bool) -> float:
        target = EMATarget({"w": jnp.zeros(64)}, 1e-2, compensated=compensated, **settings)
        target = jax.lax.scan(lambda t, _: (t.update(online), None), target, length=4000)[0]
        assert {x.dtype.name for x in jax.tree.leaves(target) if x.ndim} == {"bfloat16"}
        return float(np.abs(np.asarray(target.params["w"]) - online["w"]).max())

    assert lag(compensated=True) < 0.004 < 0.2 < lag(compensated=False)


def test_float64_under_x64() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        exact, online = np.zeros(16, np.longdouble), rng.standard_normal((5000, 16))
        target = EMATarget({"w": jnp.zeros(16)}, 1e-2, compensated=True)
        target = jax.lax.scan(lambda t, x: (t.update({"w": x}), None), target, online)[0]
        # Longdouble is too short for the sum: the error of its own is some 2**-64.
        for x in online.astype(np.longdouble):
            exact += np.longdouble(0.01) * (x - exact)
        assert held(target)[0].dtype == np.float64
        assert (np.abs(held(target)[0] - exact) <= 0.6 * np.spacing(np.abs(exact).astype(float))).all()


@pytest.mark.parametrize("jit", [True, False])
def test_one_update_in_float64_is_that_of_exact_arithmetic(jit: bool) -> None:
    new, old = np.random.default_rng(0).standard_normal((2, 500))
    with jax.enable_x64(True), jax.disable_jit(not jit):  # compiled, products may be fused, and so exact
        value, left = held(EMATarget({"w": old}, 0.3, compensated=True).update({"w": new}))
    exact = [[Fraction(x) for x in column.tolist()] for column in (new, old, value, left)]
    for x, y, got, rest in zip(*exact, strict=True):
        expected = y + Fraction(0.3) * (x - y)
        assert abs(got + rest - expected) <= max(abs(x), abs(y)) * Fraction(2) ** -102


def test_complex_is_compensated_part_by_part() -> None:
    rng = np.random.default_rng(0)
    online = rng.standard_normal((300, 8, 2)).astype(F32).view(np.complex64)[..., 0]

    def run(online: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        target = EMATarget({"w": jnp.zeros_like(online[0])}, 1e-2, compensated=True)
        return held(jax.lax.scan(lambda t, x: (t.update({"w": x}), None), target, online)[0])

    for whole, real, imaginary in zip(run(online), run(online.real), run(online.imag), strict=True):
        assert_same((whole.real.copy(), whole.imag.copy()), (real, imaginary))


MIXED = {
    "bfloat16": jnp.ones(3, jnp.bfloat16),
    "float32": jnp.ones(3),
    "complex": jnp.ones(3, jnp.complex64),
    "copied": jnp.ones(3),
    "integer": jnp.arange(3),
    "key": jax.random.key(0),
    "none": None,
}
MASK = {name: name != "copied" for name in MIXED if name != "none"} | {"none": None}


def test_only_averaged_leaves_have_a_compensation() -> None:
    target = EMATarget(MIXED, 0.3, mask=MASK, compensated=True)
    paths = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(target)}
    names = [name for name in paths if name.startswith(".compensation")]
    assert names == [f".compensation['{name}']" for name in ("bfloat16", "complex", "float32")]
    assert [paths[name].dtype for name in names] == [jnp.float32, jnp.complex64, jnp.float32]
    assert list(paths).index(".step") < list(paths).index(names[0])
    assert "compensated=True, arrays=6, parameters=16" in repr(target)


def test_it_is_saved_and_a_target_without_it_refuses_it_by_path() -> None:
    def make(**settings: Any) -> Any:
        return EMATarget(MIXED, 0.3, mask=MASK, **settings)

    target = make(compensated=True).update(perturb(MIXED, 0.7))
    state = serialization.to_state_dict(target)
    assert list(state) == ["step", "params", "compensation"]
    assert state["compensation"]["integer"] is state["compensation"]["copied"] is None
    restored = serialization.from_bytes(make(compensated=True), serialization.to_bytes(target))
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


def test_sync_clears_it_and_a_copied_leaf_has_none() -> None:
    target = EMATarget({"w": jnp.zeros(8)}, 0.3, compensated=True).update({"w": jnp.arange(8) + 0.7})
    assert held(target)[1].any()
    assert not held(target.sync({"w": jnp.ones(8)}))[1].any()


def test_distance_and_reading_count_it_in() -> None:
    value, error = jnp.ones(1), jnp.full(1, -(2.0**-26))
    target = target_of(value, error, 0.5)
    assert target.distance({"w": jnp.ones(1)}) == 2.0**-26
    coarse = target_of(
        jnp.ones(1, jnp.bfloat16), jnp.full(1, 2.0**-10, jnp.bfloat16), 0.5, accumulator_dtype="bfloat16"
    )
    assert coarse.params["w"].dtype == jnp.bfloat16
    wide = EMATarget({"w": jnp.ones(1)}, 0.5, accumulator_dtype="bfloat16", compensated=True)
    wide = serialization.from_state_dict(wide, serialization.to_state_dict(coarse))
    assert wide.params["w"] == 1 + 2.0**-10


@pytest.mark.parametrize("accumulator", ["float32", "bfloat16", "float8_e5m2"])
def test_the_derivative_is_that_of_the_average(accumulator: str) -> None:
    def value(new: jax.Array, old: jax.Array, s: jax.Array) -> jax.Array:
        held = old.astype(accumulator)
        return rules.compensated(new, held, jnp.zeros_like(held), s)[0].astype(jnp.float32)

    for x, y in ((2.0, 3.0), (2.0, 2.0)):
        got = jax.grad(value, argnums=(0, 1, 2))(jnp.float32(x), jnp.float32(y), jnp.float32(0.25))
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


def test_a_sync_keeps_it_where_it_was_put() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    subprocess.run([sys.executable, "-c", SHARDED_SYNC], check=True, env=environment)


def test_equal_shapes_are_traced_once(trace_counter: Any) -> None:
    params = [jnp.zeros(5)] * 20
    with trace_counter() as compiled:
        target = EMATarget(params, 0.3, compensated=True)
        for _ in range(3):
            target.update(perturb(params))
    assert len([name for name in compiled if "_move" in name]) == 1
