"""What jax may take away: the undocumented names that the package uses are missed, not needed."""

import subprocess
import sys

import pytest
from helpers.processes import cpu_environment

# Imports of these modules by the package fail, as if jax had removed them.
WITHOUT = """
import builtins, warnings
names = ("jax.extend", "jax.interpreters", "jax._src", "jax.experimental")
original = builtins.__import__

def refuse(name, globals=None, *args, **kwargs):
    if (globals or {}).get("__name__", "").startswith("target_nets") and name.startswith(names):
        raise ImportError(name)
    return original(name, globals, *args, **kwargs)

builtins.__import__ = refuse
warnings.simplefilter("error")
"""

ONE_DEVICE = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx, serialization
import target_nets
from target_nets import EMATarget, PeriodicTarget, schedules

zeros, ones = {"w": jnp.zeros(3), "b": jnp.zeros(2, jnp.bfloat16)}, {"w": jnp.ones(3), "b": jnp.ones(2)}
assert target_nets.incremental_update(ones, zeros, 0.5)["w"][0] == 0.5
assert target_nets.periodic_update(ones, zeros, 2, 2)["w"][0] == 1
assert target_nets.apply_updates(zeros, ones)["w"][0] == 1

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    EMATarget(zeros, 0.5)
    PeriodicTarget(zeros, 2)
assert [w.category for w in caught] == [RuntimeWarning], caught
assert "which transformation is running" in str(caught[0].message)

everything = dict(compensated=True, skip_nonfinite=True)
for make in (
    lambda: EMATarget(zeros, 0.5),
    lambda: EMATarget(zeros, schedules.uniform(), donate=True, **everything),
    lambda: PeriodicTarget(zeros, 2, donate=True),
):
    eager, jitted, scanned, pure, stacked = (make() for _ in range(5))
    step = jax.jit(lambda target, online: target.update(online))
    for _ in range(4):
        eager.update(ones)
        jitted = step(jitted, ones)
        pure = jax.jit(lambda target: target.updated(ones))(pure)
    scanned, _ = jax.lax.scan(lambda target, _: (target.update(ones), None), scanned, length=4)
    restored = serialization.from_bytes(make(), serialization.to_bytes(eager))
    for other in (jitted, scanned, pure, restored):
        assert other.step == 4
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), other.params, eager.params))
    assert eager.distance(ones) == jax.jit(lambda target: target.distance(ones))(eager)
    population = jax.vmap(lambda _: make())(jnp.arange(3))
    population = jax.vmap(lambda target: target.update(ones))(population)
    assert (population.step == 1).all()

class Agent(nnx.Module):
    def __init__(self):
        self.network = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.target = EMATarget(self.network, 0.5)

agent = Agent()
nnx.jit(lambda agent: agent.target.update(agent.network) and None)(agent)
assert agent.target.step == 1

# What is lost: the update of a target that was made outside of the function is not refused.
target = EMATarget(zeros, 0.5)
jax.jit(lambda: target.update(ones).step)()
"""

FOUR_DEVICES = """
import jax, jax.numpy as jnp
warnings.simplefilter("ignore")
from target_nets import EMATarget
from jax.sharding import AxisType, NamedSharding, PartitionSpec

for axes in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((4,), ("x",), (axes,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    zeros, ones = (jax.device_put({"w": f((8, 4))}, rows) for f in (jnp.zeros, jnp.ones))
    target = EMATarget(zeros, 0.5).update(ones)
    assert target.params["w"].sharding.is_equivalent_to(rows, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            target = jax.jit(lambda target, online: target.update(online))(target, ones)
    assert (jax.device_get(target.params["w"]) == 0.875).all()
    messages = [str(w.message) for w in caught]
    assert len(messages) == (axes == AxisType.Auto), messages
    assert all("cannot link shardings" in message for message in messages)
"""


@pytest.mark.parametrize(("program", "devices"), [(ONE_DEVICE, 1), (FOUR_DEVICES, 4)])
def test_without_them(program: str, devices: int) -> None:
    command = [sys.executable, "-c", WITHOUT + program]
    run = subprocess.run(
        command, env=cpu_environment(devices), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
