"""The checks of arguments, and converters for attrs. They raise, or return what the package uses."""

import numbers
import operator
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from target_nets._src.dtypes import DType, Kind, is_enabled, kind_of
from target_nets._src.leaves import Leaf, array_type, describe

INT32_MAX = 2**31 - 1


def check_step_size(step_size: Leaf, shape: tuple[int, ...] = ()) -> float | jax.Array:
    """Returns a jax array unchanged, and any other step size as a float in [0, 1].

    The range of a jax array is not checked. A traced one has no value yet, and reading a concrete one
    would wait for the device. `arithmetic.clip_step_size` clips both.
    """
    if not _is_number(step_size, int | float):
        check_scalar("step_size", step_size, "a real scalar", Kind.INTEGER, Kind.FLOAT, shape=shape)
    if isinstance(step_size, jax.Array):
        return step_size
    if not 0 <= step_size <= 1:
        raise ValueError(f"step_size: expected a number in [0, 1], got {step_size}")
    return float(step_size)


def warn_of_decay(name: str, step_size: float) -> None:
    """Warns a user, three calls above, whose step size is most likely a decay."""
    if 0.9 <= step_size < 1:
        warnings.warn(
            f"{name}={step_size:.10g} copies almost all of the online parameters at once. A decay of "
            f"{step_size:.10g} is {name}={1 - step_size:.10g}; for a full copy use 1",
            UserWarning,
            stacklevel=4,
        )


def check_count(name: str, count: Leaf) -> int | jax.Array:
    """Returns an integer. Unless it is a jax array, it lies between 1 and 2**31-1."""
    count = check_integer(name, count)
    if isinstance(count, int) and not 1 <= count <= INT32_MAX:
        raise ValueError(f"{name}: expected 1 to 2**31-1, got {count}")
    return count


def check_integer(name: str, x: Leaf) -> int | jax.Array:
    """Returns a Python or NumPy integer as an int, and a jax array widened to at least 32 bits.

    A narrower array could not be compared with a period that needs 32 bits.
    """
    if _is_number(x, int):  # of any size: `array_type` knows only those that jax can represent
        return int(x)
    check_scalar(name, x, "an integer", Kind.INTEGER)
    if isinstance(x, jax.Array):
        return x.astype(jnp.int32) if x.dtype.itemsize < 4 else x
    return operator.index(x)


def check_scalar(name: str, x: Leaf, expected: str, *kinds: Kind, shape: tuple[int, ...] = ()) -> None:
    """Raises unless a leaf is a scalar of one of these kinds, or an array of another shape."""
    known = array_type(x)
    if known is None or kind_of(known.dtype) not in kinds:
        if _is_number(x, int):
            got = "an integer that jax cannot represent"
        else:
            got = repr(x) if isinstance(x, bool | float | complex) else describe(x)
        raise TypeError(f"{name}: expected {expected}, got {got}")
    if known.shape != shape:
        wanted = f"shape {list(shape)}, as this population has" if shape else "a scalar"
        raise ValueError(f"{name}: expected {wanted}, got shape {list(known.shape)}")


def check_accumulator_dtype(accumulator_dtype: DTypeLike | None) -> DType | None:
    """Returns a floating dtype that jax can use, or None."""
    if accumulator_dtype is None:
        return None
    try:
        dtype = jnp.dtype(accumulator_dtype)
    except TypeError:
        raise TypeError(f"accumulator_dtype: expected a dtype, got {accumulator_dtype!r}") from None
    if kind_of(dtype) != Kind.FLOAT or dtype.itemsize > 8:
        raise TypeError(f"accumulator_dtype: expected a floating dtype, got {dtype}")
    if not is_enabled(dtype):
        raise ValueError(f"accumulator_dtype: {dtype} needs jax_enable_x64")
    return dtype


# What other libraries call the arguments, and how to write them here.
_DECAYS = ("decay", "beta", "momentum", "ema_momentum", "polyak", "polyak_factor")
_STEP_SIZES = ("tau", "rate", "alpha", "polyak_step_size")
_PERIODS = ("period", "interval", "update_every", "update_interval", "update_freq", "every")


def refuse_foreign_names(class_name: str, arguments: dict[str, Any]) -> None:
    """Raises if an argument has the name that it has elsewhere, and says what to write."""
    for name, value in arguments.items():
        is_number = _is_number(value, int | float)
        if name in _DECAYS:
            line = f"step_size={1 - value:.10g}" if is_number else f"step_size=1 - {name}"
        elif name in _STEP_SIZES:
            line = f"step_size={value}"
        elif name in _PERIODS:
            line = f"update_period={value}"
        elif name == "update_after_step":
            line = f"step_size=schedules.delayed({value}, step_size)"
        else:
            continue
        if class_name == "PeriodicTarget" and line.startswith("step_size"):
            line = f"EMATarget(params, {line})"
        raise TypeError(f"{class_name} has no argument {name}: write {line}")


def number_converter(name: str, low: float, high: float) -> Callable[[float], float]:
    """Returns an attrs converter that takes real numbers in [low, high] and returns floats."""

    def convert(value: float) -> float:
        if not _is_number(value, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{name}: expected a number in [{low:g}, {high:.4g}], got {value}")
        return float(value)

    return convert


def step_size_converter(name: str, low: float = 0) -> Callable[[float], float]:
    """Returns an attrs converter that takes step sizes in [low, 1]."""

    def convert(value: float) -> float:
        step_size = number_converter(name, low, 1)(value)
        warn_of_decay(name, step_size)
        return step_size

    return convert


def count_converter(name: str) -> Callable[[int], int]:
    """Returns an attrs converter that takes integers from 1 to 2**31-1, but no jax arrays."""

    def convert(value: int) -> int:
        count = check_count(name, value)
        if not isinstance(count, int):
            raise TypeError(f"{name}: expected a Python integer, got a jax.Array")
        return count

    return convert


def bool_converter(name: str) -> Callable[[bool], bool]:
    """Returns an attrs converter that takes True and False."""

    def convert(value: bool) -> bool:
        if value is not True and value is not False:
            raise TypeError(f"{name}: expected True or False, got {value!r}")
        return value

    return convert


def _is_number(x: Any, number_type: Any) -> bool:
    """Whether this is a number of that type. Python's booleans are integers, but here they are not."""
    return isinstance(x, number_type) and not isinstance(x, bool)
