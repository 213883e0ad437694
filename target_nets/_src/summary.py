"""The one line that `repr` gives of a target."""

import math

import jax
import numpy as np
from jax.core import Tracer

from target_nets._src.leaves import describe
from target_nets._src.state import Settings, State


def summarize(name: str, settings: Settings, state: State) -> str:
    """Returns class, step, settings, and the number of arrays, parameters and bytes."""
    rule, names = settings.rule, settings.child_names
    parts: dict[str, object] = {"step": state.step}
    if "skipped" in names:
        parts["skipped"] = state.skipped
    if rule.averaged is not False:
        parts["step_size"] = state.step_size if "step_size" in names else rule.step_size
    parts["update_period"] = settings.update_period
    if isinstance(rule.averaged, tuple):
        parts["averaged"] = f"{sum(rule.averaged)} of {len(rule.averaged)}"
    switches = {"compensated": "compensation" in names, "donate": settings.donate}
    parts |= {switch: True for switch, is_on in switches.items() if is_on}
    params, errors = jax.tree.leaves(state.params), jax.tree.leaves(state.compensation)
    both = [*params, *errors]
    if all(hasattr(x, "shape") and hasattr(x, "dtype") for x in both):  # jax and nnx pass stand-ins, too
        parts["arrays"] = len(params)
        parts["parameters"] = sum(math.prod(x.shape) for x in params)
        parts["bytes"] = sum(math.prod(x.shape) * x.dtype.itemsize for x in both)
    return f"{name}({', '.join(f'{key}={_brief(value)}' for key, value in parts.items())})"


def _brief(value: object) -> str:
    if isinstance(value, Tracer):
        return "traced"
    if isinstance(value, jax.Array) and value.is_deleted():
        return "deleted"
    if isinstance(value, jax.Array | np.ndarray):
        return _brief(value.item()) if value.size == 1 else describe(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return getattr(value, "__qualname__", None) or str(value)
