"""The rules for one leaf: how it is averaged, copied or added to.

`new` is a leaf of the online parameters and `old` a leaf of the slow copy. 8- and 16-bit floats are
converted to float32, combined, and rounded once. `lerp`, `compensated_lerp`, `copy` and `add` return new
buffers in the dtype of the old leaf.

References:
  Compensation: Kahan, "Pracniques: Further remarks on reducing truncation errors", 1965; Dekker, "A
  floating-point technique for extending the available precision", 1971 (`two_prod`); Knuth, "The art of
  computer programming", volume 2, section 4.2.2 (`two_sum`).
"""

from collections.abc import Sequence
from functools import partial
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from target_nets._src.dtypes import DType, accumulation_dtype, arithmetic_dtype, is_inexact

DoubleWord: TypeAlias = tuple[jax.Array, jax.Array]  # value and error
End = TypeVar("End")  # an array, or a tree of arrays that are chosen together


def lerp(new: jax.Array, old: jax.Array, step_size: ArrayLike) -> jax.Array:
    """Returns the linear interpolation from the old leaf to the new one, `old + step_size*(new - old)`.

    Integers, booleans and PRNG keys take the new value. See `target_nets.rules.incremental_update`.
    """
    if not is_inexact(old.dtype):
        return copy(new, old)
    if jnp.iscomplexobj(old):
        real = lerp(jnp.real(new), jnp.real(old), step_size)
        return lax.complex(real, lerp(jnp.imag(new), jnp.imag(old), step_size))
    dtype = arithmetic_dtype(new.dtype, old.dtype)
    near, far, weight = order_ends(cast(new, dtype), cast(old, dtype), step_size, dtype)
    return select(weight == 0, jnp.copy(near), interpolate(near, far, weight)).astype(old.dtype)


def order_ends(new: End, old: End, step_size: ArrayLike, dtype: DType) -> tuple[End, End, jax.Array]:
    """Returns the end that the average is nearer to, the other end, and the weight of the other end.

    The weight is the step size if that is at most one half, and one minus the step size otherwise. The
    subtraction is exact there.
    """
    if isinstance(step_size, float):
        rate = dtype.type(step_size)
    else:
        rate = clip_step_size(jnp.asarray(step_size).astype(dtype))
    is_low = rate <= 0.5
    return select(is_low, old, new), select(is_low, new, old), select(is_low, rate, 1 - rate)


def clip_step_size(step_size: jax.Array) -> jax.Array:
    """Returns a traced step size in [0, 1]. It cannot raise, so it is clipped, and nan counts as 0."""
    return jnp.where(step_size > 0, jnp.minimum(step_size, 1), 0)


def select(condition: jax.Array | np.bool_, x: End, y: End) -> End:
    """Returns `x` or `y`. If the condition is known while tracing, the choice is made in Python."""
    if isinstance(condition, np.bool_):
        return x if condition else y
    return jax.tree.map(partial(jnp.where, condition), x, y)


