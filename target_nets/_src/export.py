"""How `jax.export` writes a target that an exported function takes or returns.

jax writes the arrays. Here are the settings, as JSON: nothing that is read back can run code.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import attrs
import jax.numpy as jnp
from jax import export

from target_nets._src.state import Plan, Schedule, Settings
from target_nets._src.target import Target


def register_export(
    target_class: type[Target[Any]], schedules: Mapping[str, Callable[..., Schedule]]
) -> None:
    """Registers a class with `jax.export`.

    Args:
      target_class: The class of the targets.
      schedules: The schedules that can be written, by name: attrs classes with JSON values.
    """
    name = target_class.__name__
    export.register_pytree_node_serialization(
        target_class,
        serialized_name=f"target_nets.{name}",
        serialize_auxdata=partial(_to_bytes, name, schedules),
        deserialize_auxdata=partial(_from_bytes, schedules),
    )


def _to_bytes(name: str, schedules: Mapping[str, Callable[..., Schedule]], settings: Settings) -> bytes:
    if settings.nnx_objects:
        raise ValueError(
            f"{name}: jax.export cannot write the nnx objects that the target was made from; make the "
            "target from nnx.to_pure_dict(nnx.state(model)), and update it with the model as before"
        )

    def write(step_size: Any) -> Any:
        if not callable(step_size):
            return step_size
        kind = type(step_size).__name__
        if schedules.get(kind) is not type(step_size):
            raise ValueError(
                f"{name}: jax.export cannot write the step size {step_size!r}; use a number, an array, "
                "or one of target_nets.schedules"
            )
        arguments = attrs.asdict(step_size, recurse=False)
        return {"schedule": kind, "arguments": {key: write(x) for key, x in arguments.items()}}

    step_size = write(settings.plan.step_size)
    written = attrs.asdict(settings, recurse=False) | {
        "plan": settings.plan._asdict() | {"step_size": step_size},
        "param_dtypes": settings.param_dtypes
        and [None if dtype is None else str(dtype) for dtype in settings.param_dtypes],
    }
    return json.dumps(written).encode()


def _from_bytes(schedules: Mapping[str, Callable[..., Schedule]], written: bytes) -> Settings:
    fields = json.loads(written)

    def read(step_size: Any) -> Any:
        if not isinstance(step_size, dict):
            return step_size
        arguments = {key: read(x) for key, x in step_size["arguments"].items()}
        return schedules[step_size["schedule"]](**arguments)

    plan = Plan(**fields["plan"])
    averaged, step_size = plan.averaged, read(plan.step_size)
    dtypes = fields["param_dtypes"]
    return Settings(
        **fields
        | {
            "plan": plan._replace(
                averaged=tuple(averaged) if isinstance(averaged, list) else averaged, step_size=step_size
            ),
            "pairs": tuple(fields["pairs"]),
            "param_dtypes": dtypes
            and tuple(None if dtype is None else jnp.dtype(dtype) for dtype in dtypes),
            "nnx_objects": (),
        }
    )
