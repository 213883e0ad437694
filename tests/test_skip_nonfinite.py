"""With `skip_nonfinite=True` online parameters with inf or nan leave the whole slow copy as it is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from helpers.comparisons import arrays, assert_same, bits
from helpers.targets import EVERYTHING, RUNS, harmonic, through_bytes
from helpers.trees import MIXED, MIXED_MASK, perturb
from jax.sharding import NamedSharding, PartitionSpec

from target_nets import EMATarget

GOOD = perturb(MIXED)
BAD: dict[str, Any] = {
    "nan": {**GOOD, "w": GOOD["w"].at[0, 1].set(jnp.nan)},
    "inf": {**GOOD, "w": GOOD["w"].at[1, 1].set(jnp.inf)},
    "-inf in bfloat16": {**GOOD, "h": jnp.array([-jnp.inf, 1, 1], jnp.bfloat16)},
    "nan in an imaginary part": {**GOOD, "z": jnp.array([1, complex(0, np.nan)], jnp.complex64)},
    "inf in a leaf that is copied": {**GOOD, "copied": jnp.float32(jnp.inf)},
}


def make(step_size: Any = 0.5, **settings: Any) -> Any:
    return EMATarget(MIXED, step_size, mask=MIXED_MASK, skip_nonfinite=True, **settings)


def check_skipping(bad: str, how: str, compensated: bool) -> None:
    run = RUNS[how]
    got = run(make(compensated=compensated), [GOOD, BAD[bad], GOOD, BAD[bad]])
    expected = run(make(compensated=compensated), [GOOD, GOOD])
    assert (got.step, got.skipped, expected.skipped) == (4, 2, 0)
    assert got.skipped.dtype == jnp.int32
    assert_same(got.params, expected.params)
    if compensated:
        assert_same(*(arrays(serialization.to_state_dict(t)["compensation"]) for t in (got, expected)))


@pytest.mark.parametrize("bad", BAD)
def test_the_whole_slow_copy_stays(bad: str) -> None:
    check_skipping(bad, "eager", compensated=False)


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("compensated", [False, True])
def test_the_whole_slow_copy_stays_in_every_run(how: str, compensated: bool) -> None:
    for bad in ("nan", "inf in a leaf that is copied"):
        check_skipping(bad, how, compensated)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("float8_e4m3fn", 1001),
        ("float8_e5m2", 1001),
        ("bfloat16", 1001),
        ("complex64", 1001),
        ("float32", 1),
        ("float32", 1001),
        ("float32", 4097),
    ],
)
def test_a_nonfinite_value_is_found_wherever_it_is(dtype: str, size: int) -> None:
    good, bads = np.ones(size), [np.nan] if dtype == "float8_e4m3fn" else [np.nan, np.inf, -np.inf]
    target = EMATarget({"w": jnp.zeros(size, dtype)}, 0.5, skip_nonfinite=True)
    assert target.update({"w": good.astype(jnp.dtype(dtype))}).skipped == 0
    places = [(bad, place) for bad in bads for place in {0, size // 2, size - 1}]
    for bad, place in places:
        online = good.astype(jnp.dtype(dtype))
        online[place] = bad
        target.update({"w": online})
    assert target.skipped == len(places)


def test_finite_values_are_averaged_however_large() -> None:
    huge = {**GOOD, "w": jnp.full((2, 2), 3.4e38), "n": jnp.int32(7)}
    target = make().update(huge)
    assert target.skipped == 0
    np.testing.assert_allclose(target.params["w"], 1.7e38, rtol=1e-6)
    assert EMATarget({"n": jnp.int32(1)}, 0.5, skip_nonfinite=True).update({"n": 2}).params["n"] == 2
    assert EMATarget({}, 0.5, skip_nonfinite=True).update({}).skipped == 0


@pytest.mark.parametrize("how", RUNS)
def test_a_skipped_averaging_does_not_count_in_a_schedule(how: str) -> None:
    mean = make(lambda n: 1 / (n + 1.0), update_period=2)
    threes = {**GOOD, "w": jnp.full((2, 2), 3.0)}
    onlines = [BAD["nan"], GOOD, BAD["nan"], BAD["nan"], BAD["nan"], threes]
    got = RUNS[how](mean, onlines)
    assert (got.step, got.skipped) == (6, 1)  # the averagings are on updates 2, 4 and 6
    np.testing.assert_array_equal(got.params["w"], np.full((2, 2), 2))


def test_without_the_setting_nothing_is_skipped() -> None:
    target = EMATarget(MIXED, 0.5).update(BAD["nan"])
    assert target.skipped == 0
    assert np.isnan(target.params["w"]).any()


def test_an_update_is_one_compiled_call_that_nobody_waits_for(trace_counter: Any) -> None:
    target = make(jnp.float32(0.5))
    with trace_counter() as compiled:
        target.update(GOOD)
    assert len(compiled) == 1
    with jax.transfer_guard("disallow"), trace_counter() as compiled:
        target.update(BAD["nan"]).update(GOOD)
    assert not compiled
    assert isinstance(target.skipped, jax.Array)  # the host has not read it


def test_a_target_that_was_placed_compiles_once(trace_counter: Any) -> None:
    placements = (jax.devices()[0], NamedSharding(jax.make_mesh((1,), ("d",)), PartitionSpec("d")))
    for size, placement in enumerate(placements, 7):
        params = jax.device_put({"w": jnp.ones(size)}, placement)
        target = EMATarget(params, 0.5, skip_nonfinite=True)
        restored = through_bytes(target, target)
        with trace_counter() as compiled:
            for _ in range(3):
                target.update(params)
                restored.update(params)
        assert len(compiled) == 1


def test_no_nan_reaches_a_derivative() -> None:
    def after(s: jax.Array, bad: float, compensated: bool) -> jax.Array:
        target = EMATarget({"w": jnp.ones(2)}, s, skip_nonfinite=True, compensated=compensated)
        return jnp.sum(target.update({"w": jnp.array([1, bad])}).params["w"])

    for compensated in (False, True):
        for bad in (np.nan, np.inf):
            assert jax.grad(after)(0.3, bad, compensated) == 0
        assert jax.grad(after)(0.3, 5.0, compensated) == 4


def test_each_member_of_a_population_decides_for_itself() -> None:
    starts, onlines = {"w": jnp.zeros((2, 3))}, {"w": jnp.array([[1, 1, 1], [1, jnp.nan, 1]])}
    targets = jax.vmap(lambda p: EMATarget(p, 0.5, skip_nonfinite=True))(starts)
    targets = jax.vmap(lambda t, p: t.update(p))(targets, onlines)
    np.testing.assert_array_equal(targets.skipped, [0, 1])
    np.testing.assert_array_equal(targets.params["w"], [[0.5] * 3, [0] * 3])
    restored = through_bytes(targets, targets)
    np.testing.assert_array_equal(restored.skipped, [0, 1])


def test_sync_copies_nonfinite_values() -> None:
    target = make().sync(BAD["nan"])
    assert_same(target.params, BAD["nan"])
    assert target.skipped == 0


def test_the_count_is_saved_and_shown() -> None:
    target = make().update(BAD["nan"]).update(GOOD)
    assert repr(target).startswith("EMATarget(step=2, skipped=1, step_size=0.5, ")
    assert "skipped" not in repr(EMATarget(MIXED, 0.5))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(target)]
    assert paths[-2:] == [".step", ".skipped"]
    state = serialization.to_state_dict(target)
    assert list(state) == ["step", "params", "skipped"]
    assert type(state["skipped"]) is int
    restored = through_bytes(target, make())
    assert restored.update(BAD["nan"]).skipped == 2
    with pytest.raises(ValueError, match=r"\./skipped: unexpected"):
        serialization.from_state_dict(EMATarget(MIXED, 0.5), state)
    for wrong in (-1, 0.5, None):
        with pytest.raises(ValueError, match=r"\./skipped: expected"):
            serialization.from_state_dict(make(), {**state, "skipped": wrong})


def test_the_count_stops_at_the_largest_integer() -> None:
    state = {**serialization.to_state_dict(make()), "skipped": 2**31 - 1}
    template = make(lambda n: jnp.where(n == 0, 0.5, 1.0))  # n is never negative
    target = serialization.from_state_dict(template, state)
    assert target.update(BAD["nan"]).skipped == 2**31 - 1
    assert target.update(GOOD).params["w"][0, 0] == 0.5


@pytest.mark.parametrize("compensated", [False, True])
def test_an_average_that_would_overflow_is_skipped(compensated: bool) -> None:
    """What counts is what the slow copy would hold."""
    settings = {"accumulator_dtype": jnp.float16, "skip_nonfinite": True, "compensated": compensated}
    target = EMATarget({"w": jnp.ones(3), "b": jnp.zeros(2)}, 0.5, **settings)
    before = bits(target.params)
    target.update({"w": jnp.array([1e6, 0.0, 1.0]), "b": jnp.ones(2)})
    assert (target.skipped, bits(target.params)) == (1, before)
    target.update({"w": jnp.array([6e4, 0.0, 1.0]), "b": jnp.ones(2)})
    assert target.skipped == 1
    np.testing.assert_allclose(target.params["w"], [30000, 0.5, 1], rtol=1e-3)
    # The average of a large value may still fit.
    small = EMATarget({"w": jnp.ones(2)}, 1e-3, **settings).update({"w": jnp.full(2, 1e6)})
    assert small.skipped == 0
    np.testing.assert_allclose(small.params["w"], np.full(2, 1001), rtol=1e-3)


def test_a_copied_value_that_would_overflow_is_skipped() -> None:
    with jax.enable_x64(True):
        target = EMATarget({"w": jnp.ones(2, jnp.float32)}, 0.5, mask=False, skip_nonfinite=True)
        target.update({"w": jnp.array([1e300, 0.0])})
        assert target.skipped == 1
        np.testing.assert_array_equal(target.params["w"], np.ones(2))


@pytest.mark.parametrize("accumulator", ["float16", "float8_e5m2", "float8_e4m3fn"])
def test_an_integer_that_overflows_is_skipped(accumulator: str) -> None:
    target = EMATarget({"w": jnp.ones(2)}, 0.5, accumulator_dtype=accumulator, skip_nonfinite=True)
    target.update({"w": jnp.array([2**20, 1])})
    assert target.skipped == 1
    np.testing.assert_array_equal(target.params["w"], np.ones(2))


@pytest.mark.parametrize(
    ("settings", "step_size"),
    [
        ({}, 0.01),
        ({}, 0.8),
        ({}, harmonic),
        (EVERYTHING, jnp.float32(0.01)),
        ({"compensated": True}, 0.8),
        ({"accumulator_dtype": "bfloat16"}, harmonic),
    ],
)
def test_a_skipped_averaging_changes_no_bit(settings: Any, step_size: Any) -> None:
    rng = np.random.default_rng(0)

    def draw() -> Any:
        numbers = {"w": jnp.asarray(rng.standard_normal(2000), jnp.bfloat16), "tiny": jnp.full(2, 1e-40)}
        return numbers | {"n": jnp.asarray(rng.integers(99)), "key": jax.random.key(rng.integers(99))}

    target = EMATarget(draw(), step_size, **settings | {"skip_nonfinite": True})
    for _ in range(5):
        target.update(draw())
    before = arrays(target.__copy__())
    names = [path[0].name for path, _ in jax.tree.leaves_with_path(target)]
    target.update({**draw(), "w": jnp.full(2000, jnp.nan)})
    for name, x, y in zip(names, before, arrays(target), strict=True):
        assert name in ("step", "skipped") or x.tobytes() == y.tobytes()
    assert target.skipped == 1
