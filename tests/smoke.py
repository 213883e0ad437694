"""A program for a fresh environment with the package and its dependencies alone.

    python -I -W error tests/smoke.py [lowest-direct]

With the argument it checks that those are the oldest versions that the package allows.
"""

import platform
import sys
from importlib import metadata, resources

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization

import target_nets
from target_nets import EMATarget, PeriodicTarget, schedules

assert target_nets.__version__ == metadata.version("target_nets")
assert (resources.files(target_nets) / "py.typed").is_file()
if "lowest-direct" in sys.argv:
    oldest = {f"{name}>={metadata.version(name)}" for name in ("jax", "flax")}
    assert oldest <= set(metadata.requires("target_nets") or ()), oldest

params = {"w": jnp.zeros(3), "h": jnp.zeros(2, jnp.bfloat16), "n": jnp.int32(0)}
online = {"w": jnp.ones(3), "h": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(1)}

# Eager updates with every setting, and a checkpoint.
target = EMATarget(params, 0.25, compensated=True, skip_nonfinite=True, donate=True)
target.update(online).update({**online, "w": jnp.full(3, jnp.nan)})
assert (target.step, target.skipped) == (2, 1)
np.testing.assert_array_equal(target.params["w"], np.full(3, 0.25))
fresh = EMATarget(params, 0.25, compensated=True, skip_nonfinite=True)
assert serialization.from_bytes(fresh, serialization.to_bytes(target)).distance(target.params) == 0


# A schedule and a periodic copy in jit and scan; step sizes in vmap.
@jax.jit
def train(targets):
    def step(targets, _):
        return [target.update(online) for target in targets], targets[0].distance(online)

    return jax.lax.scan(step, targets, length=3)


(mean, copy), distances = train([EMATarget(params, schedules.uniform()), PeriodicTarget(params, 2)])
assert (mean.step, copy.step, distances.shape) == (3, 3, (3,))
np.testing.assert_array_equal(mean.params["w"], copy.params["w"])
sweep = jax.vmap(lambda s: EMATarget(params, s).update(online))(jnp.array([0.0, 0.5, 1.0]))
np.testing.assert_array_equal(sweep.params["w"][:, 0], [0, 0.5, 1])


# An attribute of an nnx.Module.
class Agent(nnx.Module):
    def __init__(self, rngs):
        self.network = nnx.Linear(2, 2, rngs=rngs)
        self.target = EMATarget(nnx.state(self.network), 0.5)


agent = Agent(nnx.Rngs(0))
nnx.jit(lambda agent: agent.target.sync(nnx.state(agent.network)) and None)(agent)
assert agent.target.distance(nnx.state(agent.network)) == 0
saved = serialization.to_bytes(agent.target)
assert serialization.from_bytes(Agent(nnx.Rngs(1)).target, saved).distance(agent.target.params) == 0

names = ("target_nets", "jax", "flax", "numpy", "attrs")
print(f"Python {platform.python_version()}:", *(f"{name} {metadata.version(name)}" for name in names))
