"""Schedules: every averaging scheme is the same rule with other step sizes.

A schedule is a callable. Its argument n is the number of averagings so far, not counting skipped ones,
so n is 0 at the first one. The schedule returns the step size, which is 1 - decay. The schedules of this
module are hashable and picklable. Two with equal arguments compare equal, so jit does not compile again.
n may be a number or an array, traced or not. The result is float32, or float64 with `jax_enable_x64`,
and it is accurate at any n.

The weight of a past iterate in the average is the step size at that iterate, times the product of (1 -
step size) over all averagings since.

The classes have lowercase names because they are used like optax's schedule functions.

Example:
  optax's schedules can be used, too. This one copies in the first 1,000 averagings and then averages:

  >>> import optax
  >>> from target_nets import EMATarget, schedules
  >>> copy_then_average = optax.join_schedules(
  ...     [optax.constant_schedule(1.0), optax.constant_schedule(0.005)], boundaries=[1000]
  ... )
  >>> EMATarget({"w": 0.0}, copy_then_average).update({"w": 3.0}).params
  {'w': Array(3., dtype=float32)}
"""

import math
from typing import TYPE_CHECKING, Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from target_nets._src.checks import (
    count_converter,
    number_converter,
    step_size_converter,
    warn_of_decay,
)
from target_nets._src.state import Schedule

__all__ = [
    "bias_corrected",
    "cosine",
    "delayed",
    "gamma_of",
    "inverse_power",
    "power_function",
    "ramp",
    "sigma_rel_of",
    "uniform",
]


def _float(n: ArrayLike) -> jax.Array:
    # jnp.asarray would keep the lower 32 bits of an integer on the host.
    return n.astype(float) if isinstance(n, jax.Array) else jnp.asarray(np.asarray(n, np.float64), float)


@attrs.frozen
class cosine:
    """From `base_step_size` down to 0 after `total_steps`, along half a cosine.

    The step size at n is `base_step_size * (cos(pi * min(n, total_steps) / total_steps) + 1) / 2`. It is
    BYOL's schedule of 1 - tau. There tau rises from 0.996, a base step size of 0.004, to 1.

    Args:
      base_step_size: The step size at n = 0, in [0, 1].
      total_steps: The number of averagings until the step size is 0, an integer from 1 to 2**31-1.

    Raises:
      TypeError, ValueError: An argument has the wrong type or is out of range.

    References:
      Grill et al., "Bootstrap your own latent", 2020, section 3.3.

    Example:
      >>> schedule = cosine(base_step_size=0.004, total_steps=100)
      >>> [round(float(schedule(n)), 6) for n in (0, 50, 100, 1000)]
      [0.004, 0.002, 0.0, 0.0]
    """

    base_step_size: float = attrs.field(converter=step_size_converter("base_step_size"))
    total_steps: int = attrs.field(converter=count_converter("total_steps"))

    def __call__(self, n: ArrayLike) -> jax.Array:
        """Returns the step size of the averaging after n others."""
        left = jnp.maximum(self.total_steps - _float(n), 0) / self.total_steps
        # The same as with (cos + 1) / 2, which would lose its digits near 0.
        return self.base_step_size * jnp.sin(math.pi / 2 * left) ** 2


def _number_or_schedule(then: float | Schedule) -> float | Schedule:
    if not callable(then):
        step_size = number_converter("then", 0, 1)(then)
        warn_of_decay("then", step_size)
        return step_size
    try:
        hash(then)
    except TypeError:
        raise TypeError(f"then: a schedule must be hashable, got {then!r}") from None
    return then


