"""Averages whose length is chosen after training.

`schedules.power_function` weights the iterate at time tau of a run of length t in proportion to tau **
gamma. The weights as a function of tau are called the profile of the average. From a few dozen snapshots
of two such averages, `reconstruct` makes an average of any other length: the weighted sum of the
snapshots whose profile is closest to the one that is asked for.

Profiles are functions of continuous time, and iterates are discrete. This introduces no error: the
average of the iterates is the average over a path that stays at each iterate for one unit of time.

Example:
  During training, keep two targets:

  >>> import jax.numpy as jnp
  >>> from flax import serialization
  >>> from target_nets import EMATarget, posthoc, schedules
  >>> params = {"w": jnp.zeros(2)}
  >>> lengths = [schedules.power_function(sigma_rel=s) for s in (0.05, 0.1)]
  >>> targets = [EMATarget(params, length) for length in lengths]
  >>> saved = {}  # in a real run, files
  >>> for step in range(96):
  ...     params = {"w": params["w"] + 1.0}  # your gradient step
  ...     for target, length in zip(targets, lengths):
  ...         if target.update(params).step % 6 == 0:
  ...             saved[int(target.step), length.gamma] = serialization.to_bytes(target)

  Afterwards, load the snapshots one by one:

  >>> def load(key):
  ...     return serialization.from_bytes(targets[0], saved[key]).params
  >>> snapshots = [(*key, lambda key=key: load(key)) for key in saved]
  >>> print(posthoc.reconstruct(snapshots, sigma_rel=0.07)["w"].round(2))
  [89.24 89.24]
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from target_nets import schedules
from target_nets._src import arithmetic, differences, dtypes, leaves, placement, trees

__all__ = ["reconstruct", "solve_weights"]

P = TypeVar("P")
Vector: TypeAlias = NDArray[np.float64]

_LARGEST_ERROR = 0.1


def solve_weights(
    steps: ArrayLike, gammas: ArrayLike, target_step: ArrayLike, target_gamma: ArrayLike
) -> Vector:
    """Returns the weights with which the profiles of snapshots sum to the best fit of another profile.

    Args:
      steps: When the snapshots were taken, of shape (N,), positive: the number of averagings, or
        anything in proportion to it.
      gammas: The gammas of the averages, of shape (N,), at least 0.
      target_step: When the average that is asked for ends, in the unit of `steps` and at most the last
        of them.
      target_gamma: The gamma of that average, at least 0.

    Returns:
      The weights, float64 of shape (N,), with the smallest error in the L2 norm. The closer the fit, the
      closer is their sum to 1.

    Raises:
      TypeError, ValueError: An argument has the wrong type or shape or is out of range, there are fewer
        than two snapshots, or two snapshots have the same step and gamma.

    References:
      Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024 (EDM2),
      section 3.2 and appendix C.

    Example:
      >>> from target_nets import posthoc
      >>> weights = posthoc.solve_weights([50, 100, 50, 100], [6, 6, 16, 16], 100, 10)
      >>> [round(float(weight), 3) for weight in weights]
      [-0.005, 0.615, 0.0, 0.428]
    """
    steps, gammas = _check_profiles(steps, gammas)
    end = _check_end("target_step", target_step, steps)
    return _solve(steps, gammas, end, _check_numbers("target_gamma", target_gamma, 0, ndim=0))[0]


def reconstruct(
    snapshots: Iterable[tuple[ArrayLike, float, P | Callable[[], P]]],
    *,
    gamma: float | None = None,
    sigma_rel: float | None = None,
    step: ArrayLike | None = None,
) -> P:
    """Returns an average of any length, from snapshots of averages of two lengths or more.

    The weights are those of `solve_weights`, divided by their sum, so that a parameter that never
    changes keeps its value. NumPy computes the sum in float64, on the host. If each snapshot is loaded
    by a function, only one is in memory at a time. Rounding errors of the snapshots, as of a bfloat16
    model, are multiplied by the norm of the weights. This is about 1 for lengths between the stored ones
    and above, and 10 or more for much shorter ones.

    Args:
      snapshots: Tuples of a step, a gamma, and parameters or a function without arguments that loads
        them. The step is the number of averagings when the snapshot was taken: `target.step`, or with an
        update period any multiple of that number, the same for all snapshots. The gamma is that of the
        schedule, `power_function.gamma`. The parameters are `target.params`.
      gamma: The gamma of the average that is asked for. Give either this or `sigma_rel`.
      sigma_rel: Its width relative to the length of the run, as in `schedules.power_function`.
      step: When the average ends. It should be the step of a snapshot, since between two snapshots there
        is hardly ever a close fit. None: the last snapshot.

    Returns:
      The parameters as jax arrays, with the structure, shapes, dtypes and shardings of the first
      snapshot. Integers, booleans and PRNG keys are those of the snapshot nearest to `step`. Leaves that
      a mask has excluded from averaging are summed, too, and have no meaning.

    Raises:
      ValueError: There are fewer than two snapshots, two with the same step and gamma, or trees that
        differ. Or not exactly one of `gamma` and `sigma_rel` is given. Or the snapshots do not span this
        length: the error of the closest profile is more than a tenth, in the L2 norm. If the noise of
        the iterates is independent, that is a tenth of the noise that the average itself has.
      TypeError: An argument has the wrong type, or a leaf is not an array.

    References:
      Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024 (EDM2),
      section 3.2 and appendix C.

    Example:
      >>> import jax.numpy as jnp
      >>> from target_nets import EMATarget, posthoc, schedules
      >>> target = EMATarget({"w": 0.0}, schedules.power_function(gamma=10))
      >>> stored = [EMATarget({"w": 0.0}, schedules.power_function(gamma=g)) for g in (6, 16)]
      >>> snapshots = []
      >>> for step in range(1, 65):
      ...     params = {"w": jnp.log(step)}
      ...     _ = target.update(params)
      ...     for average, gamma in zip(stored, (6, 16)):
      ...         if average.update(params).step % 4 == 0:
      ...             snapshots.append((step, gamma, average.params))
      >>> after, while_training = posthoc.reconstruct(snapshots, gamma=10), target.params
      >>> print(f"{after['w']:.3f} {while_training['w']:.3f}")
      4.076 4.076
    """
    stored: list[Any] = list(snapshots)
    for index, snapshot in enumerate(stored):
        if not isinstance(snapshot, tuple) or len(snapshot) != 3:
            got = leaves.describe(snapshot)
            raise TypeError(f"snapshots[{index}]: expected a tuple (step, gamma, params), got {got}")
    steps, gammas = _check_profiles([x[0] for x in stored], [x[1] for x in stored])
    end = _check_end("step", steps.max() if step is None else step, steps)
    gamma = schedules.power_function(gamma=gamma, sigma_rel=sigma_rel).gamma
    weights, error = _solve(steps, gammas, end, gamma)
    if error > _LARGEST_ERROR:
        width, shortest, longest = map(schedules.sigma_rel_of, (gamma, gammas.max(), gammas.min()))
        raise ValueError(
            f"snapshots: they do not span an average of sigma_rel {width:.3g} (gamma {gamma:.4g}) that "
            f"ends at step {end:g}: the closest profile is off by {error:.0%}, more than "
            f"{_LARGEST_ERROR:.0%}. They are {steps.size} of sigma_rel {shortest:.3g} to {longest:.3g} "
            f"at steps {steps.min():g} to {steps.max():g}{'' if end in steps else f', not at {end:g}'}"
        )
    nearest, total = np.argmin(np.abs(steps - end)), _WeightedSum()
    with np.errstate(over="ignore", invalid="ignore"):  # inf and nan are passed on without a warning
        for index, weight in enumerate(weights / weights.sum()):
            total.add(weight, stored[index][2], index, is_nearest=bool(index == nearest))
        return total.result()


@attrs.define
class _WeightedSum:
    """A weighted sum of trees, in float64 on the host.

    Attributes:
      template: The first tree, with placeholders that take no memory.
      shardings: The sharding of each of its leaves.
      sums: For each leaf the sum so far or, if it is not inexact, its value in the nearest snapshot.
    """

    template: Any = None
    shardings: list[Any] = attrs.field(factory=list)
    sums: list[Any] = attrs.field(factory=list)

    def add(self, weight: float, params: Any, index: int, *, is_nearest: bool) -> None:
        """Adds the parameters of a snapshot, which may be a function that loads them."""
        # A module may be callable, too. It is a node, and a function is a leaf.
        tree = params() if callable(params) and leaves.is_leaf(params) else params
        if self.template is None:
            trees.check_arrays(tree, f"snapshots[{index}]")
            trees.check_wide_integers(tree, f"snapshots[{index}]")
            self.template = jax.tree.map(_without_memory, tree)
            self.shardings = [placement.sharding_of(x) for x in jax.tree.leaves(tree)]
            self.sums = [0.0] * len(self.shardings)
        names = differences.Names(f"snapshots[{index}]", "snapshots[0]")
        for i, (x, like) in enumerate(trees.zip_leaves(tree, self.template, names)[0]):
            if dtypes.is_inexact(like.dtype):
                wide = np.result_type(like.dtype, np.float64)
                self.sums[i] += np.multiply(np.asarray(x), weight, dtype=wide)
            elif is_nearest:
                self.sums[i] = arithmetic.copy(jnp.asarray(x), like)

    def result(self) -> Any:
        """Returns the sums in the dtypes and shardings of the first tree."""
        likes, treedef = jax.tree.flatten(self.template)
        cast = [
            x if dtypes.is_key(y.dtype) else x.astype(y.dtype)
            for x, y in zip(self.sums, likes, strict=True)
        ]
        return treedef.unflatten(jax.device_put(cast, self.shardings))


def _without_memory(x: Any) -> Any:
    """Returns a placeholder with the shape and dtype of a leaf. A PRNG key is small and stays."""
    known = leaves.array_type(x)
    return x if dtypes.is_key(known.dtype) else np.broadcast_to(np.zeros((), known.dtype), known.shape)


# The profiles


def _solve(steps: Vector, gammas: Vector, end: Vector, gamma: Vector | float) -> tuple[Vector, float]:
    """Returns the weights with the closest fit, and its relative error in the L2 norm."""
    cosines, norms = _geometry(np.append(steps, end), np.append(gammas, gamma))
    # With rcond, profiles that are almost equal share a weight. Without it their weights would be huge,
    # with opposite signs.
    unit, *_ = np.linalg.lstsq(cosines[:-1, :-1], cosines[:-1, -1], rcond=1e-10)
    difference = np.append(unit, -1)
    error = np.sqrt(max(difference @ cosines @ difference, 0))
    return unit * norms[-1] / norms[:-1], float(error)


def _geometry(steps: Vector, gammas: Vector) -> tuple[Vector, Vector]:
    """Returns the cosines between profiles as vectors in L2, of shape (N, N), and their norms, (N,).

    The profiles are `(gamma + 1) * tau ** gamma / t ** (gamma + 1)` on [0, t]. Only powers of ratios are
    taken, since powers of t would overflow.
    """
    t, s, g, h = steps[:, None], steps, gammas[:, None], gammas
    cosines = np.sqrt((2 * g + 1) * (2 * h + 1)) / (g + h + 1)
    cosines *= (np.minimum(t, s) / np.maximum(t, s)) ** (np.where(t > s, g, h) + 0.5)
    return cosines, (gammas + 1) / np.sqrt((2 * gammas + 1) * steps)


def _check_profiles(steps: ArrayLike, gammas: ArrayLike) -> tuple[Vector, Vector]:
    steps, gammas = (
        _check_numbers("steps", steps, 1e-30, ndim=1),
        _check_numbers("gammas", gammas, 0, ndim=1),
    )
    if steps.shape != gammas.shape:
        raise ValueError(f"gammas: expected as many as steps, {steps.size}, got {gammas.size}")
    if steps.size < 2:
        raise ValueError(f"snapshots: expected at least two, got {steps.size}")
    seen: dict[tuple[float, float], int] = {}
    for index, profile in enumerate(zip(steps.tolist(), gammas.tolist(), strict=True)):
        if (first := seen.setdefault(profile, index)) != index:
            step, gamma = profile
            raise ValueError(
                f"snapshots: numbers {first} and {index} both have step {step:g} and gamma {gamma:g}"
            )
    return steps, gammas


def _check_end(name: str, step: ArrayLike, steps: Vector) -> Vector:
    end = _check_numbers(name, step, 1e-30, ndim=0)
    if end > steps.max():
        raise ValueError(f"{name}: expected at most {steps.max():g}, the last snapshot's, got {end:g}")
    return end


def _check_numbers(name: str, x: ArrayLike, low: float, ndim: int) -> Vector:
    try:
        array = np.asarray(x)
        if array.dtype.kind not in "iuf":  # booleans, or strings that NumPy would read
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: expected {'real numbers' if ndim else 'a real number'}, got {x!r}"
        ) from None
    if array.ndim != ndim:
        raise ValueError(f"{name}: expected shape {'(N,)' if ndim else '()'}, got {array.shape}")
    if not np.all((array >= low) & (array <= 1e30)):
        raise ValueError(f"{name}: expected numbers in [{low:g}, 1e+30], got {array}")
    return array
