"""Averaging that keeps the rounding error of each average, so that the next one can take it up.

References:
  Kahan, "Pracniques: Further remarks on reducing truncation errors", 1965. Dekker, "A floating-point
  technique for extending the available precision", 1971. Knuth, "The art of computer programming",
  volume 2, section 4.2.2 (`two_sum`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from target_nets._src.arithmetic import cast, interpolate, order_ends, where
from target_nets._src.dtypes import DType, arithmetic_dtype


class DoubleWord(NamedTuple):
    """A number with twice the precision of its dtype: the sum of two arrays that is not carried out."""

    value: jax.Array
    error: jax.Array  # what rounding cut off


def compensated_lerp(new: jax.Array, old: DoubleWord, step_size: ArrayLike) -> DoubleWord:
    """Returns the average of an inexact leaf and its rounding error, in the dtype of the old leaf."""
    if jnp.iscomplexobj(old.value):
        real = compensated_lerp(jnp.real(new), DoubleWord(*map(jnp.real, old)), step_size)
        imag = compensated_lerp(jnp.imag(new), DoubleWord(*map(jnp.imag, old)), step_size)
        return DoubleWord(lax.complex(real.value, imag.value), lax.complex(real.error, imag.error))
    dtype = arithmetic_dtype(new.dtype, old.value.dtype)
    online = DoubleWord(cast(new, dtype), jnp.zeros_like(new, dtype))
    slow = DoubleWord(cast(old.value, dtype), cast(old.error, dtype))
    near, far, weight = order_ends(online, slow, step_size, dtype)
    # The copy gives the result memory of its own, also where nothing is compiled.
    unchanged = jax.tree.map(jnp.copy, near)
    result = where(weight == 0, unchanged, interpolate_exactly(near, far, weight, old.value.dtype))
    return DoubleWord(result.value.astype(old.value.dtype), result.error.astype(old.value.dtype))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def interpolate_exactly(
    near: DoubleWord, far: DoubleWord, weight: jax.Array, dtype: DType
) -> DoubleWord:
    """Returns `near + weight*(far - near)`, its value rounded to `dtype` and its error unrounded."""
    gap, gap_error = two_sum(far.value, -near.value)
    gap_error += far.error - near.error
    step, step_error = two_prod(weight, gap)
    value, value_error = two_sum(near.value, step)
    rest = near.error + value_error + step_error + weight * gap_error

    rounded = value + rest
    if dtype != near.value.dtype:  # without the barrier XLA may leave out the cast and its way back
        rounded = lax.optimization_barrier(rounded.astype(dtype)).astype(near.value.dtype)
    error = (value - rounded) + rest
    # Where both ends are equal, or something is not finite, the plain rule is right.
    is_plain = ((gap == 0) & (gap_error == 0)) | ~jnp.isfinite(error)
    plain = interpolate(near.value, far.value, weight)
    return DoubleWord(jnp.where(is_plain, plain, rounded), jnp.where(is_plain, 0, error))


@interpolate_exactly.defjvp
def _(
    dtype: DType,
    primals: tuple[DoubleWord, DoubleWord, jax.Array],
    tangents: tuple[DoubleWord, DoubleWord, jax.Array],
) -> tuple[DoubleWord, DoubleWord]:
    # The derivative of the formula. The rounding error has none.
    (near, far, weight), (near_dot, far_dot, weight_dot) = primals, tangents
    value_dot = (1 - weight) * (near_dot.value + near_dot.error)
    value_dot += weight * (far_dot.value + far_dot.error) + (far.value - near.value) * weight_dot
    result_dot = DoubleWord(value_dot, jnp.zeros_like(value_dot))
    return interpolate_exactly(near, far, weight, dtype), result_dot


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded sum and its rounding error (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def two_prod(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded product and its rounding error (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the upper half of the bits of a number, and the rest. Products of halves are exact."""
    info = jnp.finfo(x.dtype)
    high = lax.reduce_precision(x, info.nexp, (info.nmant - 1) // 2)
    return high, x - high
