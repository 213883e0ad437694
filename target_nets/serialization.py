"""Checkpoints: how `flax.serialization` saves and restores a target, and how `jax.export` writes one.

Importing the package registers both classes. Then `to_state_dict`, `from_state_dict`, `to_bytes` and
`from_bytes` of flax take a target, alone or anywhere inside a state such as a `TrainState`. `jax.export`
serializes functions that take or return a target, with its settings. It cannot write a schedule that is
not of this package, nor the nnx objects that a target was made from.

The state dict holds what changes during training, `{"step": int, "params": nested dict}`. The counters
of a population, which `vmap` has batched, are arrays. With `skip_nonfinite` it also holds `skipped`, an
integer. With `compensated` it also holds `compensation`, a nested dict like `params`. `params` is the
slow copy in its storage dtypes. PRNG keys are saved as their key data. To load the slow copy into a
model, save `to_state_dict(target.params)`. Settings are not saved: the restored target has the class,
settings, dtypes and shardings of the target that it is restored into.

A state dict that does not fit raises a ValueError. Bytes that cannot be decoded raise an error of
msgpack or flax before the target is read: a ValueError or, for a damaged array, a TypeError, IndexError
or KeyError. A flipped bit among the values of an array is not noticed; that takes a checksum.

Example:
  >>> import jax.numpy as jnp
  >>> from flax import serialization
  >>> from target_nets import EMATarget
  >>> target = EMATarget({"w": jnp.zeros(2)}, step_size=0.5).update({"w": jnp.ones(2)})
  >>> saved = serialization.to_bytes(target)
  >>> fresh = EMATarget({"w": jnp.zeros(2)}, step_size=0.5)
  >>> serialization.from_bytes(fresh, saved)
  EMATarget(step=1, step_size=0.5, update_period=1, arrays=1, parameters=2, bytes=8)
"""

from flax import serialization

from target_nets import schedules
from target_nets._src.export import register_export
from target_nets._src.state_dict import from_state_dict, to_state_dict
from target_nets.targets import EMATarget, PeriodicTarget

__all__: list[str] = []  # importing the module registers the classes, and that is all it does

_SCHEDULES = {
    schedule.__name__: schedule
    for schedule in map(vars(schedules).get, schedules.__all__)
    if isinstance(schedule, type)
}

for _class in (EMATarget, PeriodicTarget):
    serialization.register_serialization_state(_class, to_state_dict, from_state_dict)
    register_export(_class, _SCHEDULES)
