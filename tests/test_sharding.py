"""The slow copy stays where it was put, wherever the online parameters are, on virtual devices."""

import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from helpers.comparisons import assert_same
from helpers.processes import cpu_environment, run_program
from helpers.targets import UPDATES, harmonic, make_makers
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from target_nets import EMATarget, PeriodicTarget

DEVICES = 4
ONE_DEVICE = jax.device_count() < DEVICES
on_devices = pytest.mark.skipif(ONE_DEVICE, reason="runs in the process of test_on_virtual_devices")

VALUES = {
    "w": np.linspace(-1, 1, 64, dtype=np.float32).reshape(16, 4),
    "half": np.linspace(-1, 1, 16, dtype=jnp.bfloat16),
    "n": np.arange(8, dtype=np.int32),
}
ZEROS = jax.tree.map(np.zeros_like, VALUES)
SHARDED, REPLICATED = P("x"), P(None)
LAYOUTS = {  # of the online parameters and of the slow copy
    "both sharded": (SHARDED, SHARDED, "device"),
    "slow copy sharded": (REPLICATED, SHARDED, "device"),
    "slow copy replicated": (SHARDED, REPLICATED, "device"),
    "both sharded, slow copy on the host": (SHARDED, SHARDED, "pinned_host"),
    "slow copy sharded, on the host": (REPLICATED, SHARDED, "pinned_host"),
}
each_mesh = pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
each_layout_and_mesh = pytest.mark.parametrize(
    ("layout", "axes"),
    [
        *((layout, AxisType.Auto) for layout in LAYOUTS),
        ("slow copy replicated", AxisType.Explicit),
        ("slow copy sharded, on the host", AxisType.Explicit),
    ],
)
SHARDED_KINDS = ("ema", "ema, all settings", "ema, period", "periodic")


def make(kind: str, params: Any, donate: bool = False) -> Any:
    if kind != "ema, all settings":
        return make_makers(step_size=0.3, donate=donate)[kind](params)
    mask = {"w": True, "half": False, "n": True}
    settings = {"mask": mask, "compensated": True, "skip_nonfinite": True}
    return EMATarget(params, harmonic, donate=donate, **settings)


@pytest.mark.skipif(not ONE_DEVICE, reason="runs in the outer process alone")
def test_on_virtual_devices() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = cpu_environment(DEVICES)
    assert "IN_OUTER_PROCESS" not in os.environ, "this process should have more devices"
    environment |= {"IN_OUTER_PROCESS": "no"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    assert int(passed[1]) > 50


FIRST_IMPORTED_IN_JIT = """
import jax, jax.numpy as jnp
def first(x):
    from target_nets import EMATarget
    return EMATarget(x, 0.5).update(x).params
jax.jit(first)(jnp.ones(2))
from target_nets import EMATarget
here, there = jax.devices()
target = EMATarget({"w": jax.device_put(jnp.zeros(4), here)}, 0.5, donate=True)
before = target.params["w"]
target.update({"w": jax.device_put(jnp.ones(4), there)})
assert before.is_deleted()
assert target.params["w"].devices() == {here}
"""


@pytest.mark.skipif(not ONE_DEVICE, reason="runs in the outer process alone")
def test_a_first_import_and_use_inside_jit_disables_nothing() -> None:
    run_program(FIRST_IMPORTED_IN_JIT, devices=2)


def mesh_of(axes: AxisType, devices: int = DEVICES) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("x",), (axes,), devices=jax.devices()[:devices])


def put(tree: Any, mesh: Any, spec: P, memory: str = "device") -> Any:
    return jax.device_put(tree, NamedSharding(mesh, spec, memory_kind=memory))


