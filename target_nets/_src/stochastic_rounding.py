"""Stochastic rounding: up or down at random, so that small increments are not lost.

A value between two numbers of a dtype is rounded to either of them, with the probability that makes the
mean right. The random bits are a hash of the count of averagings, the leaf, and the element's index in
the whole array. So there is no generator to save, and eager, jitted, sharded, resumed and batched runs
get the same bits.

References:
  Gupta et al., "Deep learning with limited numerical precision", 2015 (the rounding); Wellons, "Hash
  function prospecting", 2018, https://nullprogram.com/blog/2018/07/31/ (the constants of the hash).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from target_nets._src.dtypes import DType
from target_nets._src.placement import match_sharding


def leaf_seeds(count: int, due_before: jax.Array) -> list[jax.Array]:
    """Returns a word for each of so many leaves, all different, from the count of averagings."""
    word = _mix(due_before.astype(jnp.uint32))

    def advance(_: int, seeds: list[jax.Array]) -> list[jax.Array]:
        return [(seed ^ (seed >> 15)) * np.uint32(0x7FEB352D) + word for seed in seeds]

    # XLA does not fuse what comes out of a loop. Otherwise it would compute each seed within the code
    # for its leaf. Then no two leaves would have the same code, and XLA would compile that of each one.
    return lax.fori_loop(0, 4, advance, [jnp.uint32(leaf) for leaf in range(count)])


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_stochastically(
    x: jax.Array, dtype: DType, seed: jax.Array, to_nearest: jax.Array | np.bool_
) -> jax.Array:
    """Returns an array in a dtype of less than 32 bits. Values that it represents stay exact.

    Args:
      x: The values, in at least 32 bits.
      dtype: The dtype of the result.
      seed: The word of the leaf.
      to_nearest: Whether to round to the nearest number instead, a scalar.
    """
    info, wide = jnp.finfo(dtype), jnp.finfo(jnp.float32)
    x = x.astype(jnp.float32)
    has_other_range = info.minexp > wide.minexp
    shift: jax.Array | float = 0.0
    if has_other_range:
        # Below its smallest normal number a dtype has the spacing of the numbers just above. So values
        # there are shifted up to those.
        tiny = jnp.float32(info.smallest_normal)
        shift = jnp.copysign(jnp.where(jnp.abs(x) < tiny, tiny, 0), x)
    words = lax.bitcast_convert_type(x + shift if has_other_range else x, jnp.uint32)
    # The lower bits, which the dtype does not have, are the distance to the next number towards zero.
    # Random bits that are added to them carry with the right probability.
    dropped = wide.nmant - info.nmant
    half = 2 ** (dropped - 1) - 1 + ((words >> dropped) & 1)  # ties go to the even number
    increment = jnp.where(to_nearest, half, _random_bits(x, seed) >> (32 - dropped))
    words += jnp.where(lax.is_finite(x), increment, 0)
    if dtype == jnp.bfloat16:  # the upper half of a float32
        return lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), dtype)
    rounded = lax.bitcast_convert_type(words & np.uint32(2**32 - 2**dropped), jnp.float32)
    return jnp.copysign(rounded - shift, x).astype(dtype)


@round_stochastically.defjvp
def _(
    dtype: DType, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    x, seed, to_nearest = primals
    return round_stochastically(x, dtype, seed, to_nearest), tangents[0].astype(dtype)  # as a cast


def _random_bits(x: jax.Array, seed: jax.Array) -> jax.Array:
    """Returns 32 bits for each element, of which the upper ones are the better ones."""
    # With the seed in one place, the bits of a leaf could be those of another leaf in another order.
    second = (seed ^ (seed >> 16)) * np.uint32(0x9E3779B9)
    bits = (_element_index(x) ^ seed) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) + second
    return (bits ^ (bits >> 13)) * np.uint32(0x846CA68B)


def _mix(x: jax.Array) -> jax.Array:
    """Returns a hash of 32-bit words, different for different words."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _element_index(x: jax.Array) -> jax.Array:
    """Returns the position of each element in the flattened array, modulo 2**32."""
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return match_sharding(index, x)
