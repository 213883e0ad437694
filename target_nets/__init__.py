"""Target networks for JAX: slow copies of a model's parameters.

`EMATarget` holds a moving average of the online parameters. `PeriodicTarget` holds a copy of them that
is renewed every `update_period` updates. `incremental_update` and `periodic_update` are the same rules
as pure functions, and `apply_updates` adds updates to parameters, all with optax's names. `update`
changes a target in place and `updated` returns a new one. A target is a pytree, and flax.serialization
saves it.

Example:
  >>> import jax.numpy as jnp
  >>> from target_nets import EMATarget
  >>> params = {"w": jnp.zeros(2)}
  >>> target = EMATarget(params, step_size=0.5)
  >>> for _ in range(3):
  ...     params = {"w": params["w"] + 1.0}  # your gradient step
  ...     target.update(params)  # doctest: +ELLIPSIS
  EMATarget(step=1, ...)
  EMATarget(step=2, ...)
  EMATarget(step=3, ...)
  >>> target.params["w"]
  Array([2.125, 2.125], dtype=float32)
"""

from target_nets import posthoc, schedules
from target_nets import serialization as serialization  # registers the classes with flax.serialization
from target_nets.rules import apply_updates, incremental_update, periodic_update
from target_nets.targets import EMATarget, PeriodicTarget

__version__ = "0.2.0"

__all__ = [
    "EMATarget",
    "PeriodicTarget",
    "apply_updates",
    "incremental_update",
    "periodic_update",
    "posthoc",
    "schedules",
]