@attrs.frozen
class delayed:
    """A full copy at each of the first `start` averagings, and then another step size or schedule.

    Until then the slow copy equals the online parameters, so that evaluating it early shows no initial
    values. The other schedule counts from 0 at the averaging after them. It is `update_after_step` of
    timm, diffusers and ema-pytorch.

    Args:
      start: The number of averagings that copy, an integer from 1 to 2**31-1.
      then: The step size after them: a number in [0, 1] or a schedule.

    Raises:
      TypeError, ValueError: An argument has the wrong type or is out of range.

    Example:
      >>> schedule = delayed(2, then=cosine(0.1, total_steps=2))
      >>> [round(float(schedule(n)), 3) for n in range(5)]
      [1.0, 1.0, 0.1, 0.05, 0.0]
    """

    start: int = attrs.field(converter=count_converter("start"))
    then: float | Schedule = attrs.field(converter=_number_or_schedule)

    def __call__(self, n: ArrayLike) -> jax.Array:
        """Returns the step size of the averaging after n others."""
        count: Any = n if isinstance(n, jax.Array) else np.asarray(n)  # NumPy keeps 64 bits
        then = self.then((count - self.start).clip(0)) if callable(self.then) else self.then
        return jnp.where(count < self.start, 1.0, _float(then))


@attrs.frozen
class inverse_power:
    """A warm-up: the first averaging copies, and then the step size falls as a power of n.

    The step size is 1 at n = 0. After that it is `(1 + n / inv_gamma) ** -power`, clipped to
    [`min_step_size`, `max_step_size`].

    Args:
      inv_gamma: The length of the warm-up, in averagings, in [1e-30, 1e30]. At n = inv_gamma the step
        size has fallen to `2 ** -power`.
      power: How fast the step size falls, in [0, 1e30]. Crowson's advice is 2/3 for a million averagings
        and more, and 3/4 for fewer. With power=1, inv_gamma=1 and min_step_size=0 the average is the
        mean of all iterates.
      min_step_size: The smallest step size, in [0, 1]. It is 1 - the largest decay.
      max_step_size: The largest step size after the first averaging, in [0, 1].

    Raises:
      TypeError, ValueError: An argument has the wrong type or is out of range.

    References:
      The warm-up of ema-pytorch, timm and diffusers, introduced by Katherine Crowson.

    Example:
      >>> schedule = inverse_power(min_step_size=0.01)
      >>> [round(float(schedule(n)), 4) for n in (0, 7, 26, 10_000)]
      [1.0, 0.25, 0.1111, 0.01]
    """

    inv_gamma: float = attrs.field(default=1.0, converter=number_converter("inv_gamma", 1e-30, 1e30))
    power: float = attrs.field(default=2 / 3, converter=number_converter("power", 0, 1e30))
    min_step_size: float = attrs.field(default=1e-4, converter=step_size_converter("min_step_size"))
    max_step_size: float = attrs.field(default=1.0, converter=number_converter("max_step_size", 0, 1))

    def __attrs_post_init__(self) -> None:
        if self.min_step_size > self.max_step_size:
            most = f"max_step_size={self.max_step_size}"
            raise ValueError(f"min_step_size: expected at most {most}, got {self.min_step_size}")

    def __call__(self, n: ArrayLike) -> jax.Array:
        """Returns the step size of the averaging after n others."""
        n = _float(n)
        falling = jnp.exp(-self.power * jnp.log1p(n / self.inv_gamma))
        return jnp.where(n > 0, jnp.clip(falling, self.min_step_size, self.max_step_size), 1)


@attrs.frozen
class ramp:
    """A short warm-up: the larger of 9 / (10 + n) and `min_step_size`.

    Args:
      min_step_size: The smallest step size, in [0, 1]. It is 1 - the largest decay.

    Raises:
      TypeError, ValueError: The argument has the wrong type or is out of range.

    References:
      TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`.

    Example:
      >>> schedule = ramp(min_step_size=0.01)
      >>> [round(float(schedule(n)), 4) for n in (0, 80, 1000)]
      [0.9, 0.1, 0.01]
    """

    min_step_size: float = attrs.field(converter=step_size_converter("min_step_size"))

    def __call__(self, n: ArrayLike) -> jax.Array:
        """Returns the step size of the averaging after n others."""
        return jnp.maximum(self.min_step_size, 9 / (10 + _float(n)))


