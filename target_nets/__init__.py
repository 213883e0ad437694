"""Target networks for JAX: slow copies of a model's parameters."""

from target_nets import serialization  # registers the classes with flax.serialization
from target_nets.rules import apply_updates, incremental_update, periodic_update
from target_nets.targets import EMATarget, PeriodicTarget

__version__ = "0.1.0"

__all__ = [
    "EMATarget",
    "PeriodicTarget",
    "apply_updates",
    "incremental_update",
    "periodic_update",
    "serialization",
]
