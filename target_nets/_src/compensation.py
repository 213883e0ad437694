"""Compensation: the rounding error of each average is kept, and the next average adds it back.

So a slow leaf is a double word: the sum of a value and its error, with twice the precision of its dtype.

References:
  Kahan, "Pracniques: Further remarks on reducing truncation errors", 1965 (the idea); Dekker, "A
  floating-point technique for extending the available precision", 1971 (products of upper bits); Knuth,
  "The art of computer programming", volume 2, section 4.2.2 (`_subtract`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from target_nets._src.arithmetic import AllWeights, cast, choose, interpolate
from target_nets._src.dtypes import DType, arithmetic_dtype

DoubleWord: TypeAlias = tuple[jax.Array, jax.Array]  # value and error
Scalar: TypeAlias = jax.Array | np.floating[Any]


class _Weights(NamedTuple):
    """The weights of both ends, and the upper and the lower half of the bits of one."""

    near: Scalar
    far: Scalar
    far_upper: Scalar
    far_lower: Scalar

    @classmethod
    def split(cls, doubled: Scalar) -> "_Weights":
        """Returns the weights of `Weights.doubled`."""
        far = doubled / 2
        scaled = (2 ** ((jnp.finfo(far.dtype).nmant + 2) // 2) + 1) * far
        upper = scaled - (scaled - far)
        return cls(1 - far, far, upper, far - upper)


def compensated_lerp(new: DoubleWord, old: DoubleWord, weights: AllWeights) -> DoubleWord:
    """Returns the average of two leaves and its rounding error, both in the dtype of the old value."""
    value, _ = old
    if jnp.iscomplexobj(value):
        reals, imaginaries = (
            compensated_lerp(_map(part, new), _map(part, old), weights) for part in (jnp.real, jnp.imag)
        )
        return lax.complex(reals[0], imaginaries[0]), lax.complex(reals[1], imaginaries[1])
    wide = arithmetic_dtype(new[0].dtype, value.dtype)
    near, far = weights[wide].order(*(_map(partial(cast, dtype=wide), end) for end in (new, old)))
    average = _interpolate(near, far, _Weights.split(weights[wide].doubled), value.dtype)
    # The copies give the result memory of its own even where nothing is compiled.
    average = choose(weights[wide].is_end, _map(jnp.copy, near), average)
    return average[0].astype(value.dtype), average[1].astype(value.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _interpolate(near: DoubleWord, far: DoubleWord, weights: _Weights, dtype: DType) -> DoubleWord:
    """Returns `near - weight*(near - far)` as a value that is rounded to `dtype`, and its error."""
    (near_value, near_error), (far_value, far_error) = near, far
    gap, gap_error = _subtract(near_value, far_value)
    decrement, decrement_error = _multiply(weights, gap)
    total, total_error = _subtract(near_value, decrement)
    decrement_error += weights.far * (gap_error + (near_error - far_error))
    rest = decrement_error - (total_error + near_error)
    value = total - rest
    if dtype != value.dtype:  # without the barrier XLA may leave out the cast and the cast back
        value = lax.optimization_barrier(value.astype(dtype)).astype(value.dtype)
    error = (total - value) - rest
    # Where something overflows or is not finite, the error would be nan. There it is 0.
    plain = weights.near * near_value + weights.far * far_value
    is_finite, no_error = lax.is_finite(error), jnp.zeros_like(error)
    return lax.select(is_finite, value, plain), lax.select(is_finite, error, no_error)


@_interpolate.defjvp
def _(
    dtype: DType,
    primals: tuple[DoubleWord, DoubleWord, _Weights],
    tangents: tuple[DoubleWord, DoubleWord, _Weights],
) -> tuple[DoubleWord, DoubleWord]:
    # The derivative of the plain formula, where each end is the sum of its value and its error. The
    # new error has no derivative.
    (near, far, weights), (near_dot, far_dot, weights_dot) = primals, tangents
    ends, end_dots = (
        (near[0], far[0], 2 * weights.far),
        (sum(near_dot), sum(far_dot), 2 * weights_dot.far),
    )
    _, value_dot = jax.jvp(interpolate, ends, end_dots)
    return _interpolate(near, far, weights, dtype), (value_dot, jnp.zeros_like(value_dot))


def _map(function: Callable[[jax.Array], jax.Array], x: DoubleWord) -> DoubleWord:
    return function(x[0]), function(x[1])


def _subtract(a: jax.Array, b: jax.Array) -> DoubleWord:
    """Returns the rounded difference `a - b` and its rounding error."""
    difference = a - b
    b_part = a - difference
    return difference, (a - (difference + b_part)) + (b_part - b)


def _multiply(weights: _Weights, x: jax.Array) -> DoubleWord:
    """Returns the rounded product of the far weight and a number, and its rounding error (Dekker)."""
    product, upper = weights.far * x, _upper_bits(x)
    lower = x - upper
    error = (weights.far_upper * upper - product) + weights.far_upper * lower
    return product, (error + weights.far_lower * upper) + weights.far_lower * lower


def _upper_bits(x: jax.Array) -> jax.Array:
    """Returns a number without the lower half of its bits, so that products of two such are exact."""
    bits, precision = jnp.finfo(x.dtype).bits, jnp.finfo(x.dtype).nmant + 1
    word = jnp.dtype(f"uint{bits}")
    mask = word.type(2**bits - 2 ** ((precision + 1) // 2))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, word) & mask, x.dtype)
