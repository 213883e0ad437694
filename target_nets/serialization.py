"""Checkpoints: how `flax.serialization` saves and restores a target.

Importing the package registers both classes. Then `to_state_dict`, `from_state_dict`, `to_bytes` and
`from_bytes` of flax take a target, alone or anywhere inside a state such as a `TrainState`.

The state dict is `{"step": int, "params": nested dict}`: what changes while training. With
`skip_nonfinite` it also holds `skipped`, an integer. With `compensated` it also holds `compensation`,
nested as `params` is. `params` is the slow copy in the dtypes that it is stored in, with PRNG keys as
their data. `to_state_dict(target.params)` is what loads into a model. Settings are code and are not
saved: class, settings, dtypes and shardings are those of the target that is restored into.

A state dict that does not fit raises a ValueError. Bytes that cannot be decoded raise an error before
the target is looked at: msgpack's ValueError or, where an array is damaged, whatever flax's decoder runs
into (TypeError, IndexError, KeyError). Neither notices a flipped bit among an array's values; only a
checksum would.

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

from target_nets._src.state_dict import from_state_dict, to_state_dict
from target_nets.targets import EMATarget, PeriodicTarget

__all__: list[str] = []  # importing this module is all there is to do

serialization.register_serialization_state(EMATarget, to_state_dict, from_state_dict)
serialization.register_serialization_state(PeriodicTarget, to_state_dict, from_state_dict)
