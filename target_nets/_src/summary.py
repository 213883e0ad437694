"""The one-line repr of a target."""

import math

import jax
import numpy as np
from jax.core import Tracer

from target_nets._src.leaves import describe
from target_nets._src.state import State


def summarize(name: str, state: State) -> str:
    """Returns class, step, settings, and the number of arrays, parameters and bytes."""
    settings = state.settings
    averaged, step_size = settings.plan.averaged, settings.plan.step_size
    population = list(np.shape(state.step))
    parts: dict[str, object] = {"population": population} if population else {}
    parts["step"] = state.step
    if settings.skip_nonfinite:
        parts["skipped"] = state.skipped
    if averaged is not False:
        parts["step_size"] = state.step_size if settings.step_size_is_array else step_size
    parts["update_period"] = settings.update_period
    if isinstance(averaged, tuple):
        parts["averaged"] = f"{sum(averaged)} of {len(averaged)}"
    parts |= {switch: True for switch in ("compensated", "donate") if getattr(settings, switch)}
    params, errors = jax.tree.leaves(state.params), jax.tree.leaves(state.compensation)
    arrays = [*params, *errors]
    # While jax or nnx rebuild a tree, its leaves may be placeholders without a shape.
    if all(hasattr(x, "shape") and hasattr(x, "dtype") for x in arrays):
        parts["arrays"] = len(params)
        parts["parameters"] = sum(math.prod(x.shape) for x in params) // math.prod(population)
        parts["bytes"] = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
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