@attrs.frozen
class uniform:
    """The mean of all iterates: the step size at n is 1 / (n + 1).

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
        """Returns the step size of the averaging after n others."""
        return 1 / (_float(n) + 1)


@attrs.frozen
class bias_corrected:
    """A moving average without a bias towards its start, as Adam's moments are.

    The step size at n is `step_size / (1 - (1 - step_size) ** (n + 1))`. It is 1 at first and falls to
    `step_size`. The result is that of a constant `step_size` with a slow copy that starts at zero,
    divided by the sum of the weights of the iterates.

    Args:
      step_size: The limit of the step size, in [1e-30, 1].

    Raises:
      TypeError, ValueError: The argument has the wrong type or is out of range.

    References:
      Kingma and Ba, "Adam: a method for stochastic optimization", 2015, section 3.

    Example:
      >>> schedule = bias_corrected(step_size=0.1)
      >>> [round(float(schedule(n)), 4) for n in (0, 1, 9, 1000)]
      [1.0, 0.5263, 0.1535, 0.1]
    """

    step_size: float = attrs.field(converter=step_size_converter("step_size", 1e-30))

    def __call__(self, n: ArrayLike) -> jax.Array:
        """Returns the step size of the averaging after n others."""
        n = _float(n)
        log_decay = math.log1p(-self.step_size) if self.step_size < 1 else -1e3  # exp(-1e3) is 0
        return jnp.where(n > 0, self.step_size / -jnp.expm1((n + 1) * log_decay), 1)


@attrs.frozen(init=False)
class power_function:
    """An average over a constant fraction of the run so far, whatever the length of the run.

    The step size at n is `1 - (1 - 1 / (n + 1)) ** (gamma + 1)`. Then the weight of iterate i is in
    proportion to `i ** (gamma + 1) - (i - 1) ** (gamma + 1)`, which is close to `i ** gamma`. Give
    exactly one of the two arguments.

    Args:
      gamma: The power, in [0, 1e30]. 0 gives the mean of all iterates. The larger it is, the more weight
        the latest iterates have.
      sigma_rel: The width of the average relative to the length of the run, in [1e-6, 0.2887]: the
        standard deviation of the time of an iterate that is drawn with these weights. The paper uses
        0.05 and 0.10.

    Raises:
      ValueError: Not exactly one argument is given, or it is out of range.
      TypeError: The argument is not a number.

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
        converter=number_converter("gamma", 0, 1e30), repr=lambda gamma: f"{gamma:.7g}"
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
        """Returns the step size of the averaging after n others."""
        n = _float(n)
        later = -jnp.expm1((self.gamma + 1) * jnp.log1p(-1 / (jnp.maximum(n, 1) + 1)))
        return jnp.where(n > 0, later, 1)


def gamma_of(sigma_rel: float) -> float:
    """Returns the gamma of the `power_function` whose average has the width `sigma_rel`.

    Args:
      sigma_rel: The standard deviation of the weights relative to the length of the run, in [1e-6,
        0.2887].

    Returns:
      gamma, at least 0.

    Raises:
      TypeError, ValueError: The width is not a number or is out of range.

    References:
      Karras et al., 2024 (EDM2), appendix C.1.

    Example:
      >>> round(gamma_of(0.1), 2)
      6.94
    """
    # 0.2887 is 12**-0.5, the width of the mean of all iterates. With t = sigma_rel**-2 the equation is
    # (gamma + 2)**2 * (gamma + 3) == t * (gamma + 1).
    t = number_converter("sigma_rel", 1e-6, 0.2887)(sigma_rel) ** -2
    return max(0.0, float(np.roots([1, 7, 16 - t, 12 - t]).real.max()))


def sigma_rel_of(gamma: float) -> float:
    """Returns the width of the average of `power_function(gamma)`: the inverse of `gamma_of`.

    Args:
      gamma: The power, in [0, 1e30].

    Returns:
      The standard deviation of the weights relative to the length of the run, at most 12**-0.5.

    Raises:
      TypeError, ValueError: The power is not a number or is out of range.

    References:
      Karras et al., 2024 (EDM2), appendix C.1.

    Example:
      >>> round(sigma_rel_of(6.94), 3)
      0.1
    """
    gamma = number_converter("gamma", 0, 1e30)(gamma)
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)
