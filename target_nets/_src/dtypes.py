"""Kinds of leaves, and the dtypes that they are computed and stored in."""

import enum
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

DType: TypeAlias = np.dtype[Any]


class Kind(enum.IntEnum):
    """The kinds of leaves, from the narrowest to the widest. PRNG keys stand apart."""

    BOOL = 0
    INTEGER = 1
    FLOAT = 2
    COMPLEX = 3
    KEY = 4


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


def storage_dtype(dtype: DType, accumulator_dtype: DType | None) -> DType:
    """Returns the dtype that an averaged leaf is stored in."""
    if accumulator_dtype is None or not is_inexact(dtype):
        return accumulation_dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(jnp.complex128 if accumulator_dtype.itemsize == 8 else jnp.complex64)
    return accumulator_dtype


def check_accumulator_dtype(accumulator_dtype: DTypeLike) -> DType:
    """Returns a floating dtype that jax can use."""
    try:
        dtype = jnp.dtype(accumulator_dtype)
    except TypeError:
        raise TypeError(f"accumulator_dtype: expected a dtype, got {accumulator_dtype!r}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"accumulator_dtype: expected a floating dtype, got {dtype}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"accumulator_dtype: {dtype} needs jax_enable_x64")
    return dtype


def storage_dtypes(
    dtypes: Sequence[DType], averaged: Sequence[bool], accumulator_dtype: DTypeLike | None
) -> list[DType]:
    """Returns the dtypes that the slow copy is stored in, one for each leaf."""
    accumulator = None if accumulator_dtype is None else check_accumulator_dtype(accumulator_dtype)
    leaves = zip(dtypes, averaged, strict=True)
    return [storage_dtype(dtype, accumulator) if average else dtype for dtype, average in leaves]