def assert_placed(target: Any, like: Any) -> None:
    for x, y in zip(jax.tree.leaves(target.params), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert x.sharding.memory_kind == y.sharding.memory_kind


def collectives(function: Any, *args: Any) -> set[str]:
    text = jax.jit(function).lower(*args).compile().as_text()
    return set(re.findall(r"all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter", text))


@on_devices
@each_mesh
@pytest.mark.parametrize(
    ("kind", "method", "layout"),
    [
        *(("ema, all settings", "update", layout) for layout in LAYOUTS),
        ("periodic", "sync", "slow copy replicated"),
        ("periodic", "sync", "slow copy sharded, on the host"),
    ],
)
def test_the_slow_copy_stays_and_is_right(axes: AxisType, layout: str, kind: str, method: str) -> None:
    online_spec, slow_spec, memory = LAYOUTS[layout]
    mesh = mesh_of(axes)
    online, start = put(VALUES, mesh, online_spec), put(ZEROS, mesh, slow_spec, memory)

    def move(target: Any, online: Any) -> Any:
        return getattr(target, method)(online)

    expected = move(move(make(kind, ZEROS), VALUES), VALUES).params
    calls = [(move, False), (jax.jit(move, donate_argnums=0), False)]
    if layout in ("slow copy replicated", "slow copy sharded, on the host"):
        calls.append((move, True))
    for call, donate in calls:
        target = make(kind, start, donate)
        assert_placed(target, start)
        for _ in range(2):
            target = call(target, online)
        assert_same(jax.device_get(target.params), jax.device_get(expected))
        assert_placed(target, start)


@on_devices
def test_numpy_arrays_may_be_changed_after_an_update() -> None:
    size = 1 << 22
    for place in (SHARDED, REPLICATED):
        target = EMATarget(put({"w": np.zeros(size, np.float32)}, mesh_of(AxisType.Auto), place), 1.0)
        for _ in range(3):
            memory = np.ones(size + 64, np.float32)
            offset = -memory.ctypes.data % 64 // 4
            online = memory[offset : offset + size]  # aligned, so that jax could use it as it is
            target.update({"w": online})
            online[:] = 7
            np.testing.assert_array_equal(target.params["w"], np.ones(size))


@on_devices
@each_mesh
@pytest.mark.parametrize("kind", ["ema, all settings", "ema, period", "periodic"])
def test_a_target_that_jit_closes_over_stays_where_it_is(kind: str, axes: AxisType) -> None:
    mesh = mesh_of(axes)
    start = put(ZEROS, mesh, SHARDED)
    for online in (put(VALUES, mesh, place) for place in (SHARDED, REPLICATED)):
        for donate in (False, True):
            target = make(kind, start, donate)
            for _ in range(2):  # an averaging is due in one of them
                with jax.set_mesh(mesh):  # jax asks for it where all that is left are constants
                    new = jax.jit(lambda x, target=target: target.updated(x))(online)
                assert_placed(new, start)
                target.update(online)
                assert_same(jax.device_get(new.params), jax.device_get(target.params))


@on_devices
@each_mesh
def test_an_eager_update_of_other_shardings_is_one_compiled_call(
    axes: AxisType, trace_counter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    online, slow = (put(VALUES, mesh_of(axes), place) for place in (REPLICATED, SHARDED))
    target = EMATarget(slow, 0.5)
    moved: list[Any] = []
    device_put = jax.device_put

    def recording_device_put(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, jax.core.Tracer):
            moved.append(x)  # between two shardings it goes through the host, and waits for it
        return device_put(x, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", recording_device_put)
    with trace_counter() as compiled:
        target.update(online)
    assert len(compiled) == 1
    assert not moved
    assert_placed(target, slow)


@on_devices
@pytest.mark.parametrize("kind", ["ema, all settings", "ema, period", "periodic"])
def test_arrays_of_equal_shapes_stay_where_each_of_them_is(kind: str) -> None:
    mesh = mesh_of(AxisType.Auto)  # on Explicit axes the sharding is part of an array's type
    weights = {name: np.linspace(-1, 1, 16, dtype=np.float32) for name in ("w", "half", "n")}
    place = {"w": SHARDED, "half": REPLICATED, "n": SHARDED}
    mixed = {name: put(x, mesh, place[name]) for name, x in weights.items()}
    starts = mixed, put(weights, mesh, SHARDED), put(weights, mesh, REPLICATED)

    @jax.jit
    def train(targets: Any, online: Any) -> Any:
        online = jax.tree.map(lambda x: 2 * x, online)  # XLA chooses where these are
        return [target.update(online) for target in targets]

    for online in starts:
        targets = [make(kind, start) for start in starts]
        for _ in range(2):
            targets = train(targets, online)
        for target, start in zip(targets, starts, strict=True):
            assert_placed(target, start)
            assert_same(jax.device_get(target.params), jax.device_get(targets[0].params))


@on_devices
@each_mesh
def test_a_compensation_from_inside_jit_is_sharded_as_the_slow_copy_is(axes: AxisType) -> None:
    start = put(ZEROS["w"], mesh_of(axes), SHARDED)
    target = jax.jit(lambda params: EMATarget(params, 0.3, compensated=True))(start)
    assert serialization.to_state_dict(target)["compensation"].sharding.is_equivalent_to(
        start.sharding, 2
    )
    assert collectives(lambda t, p: t.update(p), target, start) == set()


@on_devices
@each_mesh
def test_shards_are_rounded_stochastically_as_the_whole_array_is(axes: AxisType) -> None:
    def run(online: Any, update: Any) -> Any:
        start = jax.tree.map(jnp.zeros_like, online)
        target = EMATarget(start, 0.01, accumulator_dtype="bfloat16", update_period=2)
        for _ in range(4):
            target = update(target, online)
        return target

    online = {"w": VALUES["w"]}
    expected = jax.device_get(run(jax.tree.map(jnp.asarray, online), UPDATES["eager"]).params)
    placed = put(online, mesh_of(axes), SHARDED)
    for update in UPDATES.values():
        target = run(placed, update)
        assert_same(jax.device_get(target.params), expected)
        assert_placed(target, placed)
    assert collectives(lambda t, p: t.update(p), target, placed) == set()


@on_devices
def test_the_compiled_program_is_the_same_whatever_was_traced_before() -> None:
    start = put(ZEROS, mesh_of(AxisType.Auto), SHARDED)

    def text() -> str:
        return jax.jit(lambda t, p: t.update(p)).lower(EMATarget(start, 0.3), start).as_text()

    first = text()
    assert text() == first


@on_devices
@pytest.mark.parametrize("method", ["update", "sync"])
@each_mesh
def test_online_parameters_on_the_same_devices_in_another_order(axes: AxisType, method: str) -> None:
    back = jax.make_mesh((DEVICES,), ("x",), (axes,), devices=jax.devices()[DEVICES - 1 :: -1])
    start = put(ZEROS, mesh_of(axes), SHARDED)
    target = getattr(EMATarget(start, 0.3), method)(put(VALUES, back, SHARDED))
    assert_placed(target, start)
    expected = getattr(EMATarget(ZEROS, 0.3), method)(VALUES).params
    assert_same(jax.device_get(target.params), jax.device_get(expected))


@on_devices
def test_a_mesh_of_explicit_and_auto_axes() -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Explicit, AxisType.Auto))
    start = {"w": put(ZEROS["w"], mesh, P())}
    online = {"w": put(VALUES["w"], mesh, P("x", "y"))}
    for update in (lambda t, p: t.update(p), jax.jit(lambda t, p: t.update(p))):
        assert_placed(update(EMATarget(start, 0.3), online), start)


@on_devices
@pytest.mark.parametrize("compiled", [jax.jit, lambda function: function])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_replicated_population_and_sharded_parameters(axis: int, compiled: Any) -> None:
    mesh = mesh_of(AxisType.Auto)
    population = jax.vmap(lambda s: EMATarget(ZEROS["w"], s))(jnp.arange(4.0) / 4)
    axes = jax.tree.map(lambda x: axis if x.ndim > 1 else 0, population)
    population = put(jax.tree.map(lambda x, axis: jnp.moveaxis(x, 0, axis), population, axes), mesh, P())
    update = compiled(jax.vmap(lambda t, p: t.update(p), in_axes=(axes, None), out_axes=axes))
    assert_placed(update(population, put(VALUES["w"], mesh, SHARDED)), population.params)


@on_devices
@each_mesh
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "copy replicated" not in name])
def test_matching_or_replicated_online_parameters_need_no_communication(
    axes: AxisType, layout: str
) -> None:
    online_spec, slow_spec, memory = LAYOUTS[layout]
    mesh = mesh_of(axes)
    online, start = put(VALUES, mesh, online_spec), put(ZEROS, mesh, slow_spec, memory)
    for target in (EMATarget(start, 0.3, compensated=True), PeriodicTarget(start, 1)):
        assert collectives(lambda t, p: t.update(p), target, online) == set()
        assert collectives(lambda t, p: t.sync(p), target, online) == set()
    # A sharded online side and a replicated slow copy need some, so the search above can find it.
    target = EMATarget(put(ZEROS, mesh, REPLICATED), 0.3)
    if axes == AxisType.Explicit:
        assert collectives(lambda t, p: t.update(p), target, put(VALUES, mesh, SHARDED))