@jax.custom_jvp
def interpolate(near: jax.Array, far: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns `near + weight*(far - near)`, without an overflow for any finite ends."""
    # `far - near` may overflow. The difference of their halves cannot. An infinite near end counts as 0
    # in it, since inf - inf would make the result nan.
    half_gap = lax.select(lax.is_finite(near), near * 0.5, jnp.zeros_like(near)) - far * 0.5
    # near - 0.0 keeps the sign of near = -0.0, and near + 0.0 would not.
    return near - 2 * weight * half_gap


@interpolate.defjvp
def _(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    # The derivative of the formula. jax would differentiate the special cases of the code instead.
    (near, far, weight), (near_dot, far_dot, weight_dot) = primals, tangents
    result_dot = (1 - weight) * near_dot + weight * far_dot + (far - near) * weight_dot
    return interpolate(near, far, weight), result_dot


def copy(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns a copy of the new leaf in the dtype of the old one, strongly typed."""
    if new.dtype == old.dtype and not getattr(new, "weak_type", False):
        return jnp.copy(new)
    return lax.convert_element_type(cast(new, old.dtype), old.dtype)


def add(update: jax.Array, param: jax.Array) -> jax.Array:
    """Returns the sum in the dtype of the parameter."""
    dtype = arithmetic_dtype(update.dtype, param.dtype)
    return (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)


def cast(x: jax.Array, dtype: DType) -> jax.Array:
    """Returns a leaf in another dtype.

    A bfloat16 leaf is rounded once more, explicitly. If the same program has computed it in float32, XLA
    may leave out its rounding. Then the average would use other values than the parameters that the user
    sees.
    """
    if x.dtype == jnp.bfloat16 and jnp.issubdtype(dtype, jnp.inexact):
        x = lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def all_finite(leaves: Sequence[jax.Array]) -> jax.Array:
    """Returns whether no inexact leaf holds inf or nan, as a boolean scalar."""
    inexact = [x.astype(accumulation_dtype(x.dtype)) for x in leaves if is_inexact(x.dtype)]
    # Inf and nan times 0 are nan. On CPUs XLA sums faster than it reduces `all`, and its `max` may lose
    # a nan.
    has_nonfinite = jnp.array([jnp.sum(x * 0) != 0 for x in inexact], jnp.float32)
    # XLA does not fuse a dot product. It would repeat any other reduction in the loop of every small
    # leaf, and the program would grow with the square of the number of leaves.
    return jnp.dot(has_nonfinite, has_nonfinite) == 0


def zero_unless(finite: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a leaf, or zeros for an inexact leaf unless `finite`, so that derivatives stay finite."""
    return jnp.where(finite, x, 0) if is_inexact(x.dtype) else x


# Compensation: the rounding error of each average is kept, and the next average adds it back. So a slow
# leaf is the sum of two arrays, value and error, and has twice the precision of its dtype.


def compensated_lerp(
    new: jax.Array, value: jax.Array, error: jax.Array, step_size: ArrayLike
) -> DoubleWord:
    """Returns the average of an inexact leaf and its rounding error, both in the dtype of the value."""
    if jnp.iscomplexobj(value):
        parts = ((part(new), part(value), part(error)) for part in (jnp.real, jnp.imag))
        reals, imaginaries = (compensated_lerp(*part, step_size) for part in parts)
        return lax.complex(reals[0], imaginaries[0]), lax.complex(reals[1], imaginaries[1])
    dtype = arithmetic_dtype(new.dtype, value.dtype)
    online = cast(new, dtype), jnp.zeros_like(new, dtype)
    near, far, weight = order_ends(online, (cast(value, dtype), cast(error, dtype)), step_size, dtype)
    # The copies give the result memory of its own even where nothing is compiled.
    unchanged = jnp.copy(near[0]), jnp.copy(near[1])
    result = select(weight == 0, unchanged, interpolate_compensated(near, far, weight, value.dtype))
    return result[0].astype(value.dtype), result[1].astype(value.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def interpolate_compensated(
    near: DoubleWord, far: DoubleWord, weight: jax.Array, dtype: DType
) -> DoubleWord:
    """Returns `near + weight*(far - near)` as a value that is rounded to `dtype`, and its error."""
    (near_value, near_error), (far_value, far_error) = near, far
    gap, gap_error = two_sum(far_value, -near_value)
    gap_error += far_error - near_error
    increment, increment_error = two_prod(weight, gap)
    value, value_error = two_sum(near_value, increment)
    rest = near_error + value_error + increment_error + weight * gap_error

    rounded = value + rest
    if dtype != value.dtype:  # without the barrier XLA may leave out the cast and the cast back
        rounded = lax.optimization_barrier(rounded.astype(dtype)).astype(value.dtype)
    error = (value - rounded) + rest
    # Where the ends are equal there is nothing to compensate. Where something is not finite, an error
    # would be nan. The plain formula is right in both cases.
    is_plain = ((gap == 0) & (gap_error == 0)) | ~jnp.isfinite(error)
    plain = interpolate(near_value, far_value, weight)
    return jnp.where(is_plain, plain, rounded), jnp.where(is_plain, 0, error)


@interpolate_compensated.defjvp
def _(
    dtype: DType,
    primals: tuple[DoubleWord, DoubleWord, jax.Array],
    tangents: tuple[DoubleWord, DoubleWord, jax.Array],
) -> tuple[DoubleWord, DoubleWord]:
    # The derivative of the plain formula, where each end is the sum of its value and its error. The
    # new error has no derivative.
    (near, far, weight), (near_dot, far_dot, weight_dot) = primals, tangents
    ends, end_dots = (near[0], far[0], weight), (sum(near_dot), sum(far_dot), weight_dot)
    _, value_dot = jax.jvp(interpolate, ends, end_dots)
    return interpolate_compensated(near, far, weight, dtype), (value_dot, jnp.zeros_like(value_dot))


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
    """Splits a number into its upper bits and the rest, so that products of such parts are exact."""
    info = jnp.finfo(x.dtype)
    high = lax.reduce_precision(x, info.nexp, (info.nmant - 1) // 2)
    return high, x - high
