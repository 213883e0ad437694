"""The kinds of leaves, and the dtypes that leaves are computed and stored in."""

import enum
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

DType: TypeAlias = np.dtype[Any]


class Kind(enum.IntEnum):
    """The kinds of leaves. A leaf may take the value of a leaf of the same kind or of a narrower one.

    KEY is the last one, so that no number takes the value of a PRNG key. `leaves.find_misfit` makes sure
    that no key takes the value of a number.
    """

    BOOL = 0
    INTEGER = 1
    FLOAT = 2
    COMPLEX = 3
    KEY = 4


_SCALAR_TYPES = {
    Kind.BOOL: jnp.bool_,
    Kind.INTEGER: jnp.integer,
    Kind.FLOAT: jnp.floating,
    Kind.COMPLEX: jnp.complexfloating,
    Kind.KEY: jax.dtypes.prng_key,
}


def kind_of(dtype: DType) -> Kind | None:
    """Returns the kind of a dtype, or None if it is not one of numbers, booleans or PRNG keys."""
    return next((kind for kind, scalar in _SCALAR_TYPES.items() if jnp.issubdtype(dtype, scalar)), None)


def is_key(dtype: DType) -> bool:
    """Whether this is a dtype of typed PRNG keys, as `jax.random.key` makes them."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_inexact(dtype: DType) -> bool:
    """Whether this is a dtype of floats or complex numbers, which can be averaged."""
    return jnp.issubdtype(dtype, jnp.inexact)


def holds(dtype: DType, other: DType) -> bool:
    """Whether a dtype has every value of another one of the same kind."""
    if kind_of(dtype) == Kind.INTEGER:
        wide, narrow = jnp.iinfo(dtype), jnp.iinfo(other)
        return bool(wide.min <= narrow.min and narrow.max <= wide.max)
    if not is_inexact(dtype):
        return True
    wide, narrow = jnp.finfo(dtype), jnp.finfo(other)
    smallest = [info.minexp - info.nmant for info in (wide, narrow)]
    return bool(wide.nmant >= narrow.nmant and wide.max >= narrow.max and smallest[0] <= smallest[1])


def may_overflow(new: DType, old: DType) -> bool:
    """Whether a new leaf may have finite values that are beyond the range of an inexact old one."""
    if not is_inexact(old) or kind_of(new) in (Kind.BOOL, Kind.KEY):
        return False
    largest = jnp.iinfo(new).max if kind_of(new) == Kind.INTEGER else jnp.finfo(new).max
    return bool(float(largest) > float(jnp.finfo(old).max))


def is_enabled(dtype: DType) -> bool:
    """Whether jax can use a dtype now: without `jax_enable_x64` it has none of 64 bits."""
    return is_key(dtype) or jax.dtypes.canonicalize_dtype(dtype) == dtype


def real_dtype(dtype: DType) -> DType:
    """Returns the dtype of the parts of a complex dtype, and any other inexact dtype unchanged."""
    return jnp.finfo(dtype).dtype


def accumulation_dtype(dtype: DType) -> DType:
    """Returns float32 for floats below 32 bits, and any other dtype unchanged."""
    return jnp.dtype(jnp.float32) if is_below_32_bits(dtype) else dtype


def is_below_32_bits(dtype: DType) -> bool:
    """Whether this is a dtype of floats with less than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def pair_dtype(dtype: DType) -> DType | None:
    """Returns the complex dtype that holds two values of a floating dtype, or None if there is none."""
    pairs = {"float32": jnp.complex64, "float64": jnp.complex128}
    return jnp.dtype(pairs[dtype.name]) if dtype.name in pairs else None


def arithmetic_dtype(new: DType, old: DType) -> DType:
    """Returns the dtype to combine two leaves in: the wider kind or, within one kind, the larger."""
    candidates = accumulation_dtype(old), accumulation_dtype(new)
    return max(candidates, key=lambda dtype: (kind_of(dtype), dtype.itemsize))


def storage_dtype(dtype: DType, accumulator: DType | None) -> DType:
    """Returns the dtype of the average of a parameter, whose user may ask for an accumulator dtype."""
    if accumulator is None or not is_inexact(dtype):
        return accumulation_dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(jnp.complex128 if accumulator.itemsize == 8 else jnp.complex64)
    return accumulator
