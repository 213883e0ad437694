"""Kinds of leaves, and the dtypes that they are computed and stored in."""

import enum
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

DType: TypeAlias = np.dtype[Any]

# From the narrowest to the widest. PRNG keys stand apart.
Kind = enum.IntEnum("Kind", ["BOOL", "INTEGER", "FLOAT", "COMPLEX", "KEY"])
_SCALAR_TYPES = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating, jax.dtypes.prng_key)


def kind_of(dtype: DType) -> Kind | None:
    """Returns the kind of a dtype, or None if it is neither a number's nor a PRNG key's."""
    kinds = zip(Kind, _SCALAR_TYPES, strict=True)
    return next((kind for kind, scalar_type in kinds if jnp.issubdtype(dtype, scalar_type)), None)


def is_key(dtype: DType) -> bool:
    """Whether this is the dtype of typed PRNG keys, as `jax.random.key` makes them."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_inexact(dtype: DType) -> bool:
    """Whether this is a dtype of floats or complex numbers, which can be averaged."""
    return jnp.issubdtype(dtype, jnp.inexact)


def accumulation_dtype(dtype: DType) -> DType:
    """Returns float32 for floats below 32 bits, and every other dtype as it is."""
    is_small_float = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if is_small_float else dtype


def arithmetic_dtype(new: DType, old: DType) -> DType:
    """Returns the dtype in which two leaves are combined: the wider kind, then the larger size."""
    candidates = accumulation_dtype(old), accumulation_dtype(new)
    return max(candidates, key=lambda dtype: (kind_of(dtype), dtype.itemsize))


def storage_dtype(dtype: DType, accumulator: DType | None) -> DType:
    """Returns the dtype that an averaged leaf is stored in."""
    if accumulator is None or not is_inexact(dtype):
        return accumulation_dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(jnp.complex128 if accumulator.itemsize == 8 else jnp.complex64)
    return accumulator
