"""The rules for one leaf: how it is averaged, copied or added to.

`new` is a leaf of the online parameters and `old` a leaf of the slow copy. 8- and 16-bit floats are
converted to float32, combined, and rounded once. `lerp`, `copy` and `add` return new buffers in the
dtype of the old leaf.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from target_nets._src.dtypes import DType, accumulation_dtype, arithmetic_dtype, is_inexact, real_dtype
from target_nets._src.stochastic_rounding import round_stochastically

End = TypeVar("End")  # an array, or a pair of arrays that are chosen together


class Weights(NamedTuple):
    """A step size in one dtype, as the end that an average is nearer to and the weight of the other one.

    Traced, or known while tracing if the step size is a number.

    Attributes:
      old_is_near: Whether the average is nearer to the old value than to the new one.
      is_end: Whether the average is the near end itself, as at step sizes 0 and 1.
      doubled: Twice the weight of the far end, which is the step size or, exactly, one minus it.
    """

    old_is_near: jax.Array | np.bool_
    is_end: jax.Array | np.bool_
    doubled: jax.Array | np.floating[Any]

    def unless(self, finite: jax.Array) -> "Weights":
        """Returns weights with which the average is exactly the old value unless `finite`."""
        is_static = isinstance(self.old_is_near, np.bool_)
        return Weights(
            self.old_is_near if is_static and self.old_is_near else self.old_is_near | ~finite,
            self.is_end | ~finite,
            # So that no derivative comes from a value that is not finite.
            self.doubled if is_static else jnp.where(finite, self.doubled, 0),
        )

    def order(self, new: End, old: End) -> tuple[End, End]:
        """Returns the near end and the far end."""
        return choose(self.old_is_near, old, new), choose(self.old_is_near, new, old)


AllWeights: TypeAlias = Mapping[DType, Weights]


def weigh(
    step_size: ArrayLike, pairs: Iterable[tuple[jax.Array, jax.Array]], finite: jax.Array | None = None
) -> AllWeights:
    """Returns the weights in each dtype that pairs of a new and an old leaf are combined in.

    Args:
      step_size: The step size.
      pairs: The leaves.
      finite: Whether to average. If it is False, each average is the old leaf. None: average.
    """
    wide = {arithmetic_dtype(new.dtype, old.dtype) for new, old in pairs if is_inexact(old.dtype)}
    weights = {dtype: _weigh(step_size, dtype) for dtype in map(real_dtype, wide)}
    if finite is None:
        return weights
    return {dtype: weight.unless(finite) for dtype, weight in weights.items()}


def _weigh(step_size: ArrayLike, dtype: DType) -> Weights:
    if isinstance(step_size, float):
        rate = dtype.type(step_size)
        return _weigh_low(rate) if rate <= 0.5 else _weigh_high(rate)
    rate = clip_step_size(jnp.asarray(step_size).astype(dtype))
    # XLA does not fuse what comes out of a `cond`. It would repeat a schedule in the loop of each leaf.
    return lax.cond(rate <= 0.5, _weigh_low, _weigh_high, rate)


def _weigh_low(rate: Any) -> Weights:
    return Weights(rate <= 0.5, rate == 0, 2 * rate)


def _weigh_high(rate: Any) -> Weights:
    return Weights(rate <= 0.5, rate == 1, 2 * (1 - rate))


def clip_step_size(step_size: jax.Array) -> jax.Array:
    """Returns a traced step size in [0, 1]. It cannot raise, so it is clipped, and nan counts as 0."""
    return jnp.where(step_size > 0, jnp.minimum(step_size, 1), 0)


def choose(condition: jax.Array | np.bool_, x: End, y: End) -> End:
    """Returns `x` or `y`. If the condition is known while tracing, Python decides."""
    if isinstance(condition, np.bool_):
        return x if condition else y
    return jax.tree.map(partial(jnp.where, condition), x, y)


def lerp(
    new: jax.Array, old: jax.Array, weights: AllWeights, seed: jax.Array | None = None
) -> jax.Array:
    """Returns the linear interpolation from the old leaf to the new one, `old + step_size*(new - old)`.

    See `target_nets.rules.incremental_update`.

    Args:
      new: The online leaf.
      old: The slow leaf, an inexact one.
      weights: The step size, in each dtype.
      seed: For an old leaf of less than 32 bits: makes the rounding of the average stochastic.
    """
    if jnp.iscomplexobj(old):
        real = lerp(jnp.real(new), jnp.real(old), weights)
        return lax.complex(real, lerp(jnp.imag(new), jnp.imag(old), weights))
    dtype = arithmetic_dtype(new.dtype, old.dtype)
    near, far = weights[dtype].order(cast(new, dtype), cast(old, dtype))
    is_end, average = weights[dtype].is_end, interpolate(near, far, weights[dtype].doubled)
    # The copy gives the result memory of its own even where nothing is compiled.
    average = choose(is_end, jnp.copy(near), average)
    if seed is None:
        return average.astype(old.dtype)
    return round_stochastically(average, old.dtype, seed, is_end)


@jax.custom_jvp
def interpolate(near: jax.Array, far: jax.Array, doubled: jax.Array) -> jax.Array:
    """Returns `near + doubled/2 * (far - near)`, without an overflow for any finite ends."""
    # `far - near` may overflow. The difference of their halves cannot.
    half_gap = near * 0.5 - far * 0.5
    # near - 0.0 keeps the sign of near = -0.0, and near + 0.0 would not. Where an end is inf or nan, the
    # sum of both ends is the average, and the formula may be inf - inf.
    return lax.select(lax.is_finite(half_gap), near - doubled * half_gap, near + far)


@interpolate.defjvp
def _(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    # The derivative of the formula. jax would differentiate the special cases of the code instead.
    (near, far, doubled), (near_dot, far_dot, doubled_dot) = primals, tangents
    weight, weight_dot = doubled / 2, doubled_dot / 2
    result_dot = (1 - weight) * near_dot + weight * far_dot + (far - near) * weight_dot
    return interpolate(near, far, doubled), result_dot


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


def all_finite(groups: Iterable[Sequence[jax.Array]]) -> jax.Array:
    """Returns whether no leaf holds inf or nan, as a boolean scalar.

    Args:
      groups: Inexact leaves. Those of a group have one shape, and are placed alike. XLA compiles one
        reduction for a group in much less time than one for each leaf.
    """
    zeros = jnp.concatenate([_sum_of_zeros(*group) for group in groups] or [jnp.zeros(1)])
    # XLA does not fuse a dot product. It would repeat any other reduction in the loop of every small
    # leaf, and the program would grow with the square of the number of leaves.
    return jnp.dot(zeros, zeros) == 0


@jax.jit
def _sum_of_zeros(*leaves: jax.Array) -> jax.Array:
    # Inf and nan times 0 are nan. On CPUs XLA sums faster than it reduces `all`, and its `max` may lose
    # a nan.
    zeros = [x.astype(accumulation_dtype(x.dtype)) * 0 for x in leaves]
    total = jnp.sum(sum(zeros[1:], start=zeros[0]))
    return (jnp.real(total) + jnp.imag(total)).astype(jnp.float32).reshape(1)