@on_devices
def test_each_device_holds_one_shard_of_the_slow_copy() -> None:
    mesh = mesh_of(AxisType.Auto)
    online = put({"w": np.ones((64, 64), np.float32)}, mesh, REPLICATED)
    target = EMATarget(put(online, mesh, SHARDED), 0.3).update(online)
    shards = target.params["w"].addressable_shards
    assert [shard.data.nbytes for shard in shards] == [64 * 64 * 4 // DEVICES] * DEVICES


@on_devices
@each_layout_and_mesh
def test_a_checkpoint_is_restored_where_the_template_is(axes: AxisType, layout: str) -> None:
    online_spec, slow_spec, memory = LAYOUTS[layout]
    mesh = mesh_of(axes)
    kind = "ema, all settings"
    target = make(kind, ZEROS).update(VALUES)
    saved = serialization.to_bytes(target)
    start = put(ZEROS, mesh, slow_spec, memory)
    for restored in (
        serialization.from_bytes(make(kind, start), saved),
        serialization.from_state_dict(make(kind, start), serialization.to_state_dict(target)),
    ):
        assert_placed(restored, start)
        restored.update(put(VALUES, mesh, online_spec))
        assert_placed(restored, start)
        assert serialization.to_bytes(restored) == serialization.to_bytes(
            serialization.from_bytes(make(kind, ZEROS), saved).update(VALUES)
        )


@on_devices
def test_a_slow_copy_on_one_device_and_online_parameters_on_a_mesh() -> None:
    mesh = mesh_of(AxisType.Auto)
    device = SingleDeviceSharding(jax.devices()[3])
    online = put(VALUES, mesh, SHARDED)
    for kind in SHARDED_KINDS:
        start = jax.device_put(ZEROS, device)
        target = make(kind, start).update(online).update(online)
        assert_placed(target, start)
        assert_same(
            jax.device_get(target.params),
            jax.device_get(make(kind, ZEROS).update(VALUES).update(VALUES).params),
        )
    with pytest.raises(ValueError, match="incompatible devices"):  # jit refuses them in its own words
        jax.jit(lambda t, p: t.update(p))(EMATarget(jax.device_put(ZEROS, device), 0.3), online)


@on_devices
@each_mesh
def test_a_population_over_devices(axes: AxisType) -> None:
    mesh = mesh_of(axes)
    sharding = NamedSharding(mesh, P("x"))
    step_sizes = jnp.linspace(0, 1, DEVICES)
    population = jax.vmap(lambda s: EMATarget(ZEROS, s))(step_sizes)
    expected = jax.vmap(lambda t: t.update(VALUES))(population)
    got = jax.device_put(population, sharding)
    got = jax.jit(jax.vmap(lambda t: t.update(VALUES)))(got)
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in jax.tree.leaves(got))
    assert_same(jax.device_get(got), jax.device_get(expected))


