"""`update`, `sync` and `distance` with each setting, compared with plain NumPy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from helpers.comparisons import arrays, assert_close, assert_equal_values, assert_same
from helpers.compilations import count_compilations
from helpers.targets import INT32_MAX, MAKERS, UPDATES, at_step, harmonic, scan_updates
from helpers.trees import ONLINE, START, perturb
from jax.sharding import NamedSharding, PartitionSpec

from target_nets import (
    EMATarget,
    PeriodicTarget,
    apply_updates,
    incremental_update,
    periodic_update,
    schedules,
)

PARAMS = {"w": np.zeros((2, 3), np.float32), "b": np.ones(3, np.float32)}


def online(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {name: rng.normal(size=x.shape).astype(np.float32) for name, x in PARAMS.items()}


def averaged(step_sizes: list[float], start: Any = PARAMS) -> dict[str, np.ndarray]:
    """Returns the average of `online(0), online(1), ...` in float64."""
    slow = {name: x.astype(np.float64) for name, x in start.items()}
    for step, step_size in enumerate(step_sizes):
        slow = {name: x + step_size * (online(step)[name] - x) for name, x in slow.items()}
    return slow


@pytest.mark.parametrize(
    "step_size", [0, 0.005, 0.3, 1, np.float32(0.25), np.float64(0.25), np.array(0.25)]
)
def test_a_number_as_step_size(step_size: Any) -> None:
    target = EMATarget(PARAMS, step_size)
    for step in range(5):
        assert target.update(online(step)) is target
    assert_close(target.params, averaged([float(step_size)] * 5))
    assert target.step == 5


@pytest.mark.parametrize("step_size", [0.3, jnp.float32(0.3), optax.constant_schedule(0.3)])
@pytest.mark.parametrize(("period", "donate"), [(1, False), (2, False), (1, True)])
def test_eager_jitted_and_scanned_updates_are_equal_bit_for_bit(
    step_size: Any, period: int, donate: bool
) -> None:
    eager = EMATarget(PARAMS, step_size, update_period=period, donate=donate)
    jitted, scanned = (EMATarget(PARAMS, step_size, update_period=period) for _ in range(2))
    for step in range(5):
        eager.update(online(step))
        jitted = UPDATES["jit"](jitted, online(step))
    batch = jax.tree.map(lambda *xs: np.stack(xs), *(online(step) for step in range(5)))
    scanned = scan_updates(scanned, batch)
    assert_same(eager.params, jitted.params)
    assert_same(eager.params, scanned.params)
    assert eager.step == jitted.step == scanned.step == 5


def test_a_schedule_is_called_with_the_number_of_averagings_before() -> None:
    target = EMATarget(PARAMS, lambda n: 1.0 / (n + 1))
    every_third = EMATarget(PARAMS, lambda n: 1.0 / (n + 1), update_period=3)
    for step in range(6):
        target.update(online(step))
        every_third.update(online(step))
    mean = jax.tree.map(lambda *xs: np.mean(xs, 0), *(online(step) for step in range(6)))
    assert_close(target.params, mean)
    assert_close(every_third.params, jax.tree.map(lambda x, y: (x + y) / 2, online(2), online(5)))


def test_schedules_of_optax() -> None:
    schedule = optax.join_schedules(
        [optax.constant_schedule(1.0), optax.linear_schedule(0.5, 0, 2)], [2]
    )
    target = EMATarget(PARAMS, schedule)
    for step in range(5):
        target.update(online(step))
    assert_close(target.params, averaged([1, 1, 0.5, 0.25, 0]))


def test_a_schedule_and_a_number_compile_once(trace_counter: Any) -> None:
    calls = []

    def schedule(n: jax.Array) -> jax.Array:
        calls.append(n)
        assert isinstance(n, jax.core.Tracer)
        return 1.0 / (n + 1)

    params = {"w": jnp.ones(19)}
    with trace_counter() as compiled:
        for target in (EMATarget(params, schedule), EMATarget(params, schedule)):
            for _ in range(3):
                target.update(params)
    assert len(calls) == len(compiled) == 1
    with trace_counter() as compiled:
        for step_size in (0.5, np.float32(0.5), 0.5, 1, 1.0):
            EMATarget(params, step_size).update(params)
    assert len(compiled) == 2  # a number is part of the program


def test_reading_161_bfloat16_arrays_is_one_compiled_call(trace_counter: Any) -> None:
    target = EMATarget([jnp.ones(3, jnp.bfloat16)] * 161, 0.5)
    with trace_counter() as compiled:
        _ = target.params
        assert len(compiled) == 1
        assert {x.dtype for x in target.params} == {jnp.dtype(jnp.bfloat16)}
    assert len(compiled) == 1
    plain = EMATarget([jnp.ones(3)] * 2, 0.5)
    assert plain.params[0] is plain.params[0]  # no cast, no call


def test_between_periods_nothing_starts_on_the_device(trace_counter: Any) -> None:
    for target in (
        PeriodicTarget(PARAMS, 100),
        EMATarget(PARAMS, lambda n: 0.5 + 0 * n, update_period=100),
    ):
        before = target.params
        with trace_counter() as compiled, jax.transfer_guard("disallow"):
            for step in range(5):
                target.update(online(step))
        assert not compiled
        assert all(x is y for x, y in zip(target.params.values(), before.values(), strict=True))
        assert target.step == 5


def test_update_period() -> None:
    target = EMATarget(PARAMS, 0.5, update_period=3)
    for step in range(7):
        target.update(online(step))
    slow = averaged([0, 0, 0.5, 0, 0, 0.5, 0])
    assert_close(target.params, slow)
    assert target.step == 7


@pytest.mark.parametrize("period", [1, 2, 3, 100])
def test_periodic_copies_on_every_multiple(period: int) -> None:
    for update in UPDATES.values():
        target = PeriodicTarget(PARAMS, period)
        for step in range(1, 8):
            target = update(target, online(step))
            latest = step - step % period
            assert_same(target.params, jax.tree.map(jnp.asarray, online(latest) if latest else PARAMS))
            assert target.step == step


def test_eager_and_jitted_updates_may_alternate() -> None:
    for make in (lambda: EMATarget(PARAMS, 0.3, update_period=2), lambda: PeriodicTarget(PARAMS, 2)):
        mixed, eager = make(), make()
        for step in range(7):
            mixed = UPDATES["jit" if step in (1, 4) else "eager"](mixed, online(step))
            eager.update(online(step))
        assert_same(mixed.params, eager.params)
        assert mixed.step == eager.step == 7


def test_sync_copies_now_and_keeps_the_step(tree: Any) -> None:
    for target in (EMATarget(tree, 0.5, mask=True), PeriodicTarget(tree, 100)):
        target.update(tree)
        assert target.sync(perturb(tree)) is target
        assert_same(target.params, jax.tree.map(jnp.asarray, perturb(tree)))
        assert target.step == 1


def test_every_tree_keeps_its_structure_and_dtypes(tree: Any) -> None:
    expected = jax.tree.map(jnp.asarray, tree)
    for target in (EMATarget(tree, 0.5), PeriodicTarget(tree, 1)):
        assert_same(target.params, expected)
        target.update(perturb(tree))
        once = target.params
        assert jax.tree.structure(once) == jax.tree.structure(expected)
        for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(expected), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert_same(UPDATES["jit"](target, perturb(tree)).update(perturb(tree)).step, jnp.int32(3))
        assert_same(target.params, once)  # jit updated a copy


def test_mask() -> None:
    for mask in ({"w": True, "b": False}, lambda params: {name: name == "w" for name in params}):
        target = EMATarget(PARAMS, 0.5, mask=mask)
        target.update(online(0)).update(online(1))
        assert_close(target.params["w"], averaged([0.5, 0.5])["w"])
        np.testing.assert_array_equal(target.params["b"], online(1)["b"])
    prefix = EMATarget({"net": PARAMS, "stats": PARAMS}, 0.5, mask={"net": True, "stats": False})
    prefix.update({"net": online(0), "stats": online(0)})
    assert_close(prefix.params["net"], averaged([0.5]))
    assert_same(prefix.params["stats"], jax.tree.map(jnp.asarray, online(0)))


def test_mask_of_batch_statistics_in_nnx() -> None:
    def parameters_only(state: nnx.State) -> nnx.State:
        return jax.tree.map(
            lambda x: isinstance(x, nnx.Param), state, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )

    state = nnx.state(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    target = EMATarget(state, 0.5, mask=parameters_only).update(perturb(state))
    np.testing.assert_array_equal(target.params["scale"][...], [1.5, 1.5])
    np.testing.assert_array_equal(target.params["mean"][...], [1, 1])


def test_small_floats_are_held_in_float32_and_read_in_their_own_dtype() -> None:
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float16), "n": jnp.int32(3)}
    target = EMATarget(params, 0.25)
    held = {x.dtype.name for x in jax.tree.leaves(target) if x.ndim}
    assert held == {"float32"}
    target.update(perturb(params))
    assert_same(
        target.params,
        {"a": jnp.full(2, 1.25, jnp.bfloat16), "b": jnp.full(2, 1.25, jnp.float16), "n": jnp.int32(4)},
    )
    copied = EMATarget(params, 0.25, mask={"a": False, "b": True, "n": True})
    assert copied.params["a"].dtype == jnp.bfloat16
    assert [x.dtype.name for x in jax.tree.leaves(copied)][:2] == ["bfloat16", "float32"]


@pytest.mark.parametrize("accumulator", [jnp.bfloat16, "float16", np.float32])
def test_accumulator_dtype(accumulator: Any) -> None:
    params = {"w": jnp.ones(2), "z": jnp.ones(2, jnp.complex64), "n": jnp.arange(2)}
    target = EMATarget(params, 0.5, accumulator_dtype=accumulator)
    held = [x.dtype for x in jax.tree.leaves(target)][:3]
    assert held == [jnp.int32, jnp.dtype(accumulator), jnp.complex64]
    target.update(perturb(params))
    assert_same(target.params, {"w": params["w"] + 0.5, "z": params["z"] + 0.5, "n": params["n"] + 1})


def test_float64_accumulator_under_x64() -> None:
    with jax.enable_x64(True):
        target = EMATarget({"w": jnp.ones(2, jnp.float32)}, 1e-9, accumulator_dtype=jnp.float64)
        target.update({"w": jnp.full(2, 2.0, jnp.float32)})
        assert target.params["w"].dtype == jnp.float32
        np.testing.assert_allclose(jax.tree.leaves(target)[0], 1 + 1e-9, rtol=1e-15)
        complex_params = {"z": jnp.ones(2, jnp.complex64)}
        target = EMATarget(complex_params, 1e-9, accumulator_dtype=jnp.float64)
        target.update({"z": jnp.full(2, 2.0, jnp.complex64)})
        assert jax.tree.leaves(target)[0].dtype == jnp.complex128
        assert_same(target.params, complex_params)
        np.testing.assert_allclose(jax.tree.leaves(target)[0], 1 + 1e-9, rtol=1e-15)
    with pytest.raises(ValueError, match="accumulator_dtype: float64 needs jax_enable_x64"):
        EMATarget(PARAMS, 0.1, accumulator_dtype=np.float64)


def test_online_parameters_of_another_precision() -> None:
    target = EMATarget({"w": jnp.zeros(2)}, 0.5).update({"w": jnp.ones(2, jnp.bfloat16)})
    assert_same(target.params, {"w": jnp.full(2, 0.5)})
    target = EMATarget({"w": jnp.zeros(2, jnp.bfloat16)}, 0.5).update({"w": np.ones(2)})
    assert_same(target.params, {"w": jnp.full(2, 0.5, jnp.bfloat16)})


def test_distance_is_the_global_norm_over_inexact_leaves() -> None:
    params = {
        "w": jnp.zeros(2),
        "z": jnp.zeros(1, jnp.complex64),
        "n": jnp.int32(0),
        "h": jnp.zeros(1, "bfloat16"),
    }
    target = EMATarget(params, 0.5)
    there = {
        "w": jnp.array([1.0, 2.0]),
        "z": jnp.array([3 + 4j]),
        "n": jnp.int32(9),
        "h": jnp.array([2.0]),
    }
    distance = target.distance(there)
    assert (distance.shape, distance.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(distance, np.sqrt(1 + 4 + 25 + 4), rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(lambda t, p: t.distance(p))(target, there), distance)
    assert EMATarget({}, 0.5).distance({}) == 0


@pytest.mark.parametrize("period", [1, 2, 3, 1000, INT32_MAX - 1, INT32_MAX])
@pytest.mark.parametrize("how", UPDATES)
def test_the_step_goes_back_by_a_period_after_the_last_multiple_in_int32(period: int, how: str) -> None:
    update = UPDATES[how]
    last = INT32_MAX // period * period
    for make in (
        lambda: EMATarget(PARAMS, 1.0, update_period=period),
        lambda: PeriodicTarget(PARAMS, period),
    ):
        target = update(at_step(make(), last - 1), online(0))
        assert target.step == last
        assert target.step.dtype == jnp.int32
        assert_same(target.params, jax.tree.map(jnp.asarray, online(0)))
        target = update(target, online(1))
        assert target.step == last + 1 - period
        due = period == 1  # otherwise this update is between periods
        assert_same(target.params, jax.tree.map(jnp.asarray, online(1) if due else online(0)))
        assert_same(update(at_step(target, last), online(2)).step, target.step)
        if period < last:  # the next multiple comes a period later
            assert_same(
                update(at_step(target, last - 1), online(3)).params, jax.tree.map(jnp.asarray, online(3))
            )


@pytest.mark.parametrize("how", UPDATES)
def test_a_schedule_keeps_its_last_value_past_int32(how: str) -> None:
    target = EMATarget(PARAMS, lambda n: jnp.where(n == INT32_MAX - 1, 0.5, 0.0))
    target = at_step(target, INT32_MAX - 1)
    for step in range(3):
        target = UPDATES[how](target, online(step))
    assert_close(target.params, averaged([0.5] * 3))


def test_the_step_stays_on_the_host_until_jit() -> None:
    target = EMATarget(PARAMS, 0.1).update(online(0))
    assert type(target.step) is np.ndarray
    assert (target.step.shape, target.step.dtype) == ((), np.int32)
    with pytest.raises(ValueError, match="read-only"):
        target.step[...] = 7
    target = jax.jit(lambda t: t)(target)
    assert isinstance(target.step, jax.Array)
    assert target.step.dtype == jnp.int32


def test_changing_a_container_that_was_read_leaves_the_target() -> None:
    target = EMATarget({"net": {"w": jnp.zeros(2)}}, 0.5)
    target.params["net"]["w"] = "changed"
    target.params.clear()
    assert_same(target.params, {"net": {"w": jnp.zeros(2)}})


def test_donation_reuses_memory_and_gives_the_same_result() -> None:
    params = {"w": jnp.zeros(1024), "h": jnp.zeros(1024, jnp.bfloat16)}
    plain, donated = EMATarget(params, 0.5), EMATarget(params, 0.5, donate=True)
    for method in ("update", "sync", "update"):
        earlier = plain.params
        expected = arrays(earlier)
        memory = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(donated)[:2]]
        getattr(plain, method)(perturb(params))
        getattr(donated, method)(perturb(params))
        assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(donated)[:2]] == memory
        assert_same(donated.params, plain.params)
        assert_equal_values(arrays(earlier), expected)  # what was read before can still be read
    periodic = PeriodicTarget(params, 2, donate=True)
    first = periodic.params["w"]
    assert not periodic.update(params).params["w"].is_deleted()
    periodic.update(params)
    assert first.is_deleted()


def test_inside_a_transformation_donate_has_no_effect() -> None:
    target = EMATarget({"w": jnp.zeros(4)}, 0.5, donate=True)
    for transform in (jax.jit, lambda f: jax.vmap(f, in_axes=(None, 0)), jax.checkpoint):
        online_params = {"w": jnp.ones((2, 4) if transform not in (jax.jit, jax.checkpoint) else 4)}
        transform(lambda t, p: t.update(p))(target, online_params)
        assert_same(target.params, {"w": jnp.zeros(4)})
    target = jax.jit(lambda t, p: t.update(p), donate_argnums=0)(target, {"w": jnp.ones(4)})
    assert_same(target.params, {"w": jnp.full(4, 0.5)})


def test_the_gradient_of_distance_is_zero_where_the_distance_is() -> None:
    target = EMATarget({"w": jnp.ones(2)}, 0.5)
    np.testing.assert_array_equal(jax.grad(target.distance)({"w": jnp.ones(2)})["w"], [0, 0])
    np.testing.assert_allclose(jax.grad(target.distance)({"w": jnp.array([4.0, 5.0])})["w"], [0.6, 0.8])


@pytest.mark.parametrize(
    "exponent", [-124, -90, -76, -60, -36, -35, -34, -33, -32, 0, 30, 48, 60, 64, 100, 126]
)
def test_distance_and_its_gradient_over_the_whole_range(exponent: int) -> None:
    scale = np.float32(2.0**exponent)
    values = {"w": scale * np.array([3, -1, 0, 0.5], np.float32), "b": scale * np.ones(3, np.float32)}
    there = jax.tree.map(jnp.asarray, values)
    flat = np.concatenate([x.astype(np.float64) for x in values.values()])
    for target in (EMATarget(jax.tree.map(np.zeros_like, values), 0.5),):
        for distance in (target.distance, jax.jit(target.distance)):
            np.testing.assert_allclose(distance(there), np.linalg.norm(flat), rtol=1e-6)
        gradients = jax.grad(target.distance)(there)
        for name, x in values.items():
            expected = x.astype(np.float64) / np.linalg.norm(flat)
            np.testing.assert_allclose(gradients[name], expected, rtol=1e-6)
    tangents = jax.tree.map(jnp.ones_like, there)
    _, tangent = jax.jvp(target.distance, (there,), (tangents,))
    np.testing.assert_allclose(tangent, np.sum(flat) / np.linalg.norm(flat), rtol=1e-6)
    sweep = jax.vmap(target.distance)(jax.tree.map(lambda x: jnp.stack([x, 0 * x]), there))
    np.testing.assert_allclose(sweep, [np.linalg.norm(flat), 0], rtol=1e-6)


def test_distances_that_are_not_finite() -> None:
    target = EMATarget({"w": jnp.zeros(3)}, 0.5)
    assert target.distance({"w": jnp.array([1.0, np.inf, 0.0])}) == np.inf
    assert np.isnan(target.distance({"w": jnp.array([1.0, np.nan, 0.0])}))
    assert np.isnan(target.distance({"w": jnp.array([np.inf, np.nan, 0.0])}))


def test_abstract_targets_have_abstract_parameters() -> None:
    abstract = jax.eval_shape(lambda: EMATarget({"w": jnp.ones(2, jnp.bfloat16)}, 0.5))
    assert (abstract.params["w"].shape, abstract.params["w"].dtype) == ((2,), jnp.bfloat16)


def test_narrow_integers_are_averaged_in_floats() -> None:
    target = EMATarget({"w": jnp.ones(2)}, 0.5)
    assert_same(target.update({"w": jnp.full(2, 3, jnp.int4)}).params, {"w": jnp.full(2, 2.0)})


@pytest.mark.parametrize("number", [3.0, 3, True, np.float64(3), np.full((), 3.0), np.int64(3)])
def test_numbers_as_leaves_with_and_without_jit(number: Any) -> None:
    def results() -> list[Any]:
        slow, online_params = {"w": jnp.zeros(())}, {"w": number}
        return [
            EMATarget(slow, 0.5).update(online_params).params,
            EMATarget(slow, 0.5, compensated=True, skip_nonfinite=True).update(online_params).params,
            PeriodicTarget(slow, 1).update(online_params).sync(online_params).params,
            EMATarget(slow, 0.5).distance(online_params),
            incremental_update(online_params, slow, 0.5),
            incremental_update(slow, {"w": 3.0}, 0.5),
            periodic_update(online_params, slow, jnp.int32(2), 2),
            apply_updates(slow, online_params),
            apply_updates({"w": 3.0}, online_params),
        ]

    compiled = results()
    with jax.disable_jit():
        assert_same(results(), compiled)


# A user's train step is compiled once


@pytest.mark.parametrize("kind", ["ema, array", "ema, everything", "periodic"])
@pytest.mark.parametrize("place", ["nowhere", "device", "mesh"])
def test_a_jitted_train_step_compiles_once(place: str, kind: str) -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    places = {
        "nowhere": jnp.asarray,
        "device": partial(jax.device_put, device=jax.devices()[0]),
        "mesh": partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec())),
    }
    start, there = (jax.tree.map(places[place], tree) for tree in (START, ONLINE))

    @jax.jit
    def train(params: Any, target: Any) -> Any:
        params = jax.tree.map(lambda x: x * 0.5, params)
        return params, target.update(params)

    target = MAKERS[kind](start)
    with count_compilations() as messages:
        params, target = train(there, target)
        for _ in range(3):
            params, target = train(params, target)
    assert sum("jit(train)" in message for message in messages) == 1
    assert target.update(params).step == 5  # eager updates go on
    assert isinstance(target.step, np.ndarray)
    with count_compilations() as messages:
        train(params, target)
    assert not messages


# The step size may be read and assigned


@pytest.mark.parametrize(
    "given",
    [0.25, 1, harmonic, schedules.uniform(), jnp.float32(0.25)],
    ids=["float", "int", "function", "schedule", "array"],
)
def test_the_step_size_reads_as_it_was_given_and_can_be_assigned(given: Any) -> None:
    assert EMATarget(START, given).step_size == given
    for first in (0.5, harmonic, jnp.float32(0.5)):
        target, expected = EMATarget(START, first), EMATarget(START, given)
        target.step_size = given
        assert target.step_size == given
        assert_same(target, expected)  # treedef and leaves
        for apply in UPDATES.values():
            target, expected = apply(target, ONLINE), apply(expected, ONLINE)
        assert_same(target, expected)


def test_an_assigned_array_compiles_nothing() -> None:
    """As a number that changes at each call does in SBX, which lets users assign tau."""
    for kind in ("eager", "jit"):
        for place in (lambda x: x, partial(jax.device_put, device=jax.devices()[0])):
            target = EMATarget(place(START), jnp.float32(0.1))
            expected = np.zeros(3)
            for n, rate in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, 0.6)):
                with count_compilations() as messages:
                    target.step_size = [jnp.float32(rate), np.array(rate, np.float32), jnp.array(rate)][
                        n % 3
                    ]
                    target = UPDATES[kind](target, ONLINE)
                assert n < 3 or not messages  # each kind of scalar is copied by a program of its own
                expected += rate * (1 - expected)
            np.testing.assert_allclose(target.params["w"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("refused", "error", "message"),
    [
        (1.5, ValueError, "step_size: expected a number in .0, 1., got 1.5"),
        ("0.5", TypeError, "step_size: expected a real scalar, got str"),
        (jnp.ones(2), ValueError, "step_size: expected a scalar, got shape"),
        (None, TypeError, "step_size: expected a real scalar, got None"),
    ],
    ids=str,
)
def test_a_refused_step_size_changes_nothing(refused: Any, error: Any, message: str) -> None:
    target = EMATarget(START, 0.5)
    with pytest.raises(error, match=message):
        target.step_size = refused
    assert target.step_size == 0.5
    assert_same(target, EMATarget(START, 0.5))


def test_the_step_size_inside_of_transformations() -> None:
    target = EMATarget(START, jnp.float32(0.5))

    def assign(target: EMATarget[Any], rate: Any) -> EMATarget[Any]:
        target.step_size = rate
        return target.update(ONLINE)

    with pytest.raises(RuntimeError, match=r"EMATarget\.step_size: this target was made outside"):
        jax.jit(lambda rate: assign(target, rate))(0.25)
    assert target.step_size == 0.5
    moved = jax.jit(assign)(target, jnp.float32(0.25))
    assert (moved.step_size, moved.params["w"][0], target.step_size) == (0.25, 0.25, 0.5)
    swept = jax.vmap(assign, in_axes=(None, 0))(target, jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(swept.params["w"][:, 0], [0.0, 0.5, 1.0])


def test_the_step_size_of_a_population() -> None:
    population = jax.vmap(lambda s: EMATarget(START, s))(jnp.array([0.1, 0.2]))
    for assigned in (population.step_size * 5, np.array([0.5, 1.0], np.float32)):
        population.step_size = assigned
        moved = jax.vmap(lambda target: target.updated(ONLINE))(population)
        np.testing.assert_allclose(moved.params["w"][:, 0], [0.5, 1.0])
    for refused in (jnp.float32(0.5), jnp.ones(3)):
        with pytest.raises(ValueError, match=r"expected shape \[2\], as this population has, got shape"):
            population.step_size = refused


def test_a_periodic_target_has_no_step_size() -> None:
    with pytest.raises(AttributeError):
        PeriodicTarget(START, 2).step_size = 0.5  # type: ignore[attr-defined]


# What the next averaging will use


@pytest.mark.parametrize("period", [1, 3])
def test_the_next_step_size_is_the_one_that_is_used(period: int) -> None:
    bad = {"w": jnp.full(3, np.nan)}
    for step_size in (0.25, jnp.float32(0.25), harmonic, schedules.inverse_power(), 1):
        target = EMATarget(START, step_size, update_period=period, skip_nonfinite=True)
        for k in range(7):
            expected = target.next_step_size()
            assert expected.shape == ()
            jitted = jax.jit(lambda target: target.next_step_size())(target)
            np.testing.assert_allclose(jitted, expected, rtol=1e-7)
            before = target.params["w"]
            for _ in range(period):
                target.update(bad if k in (2, 3) else ONLINE)
            if k in (2, 3):
                assert target.next_step_size() == expected
            else:
                np.testing.assert_allclose(
                    target.params["w"], before + expected * (1 - before), rtol=1e-6
                )
        saved = serialization.to_bytes(target)
        fresh = EMATarget(START, step_size, update_period=period, skip_nonfinite=True)
        resumed = serialization.from_bytes(fresh, saved)
        assert resumed.next_step_size() == target.next_step_size()
        assert target.update_period == period


def test_the_next_step_size_of_a_population() -> None:
    population = jax.vmap(lambda s: EMATarget(START, s))(jnp.array([0.1, 2.0, np.nan]))
    np.testing.assert_allclose(population.next_step_size(), [0.1, 1.0, 0.0])
    scheduled = jax.vmap(lambda _: EMATarget(START, harmonic))(jnp.arange(2))
    np.testing.assert_allclose(scheduled.next_step_size(), [0.5, 0.5])
    assert PeriodicTarget(START, 7).update_period == 7


def test_reading_the_next_step_size_compiles_once() -> None:
    target = EMATarget(START, schedules.uniform())
    target.next_step_size()
    with count_compilations() as messages:
        for _ in range(3):
            target.update(ONLINE).next_step_size()
    assert not any("step_size" in message for message in messages)


def test_repr_of_a_population_shows_the_parameters_of_one() -> None:
    population = jax.vmap(lambda s: EMATarget(START, s))(jnp.array([0.1, 0.2, 0.3]))
    assert "population=[3]" in repr(population)
    assert "parameters=3, bytes=36" in repr(population)
