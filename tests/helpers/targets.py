"""Targets of both classes with every setting, and the ways to update, copy and restore them."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from helpers.trees import stack

from target_nets import EMATarget, PeriodicTarget, apply_updates, incremental_update, periodic_update

INT32_MAX = 2**31 - 1


def harmonic(n: jax.Array) -> jax.Array:
    """A schedule that shows its argument: 1/2, 1/3, 1/4, ..."""
    return 1 / (jnp.asarray(n, jnp.float32) + 2)


EVERYTHING = {"accumulator_dtype": jnp.bfloat16, "compensated": True, "skip_nonfinite": True}


def make_makers(
    step_size: float = 0.5, period: int = 2, mask: Any = None, donate: bool = False
) -> dict[str, Callable[[Any], Any]]:
    """Returns functions that make a target of parameters, by the class and the setting they show."""
    ema = partial(EMATarget, mask=mask, donate=donate)
    return {
        "ema": lambda params: ema(params, step_size),
        "ema, array": lambda params: ema(params, jnp.float32(step_size)),
        "ema, schedule": lambda params: ema(params, harmonic),
        "ema, period": lambda params: ema(params, step_size, update_period=period),
        "ema, compensated": lambda params: ema(params, step_size, compensated=True),
        "ema, skipping": lambda params: ema(params, step_size, skip_nonfinite=True),
        "ema, everything": lambda params: ema(params, harmonic, **EVERYTHING),
        "periodic": lambda params: PeriodicTarget(params, period, donate=donate),
    }


MAKERS: dict[str, Callable[[Any], Any]] = make_makers() | {
    f"{name}, donate": make_makers(donate=True)[name] for name in ("ema", "ema, everything", "periodic")
}


def update(target: Any, online: Any) -> Any:
    return target.update(online)


def sync(target: Any, online: Any) -> Any:
    return target.sync(online)


jitted_update = jax.jit(update)
jitted_sync = jax.jit(sync)
UPDATES: dict[str, Callable[[Any, Any], Any]] = {"eager": update, "jit": jitted_update}


# The rules, each of a new and an old tree.
RULES: dict[str, Callable[[Any, Any], Any]] = {
    "incremental_update": lambda new, old: incremental_update(new, old, 0.5),
    "periodic_update": lambda new, old: periodic_update(new, old, 4, 2),
    "periodic_update, not due": lambda new, old: periodic_update(new, old, 1, 2),
    "periodic_update, jax": lambda new, old: periodic_update(new, old, jnp.int32(4), 2),
    "apply_updates": lambda new, old: apply_updates(old, new),
}


def update_eagerly(target: Any, onlines: list[Any]) -> Any:
    for online in onlines:
        target.update(online)
    return target


def update_in_jit(target: Any, onlines: list[Any]) -> Any:
    for online in onlines:
        target = jitted_update(target, online)
    return target


@jax.jit
def scan_updates(target: Any, batch: Any) -> Any:
    return jax.lax.scan(lambda t, online: (t.update(online), None), target, batch)[0]


# Each takes a target and the online parameters of a run, and returns the target after the run.
RUNS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "eager": update_eagerly,
    "jit": update_in_jit,
    "scan": lambda target, onlines: scan_updates(target, stack(onlines)),
}


def through_bytes(target: Any, template: Any) -> Any:
    """Saves a target and restores it into a template."""
    return serialization.from_bytes(template, serialization.to_bytes(target))


# Copies that share no buffer with the target.
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda target: pickle.loads(pickle.dumps(target)),
    "bytes": lambda target: through_bytes(target, target),
}


def at_step(target: Any, step: int) -> Any:
    """Returns the same target with another count of updates."""
    leaves, treedef = jax.tree.flatten_with_path(target)
    values = [np.array(step, np.int32) if path[0].name == "step" else x for path, x in leaves]
    return treedef.unflatten(values)