@on_devices
@pytest.mark.parametrize("kind", ["ema", "ema, period", "periodic"])
def test_inside_shard_map(kind: str) -> None:
    mesh = mesh_of(AxisType.Auto)
    online, start = (put({"w": tree["w"]}, mesh, SHARDED) for tree in (VALUES, ZEROS))
    target = make(kind, start)
    specs = jax.tree.map(lambda x: P("x") if np.ndim(x) else P(), target)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P("x")), out_specs=specs)
    def update(target: Any, online: Any) -> Any:
        return target.update(online)

    for _ in range(2):
        target = update(target, online)
    expected = make(kind, ZEROS).update(VALUES).update(VALUES).params
    assert_same(jax.device_get(target.params["w"]), jax.device_get(expected["w"]))


@on_devices
@each_mesh
def test_in_a_scan_and_a_gradient(axes: AxisType) -> None:
    mesh = mesh_of(axes)
    online, start = ({"w": put(tree["w"], mesh, SHARDED)} for tree in (VALUES, ZEROS))

    @jax.jit
    def train(target: Any, online: Any) -> Any:
        return jax.lax.scan(lambda t, _: (t.update(online), t.distance(online)), target, length=5)

    target, distances = train(EMATarget(start, 0.3), online)
    assert_placed(target, start)
    alone, expected = train(EMATarget({"w": ZEROS["w"]}, 0.3), {"w": VALUES["w"]})
    assert_same(jax.device_get(target.params), jax.device_get(alone.params))
    np.testing.assert_allclose(distances, expected, rtol=1e-6)

    def loss(online: Any, target: Any) -> Any:
        target = jax.tree.map(jnp.copy, target)  # a target made here may be updated here
        return jnp.sum(target.update(online).params["w"] ** 2)

    gradients = jax.jit(jax.grad(loss))(online, EMATarget(start, 0.25))
    np.testing.assert_allclose(gradients["w"], 2 * 0.25**2 * VALUES["w"], rtol=1e-6)


