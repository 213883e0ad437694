"""Updates are lowered for platforms that are not here, on one device and over an abstract mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.targets import MAKERS
from helpers.trees import MIXED
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

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
