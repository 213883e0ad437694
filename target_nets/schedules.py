"""Schedules: every averaging scheme is the same rule with another step size.

A schedule is a callable of n, the number of averagings done before this one (0 at the first; skipped
ones do not count), that returns the step size, 1 - decay. Those here are plain values: hashable,
picklable, and equal when their settings are equal, so that an equal one compiles nothing again. n may be
a number or an array, traced or not; the result is float32 (float64 with `jax_enable_x64`), accurate at
any n.

The weight that an average gives to a past iterate is the step size at that iterate times
(1 - step size) at every one since.

Example:
  optax's schedules are callables of the same kind. A copy until step 1,000, then an average:

  >>> import optax
  >>> from target_nets import EMATarget, schedules
  >>> copy_then_average = optax.join_schedules(
  ...     [optax.constant_schedule(1.0), optax.constant_schedule(0.005)], boundaries=[1000]
  ... )
  >>> EMATarget({"w": 0.0}, copy_then_average).update({"w": 3.0}).params
  {'w': Array(3., dtype=float32)}
"""

import math
from typing import TYPE_CHECKING

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from target_nets._src.checks import check_number, check_python_count

__all__ = [
    "bias_corrected",
    "cosine",
    "gamma_of",
    "inverse_power",
    "power_function",
    "ramp",
    "sigma_rel_of",
    "uniform",
]


def _float(n: ArrayLike) -> jax.Array:
    return jnp.asarray(n).astype(float)


@attrs.frozen
class cosine:
    """From `base_step_size` down to 0 after `total_steps`, along half a cosine.

    The step size at n is `base_step_size * (cos(pi * min(n, total_steps) / total_steps) + 1) / 2`. It is
    1 - tau of BYOL, where tau goes from 0.996 (a base step size of 0.004) up to 1.

    Args:
      base_step_size: The step size at n = 0, in [0, 1].
      total_steps: How many averagings until 0, an integer from 1.

    Raises:
      TypeError, ValueError: A setting is of the wrong type or out of range.

    References:
      Grill et al., "Bootstrap your own latent", 2020, section 3.3.

    Example:
      >>> schedule = cosine(base_step_size=0.004, total_steps=100)
      >>> [round(float(schedule(n)), 6) for n in (0, 50, 100, 1000)]
      [0.004, 0.002, 0.0, 0.0]
    """

    base_step_size: float = attrs.field(converter=check_number("base_step_size", 0, 1))
    total_steps: int = attrs.field(converter=check_python_count("total_steps"))

    def __call__(self, n: ArrayLike) -> jax.Array:
        """The step size of the averaging after n others."""
        left = jnp.maximum(self.total_steps - _float(n), 0) / self.total_steps
        return self.base_step_size * jnp.sin(math.pi / 2 * left) ** 2  # cos + 1 would cancel at the end


@attrs.frozen
class inverse_power:
    """A warm-up: a copy at first, then step sizes that fall as a power of n.

    The step size is 1 at n = 0 and then `(1 + n / inv_gamma) ** -power`, kept within
    [`min_step_size`, `max_step_size`].

    Args:
      inv_gamma: How many averagings the warm-up takes to get going, above 0.
      power: How fast the step size falls, at least 0: 2/3 for a million averagings and more, 3/4 for
        fewer, 1 for the mean of all iterates.
      min_step_size: Where it ends, in [0, 1]: 1 - the largest decay.
      max_step_size: The largest after the first, in [0, 1].

    Raises:
      TypeError, ValueError: A setting is of the wrong type or out of range.

    References:
      The warm-up of ema-pytorch, timm and diffusers, after Katherine Crowson.

    Example:
      >>> schedule = inverse_power(min_step_size=0.01)
      >>> [round(float(schedule(n)), 4) for n in (0, 7, 26, 10_000)]
      [1.0, 0.25, 0.1111, 0.01]
    """

    inv_gamma: float = attrs.field(default=1.0, converter=check_number("inv_gamma", 1e-30, 1e30))
    power: float = attrs.field(default=2 / 3, converter=check_number("power", 0, 1e30))
    min_step_size: float = attrs.field(default=1e-4, converter=check_number("min_step_size", 0, 1))
    max_step_size: float = attrs.field(default=1.0, converter=check_number("max_step_size", 0, 1))

    def __attrs_post_init__(self) -> None:
        if self.min_step_size > self.max_step_size:
            raise ValueError(
                f"min_step_size: expected at most max_step_size={self.max_step_size}, "
                f"got {self.min_step_size}"
            )

    def __call__(self, n: ArrayLike) -> jax.Array:
        """The step size of the averaging after n others."""
        n = _float(n)
        falling = jnp.exp(-self.power * jnp.log1p(n / self.inv_gamma))
        return jnp.where(n > 0, jnp.clip(falling, self.min_step_size, self.max_step_size), 1)


@attrs.frozen
class ramp:
    """A short warm-up: 9 / (10 + n), until that is below `min_step_size`.

    Args:
      min_step_size: Where it ends, in [0, 1]: 1 - decay.

    Raises:
      TypeError, ValueError: The setting is of the wrong type or out of range.

    References:
      TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`.

    Example:
      >>> schedule = ramp(min_step_size=0.01)
      >>> [round(float(schedule(n)), 4) for n in (0, 80, 1000)]
      [0.9, 0.1, 0.01]
    """

    min_step_size: float = attrs.field(converter=check_number("min_step_size", 0, 1))

    def __call__(self, n: ArrayLike) -> jax.Array:
        """The step size of the averaging after n others."""
        return jnp.maximum(self.min_step_size, 9 / (10 + _float(n)))