@on_devices
@each_layout_and_mesh
def test_distances_and_casts_of_sharded_arrays(axes: AxisType, layout: str) -> None:
    online_spec, slow_spec, memory = LAYOUTS[layout]
    mesh = mesh_of(axes)
    online, start = put(VALUES, mesh, online_spec), put(ZEROS, mesh, slow_spec, memory)
    target = EMATarget(start, 0.3)
    expected = EMATarget(ZEROS, 0.3).distance(VALUES)
    np.testing.assert_allclose(target.distance(online), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda t, p: t.distance(p))(target, online), expected, rtol=1e-6)
    assert target.params["half"].dtype == jnp.bfloat16  # held in float32, and cast where it is placed
    assert_placed(target, start)


@on_devices
def test_sizes_that_do_not_divide_are_refused_before_anything_moves() -> None:
    mesh = mesh_of(AxisType.Auto)
    with pytest.raises(ValueError, match="dimension size is 9"):
        EMATarget(put({"w": np.ones(9, np.float32)}, mesh, SHARDED), 0.3)


@on_devices
def test_links_between_shardings_take_no_channels() -> None:
    """Programs of any length lower, beside callbacks and collectives, to the same text in every process.

    jax has 65,535 channels for the callbacks and collectives of a program.
    """
    mesh = mesh_of(AxisType.Auto)
    rows = NamedSharding(mesh, SHARDED)
    params = {name: jax.device_put(jnp.zeros(8), rows) for name in "ab"}
    target = EMATarget(params, 0.5, compensated=True)

    def train(target: Any, params: Any) -> Any:
        total = partial(jax.lax.psum, axis_name="x")
        for _ in range(3):
            target.update(params)
            jax.debug.callback(lambda x: None, params["a"])
            params["b"] += jax.shard_map(total, mesh=mesh, in_specs=rows.spec, out_specs=P())(
                params["a"]
            )[0]
        return target

    def lower() -> tuple[list[int], list[int]]:
        text = jax.jit(lambda *args: train(*args)).lower(target, params).as_text()
        groups = re.findall(r"sdy.sharding_group .* group_id=(\d+)", text)
        channels = re.findall(r"channel_handle<handle = (\d+)", text)
        return list(map(int, groups)), list(map(int, channels))

    groups, channels = lower()
    links = 3 * 2  # two arrays, in three updates
    assert sorted(groups) == sorted(2 * list(range(2**32, 2**32 + links)))
    assert max(channels) <= 3
    assert lower() == (groups, channels)
    compiled = jax.jit(train).lower(target, params).compile()
    assert compiled.output_shardings.params["a"] == rows


@on_devices
@pytest.mark.parametrize("kind", ["ema", "ema, donate", "periodic"])
def test_devices_are_asked_of_the_arrays(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a slow copy on the CPU beside a single GPU, which is the only device jax counts then."""
    here, there, *_ = jax.devices()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    target = make_makers(period=1)[kind.removesuffix(", donate")](jax.device_put(ZEROS, here))
    online = jax.device_put(VALUES, there)
    for change in (target.update, target.sync):
        change(online)
        assert all(x.devices() == {here} for x in jax.tree.leaves(target.params))
    np.testing.assert_allclose(target.distance(online), 0)
