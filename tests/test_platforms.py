"""Updates are lowered for platforms that are not here, on one device and over an abstract mesh."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.targets import MAKERS
from helpers.trees import MIXED
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from target_nets import EMATarget

PLATFORMS = ["cuda", "rocm", "tpu"]


def step(target: Any, online: Any) -> Any:
    lag = target.distance(online)
    return target.update(online), target.updated(online), lag, target.params


def sync(target: Any, online: Any) -> Any:
    return target.sync(online)


@pytest.mark.parametrize("kind", MAKERS)
def test_one_device(kind: str) -> None:
    target = MAKERS[kind](MIXED)
    for function in (step, sync):
        exported = export.export(jax.jit(function), platforms=PLATFORMS)(target, MIXED)
        assert exported.platforms == tuple(PLATFORMS)
    donated = export.export(jax.jit(sync, donate_argnums=0), platforms=["cuda"])(target, MIXED)
    assert "tf.aliasing_output" in donated.mlir_module() or "jax.buffer_donor" in donated.mlir_module()


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_mesh(kind: str, axes: AxisType) -> None:
    mesh = AbstractMesh((4,), ("x",), (axes,))

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec("x") if x.ndim else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = {"w": jnp.zeros((8, 4)), "half": jnp.zeros(8, jnp.bfloat16), "n": jnp.zeros(4, int)}
    target, online = (jax.tree.map(abstract, tree) for tree in (MAKERS[kind](params), params))
    for function in (step, sync):
        exported = export.export(jax.jit(function), platforms=PLATFORMS)(target, online)
        assert exported.nr_devices == 4


def test_links_between_shardings_take_no_channels() -> None:
    """Programs of any length lower, beside callbacks and collectives, to the same text in every process.

    jax has 65,535 channels for the callbacks and collectives of a program.
    """
    if jax.device_count() == 1:
        pytest.skip("runs in the process of test_sharding.py::test_on_virtual_devices")
    mesh = jax.make_mesh((jax.device_count(),), ("x",), (AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    params = {name: jax.device_put(jnp.zeros(8), rows) for name in "ab"}
    target = EMATarget(params, 0.5, compensated=True)

    def train(target: Any, params: Any) -> Any:
        total = partial(jax.lax.psum, axis_name="x")
        for _ in range(3):
            target.update(params)
            jax.debug.callback(lambda x: None, params["a"])
            params["b"] += jax.shard_map(
                total, mesh=mesh, in_specs=rows.spec, out_specs=PartitionSpec()
            )(params["a"])[0]
        return target

    def lower() -> tuple[list[int], list[int]]:
        text = jax.jit(lambda *args: train(*args)).lower(target, params).as_text()
        groups = re.findall(r"sdy.sharding_group .* group_id=(\d+)", text)
        channels = re.findall(r"channel_handle<handle = (\d+)", text)
        return list(map(int, groups)), list(map(int, channels))

    groups, channels = lower()
    links = 3 * 2 * 2  # the value and the error of two arrays, in three updates
    assert sorted(groups) == sorted(2 * list(range(2**32, 2**32 + links)))
    assert max(channels) <= 3
    assert lower() == (groups, channels)
    compiled = jax.jit(train).lower(target, params).compile()
    assert compiled.output_shardings.params["a"] == rows