@attrs.frozen
class uniform:
    """The plain mean of all iterates: 1 / (n + 1).

    References:
      Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; Izmailov et
      al., "Averaging weights leads to wider optima and better generalization", 2018 (SWA).

    Example:
      >>> from target_nets import EMATarget
      >>> mean = EMATarget({"w": 0.0}, uniform())
      >>> for w in (1.0, 2.0, 6.0):
      ...     _ = mean.update({"w": w})
      >>> mean.params
      {'w': Array(3., dtype=float32)}
    """

    def __call__(self, n: ArrayLike) -> jax.Array:
        """The step size of the averaging after n others."""
        return 1 / (_float(n) + 1)


@attrs.frozen
class bias_corrected:
    """A moving average that forgets its start, as Adam's moments do.

    The step size at n is `step_size / (1 - (1 - step_size) ** (n + 1))`: 1 at first, `step_size` in the
    end. The slow copy is that of a constant `step_size` from a start of zeros, divided by the sum of its
    weights.

    Args:
      step_size: The step size in the end, in [1e-30, 1].

    Raises:
      TypeError, ValueError: The setting is of the wrong type or out of range.

    References:
      Kingma and Ba, "Adam: a method for stochastic optimization", 2015, section 3.

    Example:
      >>> schedule = bias_corrected(step_size=0.1)
      >>> [round(float(schedule(n)), 4) for n in (0, 1, 9, 1000)]
      [1.0, 0.5263, 0.1535, 0.1]
    """

    step_size: float = attrs.field(converter=check_number("step_size", 1e-30, 1))

    def __call__(self, n: ArrayLike) -> jax.Array:
        """The step size of the averaging after n others."""
        n = _float(n)
        log_decay = math.log1p(-self.step_size) if self.step_size < 1 else -1e3
        return jnp.where(n > 0, self.step_size / -jnp.expm1((n + 1) * log_decay), 1)


@attrs.frozen(init=False)
class power_function:
    """An average over a constant fraction of the run so far, however long it is.

    The step size at n is `1 - (1 - 1 / (n + 1)) ** (gamma + 1)`: iterate i is weighted as i ** gamma.
    One of the two settings is given.

    Args:
      gamma: The power, at least 0: 0 is the mean of all iterates, larger is shorter.
      sigma_rel: The width of the average relative to the run, in [1e-6, 0.2887], instead of gamma: 0.05
        and 0.10 in the paper.

    Raises:
      TypeError, ValueError: Not one setting is given, or it is of the wrong type or out of range.

    References:
      Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024 (EDM2),
      section 3.1 and appendix C.1.

    Example:
      >>> schedule = power_function(sigma_rel=0.1)
      >>> schedule
      power_function(gamma=6.937204)
      >>> [round(float(schedule(n)), 4) for n in (0, 99, 9999)]
      [1.0, 0.0767, 0.0008]
    """

    gamma: float = attrs.field(
        converter=check_number("gamma", 0, 1e30), repr=lambda gamma: f"{gamma:.7g}"
    )

    if TYPE_CHECKING:

        def __attrs_init__(self, gamma: float | None) -> None: ...

    def __init__(self, *, gamma: float | None = None, sigma_rel: float | None = None) -> None:
        if (gamma is None) == (sigma_rel is None):
            raise ValueError(
                f"gamma, sigma_rel: expected one of them, got gamma={gamma!r}, sigma_rel={sigma_rel!r}"
            )
        self.__attrs_init__(gamma if sigma_rel is None else gamma_of(sigma_rel))

    def __call__(self, n: ArrayLike) -> jax.Array:
        """The step size of the averaging after n others."""
        n = _float(n)
        later = -jnp.expm1((self.gamma + 1) * jnp.log1p(-1 / (jnp.maximum(n, 1) + 1)))
        return jnp.where(n > 0, later, 1)


def gamma_of(sigma_rel: float) -> float:
    """The power of the `power_function` whose average has the width `sigma_rel`.

    Args:
      sigma_rel: The standard deviation of its profile relative to the run, in [1e-6, 0.2887].

    Returns:
      gamma, at least 0.

    Raises:
      TypeError, ValueError: The width is no number or out of range.

    References:
      Karras et al., 2024 (EDM2), appendix C.1.

    Example:
      >>> round(gamma_of(0.1), 2)
      6.94
    """
    t = check_number("sigma_rel", 1e-6, 0.2887)(sigma_rel) ** -2  # the widest, of all iterates: 12**-0.5
    return max(0.0, float(np.roots([1, 7, 16 - t, 12 - t]).real.max()))


def sigma_rel_of(gamma: float) -> float:
    """The width of the average of the `power_function` of the power `gamma`; undoes `gamma_of`.

    Args:
      gamma: The power, at least 0.

    Returns:
      The standard deviation of its profile relative to the run, at most 12**-0.5.

    Raises:
      TypeError, ValueError: The power is no number or out of range.

    References:
      Karras et al., 2024 (EDM2), appendix C.1.

    Example:
      >>> round(sigma_rel_of(6.94), 3)
      0.1
    """
    gamma = check_number("gamma", 0, 1e30)(gamma)
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)
