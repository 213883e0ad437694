"""Averaging that keeps the rounding error of each average, so that the next one can take it up.

A slow leaf is the pair (value, error), a sum of two arrays that is not carried out. So it has twice the
precision of its dtype.

References:
  Kahan, "Pracniques: Further remarks on reducing truncation errors", 1965. Dekker, "A floating-point
  technique for extending the available precision", 1971. Knuth, "The art of computer programming",
  volume 2, section 4.2.2 (`two_sum`).
"""

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from target_nets._src.arithmetic import cast, interpolate, order_ends, where
from target_nets._src.dtypes import DType, arithmetic_dtype

DoubleWord: TypeAlias = tuple[jax.Array, jax.Array]  # value and error


def compensated_lerp(
    new: jax.Array, value: jax.Array, error: jax.Array, step_size: ArrayLike
) -> DoubleWord:
    """Returns the average of an inexact leaf and its rounding error, in the dtype of the old leaf."""
    if jnp.iscomplexobj(value):
        parts = ((part(new), part(value), part(error)) for part in (jnp.real, jnp.imag))
        reals, imaginaries = (compensated_lerp(*part, step_size) for part in parts)
        return lax.complex(reals[0], imaginaries[0]), lax.complex(reals[1], imaginaries[1])
    dtype = arithmetic_dtype(new.dtype, value.dtype)
    online = cast(new, dtype), jnp.zeros_like(new, dtype)
    near, far, weight = order_ends(online, (cast(value, dtype), cast(error, dtype)), step_size, dtype)
    # The copies give the result memory of its own, also where nothing is compiled.
    unchanged = jnp.copy(near[0]), jnp.copy(near[1])
    result = where(weight == 0, unchanged, interpolate_exactly(near, far, weight, value.dtype))
    return result[0].astype(value.dtype), result[1].astype(value.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def interpolate_exactly(
    near: DoubleWord, far: DoubleWord, weight: jax.Array, dtype: DType
) -> DoubleWord:
    """Returns `near + weight*(far - near)` as its value rounded to `dtype`, and its error."""
    (near_value, near_error), (far_value, far_error) = near, far
    gap, gap_error = two_sum(far_value, -near_value)
    gap_error += far_error - near_error
    step, step_error = two_prod(weight, gap)
    value, value_error = two_sum(near_value, step)
    rest = near_error + value_error + step_error + weight * gap_error

    rounded = value + rest
    if dtype != value.dtype:  # without the barrier XLA may leave out the cast and its way back
        rounded = lax.optimization_barrier(rounded.astype(dtype)).astype(value.dtype)
    error = (value - rounded) + rest
    # Where both ends are equal, or something is not finite, the plain rule is right.
    is_plain = ((gap == 0) & (gap_error == 0)) | ~jnp.isfinite(error)
    plain = interpolate(near_value, far_value, weight)
    return jnp.where(is_plain, plain, rounded), jnp.where(is_plain, 0, error)


@interpolate_exactly.defjvp
def _(
    dtype: DType,
    primals: tuple[DoubleWord, DoubleWord, jax.Array],
    tangents: tuple[DoubleWord, DoubleWord, jax.Array],
) -> tuple[DoubleWord, DoubleWord]:
    # The derivative is that of the plain rule at the sums. The rounding error has none.
    (near, far, weight), (near_dot, far_dot, weight_dot) = primals, tangents
    ends, end_dots = (near[0], far[0], weight), (sum(near_dot), sum(far_dot), weight_dot)
    _, value_dot = jax.jvp(interpolate, ends, end_dots)
    return interpolate_exactly(near, far, weight, dtype), (value_dot, jnp.zeros_like(value_dot))


def two_sum(a: jax.Array, b: jax.Array) -> DoubleWord:
    """Returns the rounded sum and its rounding error (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def two_prod(a: jax.Array, b: jax.Array) -> DoubleWord:
    """Returns the rounded product and its rounding error (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def split(x: jax.Array) -> DoubleWord:
    """Returns the upper half of the bits of a number, and the rest. Products of halves are exact."""
    info = jnp.finfo(x.dtype)
    high = lax.reduce_precision(x, info.nexp, (info.nmant - 1) // 2)
    return high, x - high
