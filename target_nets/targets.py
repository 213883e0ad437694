"""The classes: a slow copy of a model's parameters and a counter of its updates, in one object.

`EMATarget` averages and `PeriodicTarget` copies. Both are objects that `update` changes in place, and
both are pytrees. So they serve eager Python and functions that jax transforms.

Two mistakes that no check can find:

- A target is updated inside `jax.jit` and not returned. Then the target outside keeps its old value,
  since `jit` gives the function a copy. Return it. Inside `nnx.jit` a target that is part of an nnx
  object that was passed in needs no return.
- A jitted function reads `target.params` of a target that was not passed in. Then the values are
  compiled as constants, and the function never sees a later update. Pass the target in.
"""

from typing import TypeVar, cast, final

import attrs
import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from target_nets._src import checks, construct, placement, unwrap, views
from target_nets._src.state import COPY_ALL, Count, Plan, Schedule, Settings, State, host_count
from target_nets._src.target import Target, register_pytree

__all__ = ["EMATarget", "PeriodicTarget"]

P = TypeVar("P")


@final
class EMATarget(Target[P]):
    """A target whose parameters are a moving average of the online parameters (Polyak averaging).

    Call `update` after each gradient step and read `params`. A target is a pytree: pass it into jit,
    scan, vmap or shard_map as an argument, and return it. flax.serialization saves the slow copy and the
    counters. The other arguments below are not saved. A restored target has those of the target that it
    was restored into.

    Args:
      params: The parameters to start from, a tree of arrays of any shapes and dtypes. An nnx module, an
        `nnx.State` or a Ref stands for its arrays. For an Equinox module, pass `eqx.filter(module,
        eqx.is_array)`. The target copies them, and the slow copy keeps their placement.
      step_size: How far an averaging moves the slow copy towards the online parameters, in [0, 1]. It
        equals one minus the decay. It may be a number, a scalar array or a schedule. An array is a leaf
        of the target, so that `vmap` can sweep it. A schedule is a hashable callable. Its argument is
        the number of averagings before this one, a traced int32 scalar. A `jax.Array` and what a
        schedule returns are clipped to [0, 1], and nan counts as 0. In eager Python, an averaging with a
        schedule, or with an accumulator of less than 32 bits, sends one scalar to the device, which
        `jax.transfer_guard("disallow")` refuses. jax
        keeps a lambda, and all that it refers to, until `jax.clear_caches()`. Of those in
        `target_nets.schedules` it keeps one for all that are equal.
      update_period: Only every `update_period`-th update averages, an integer from 1 to 2**31-1.
      mask: Which leaves to average, as in `optax.masked`: a tree prefix of booleans, or a callable of
        the parameters that returns one. The other leaves are copied, as one may want for the statistics
        of BatchNorm. None: all leaves are averaged.
      accumulator_dtype: The floating dtype that averaged leaves are stored in. For complex leaves it is
        the dtype of their parts, at least float32. Values beyond its range become inf. None: a leaf
        keeps its own dtype, but 8- and 16-bit floats are stored in float32. A dtype of less than 32 bits
        halves that memory, or more. Rounding to nearest would lose small increments, so such averages
        are rounded stochastically: up or down at random, without bias, with noise of a standard
        deviation of up to sqrt(1 / (12 * step_size)) units in the last place. Increments below 2**-25 of
        the value are still lost, as in float32: do not use it with step sizes below 1e-4. The random
        bits depend on the count of averagings, the leaf and the index of the element alone. So every run
        of the same updates gives the same bits. In a `shard_map` each device counts the elements of its
        own shard.
      compensated: Whether to store the rounding error of each average, too, which takes as much memory
        again. Then the average is right to one unit in the last place, at any step size and after any
        number of updates. It is worth the memory for float32 with step sizes below 1e-3. This holds for
        values between 1e-30 / step size and 1e38: below, the rounding errors are denormal numbers, which
        XLA may turn into zeros, and above, differences overflow. With a narrower `accumulator_dtype`,
        value and error together have twice the precision of that dtype: 16 bits for bfloat16. They are
        then rounded to nearest.
      skip_nonfinite: Whether to skip an averaging if an inexact leaf of the online parameters holds inf
        or nan, or if an average would overflow in the dtype that it is stored in. Then the whole slow
        copy stays as it is, and `step` and `skipped` go up by one. The device decides, and the host does
        not wait. Not for use inside `pmap` or `shard_map`, where each device would decide for itself. In
        a `shard_map` jax raises an error, unless `check_vma=False` was given.
      donate: Whether `update` and `sync` in eager Python reuse the memory of the slow copy. Then what
        was read from `target.params` before can no longer be read.

    Raises:
      TypeError, ValueError: An argument is of the wrong type or out of range.

    References:
      Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; Lillicrap et
      al., "Continuous control with deep reinforcement learning", 2015 (target networks); Gupta et al.,
      "Deep learning with limited numerical precision", 2015 (stochastic rounding).

    Example:
      >>> import jax.numpy as jnp
      >>> from target_nets import EMATarget
      >>> target = EMATarget({"w": jnp.zeros(2)}, step_size=0.25)
      >>> target.update({"w": jnp.ones(2)}).update({"w": jnp.ones(2)})
      EMATarget(step=2, step_size=0.25, update_period=1, arrays=1, parameters=2, bytes=8)
      >>> target.params
      {'w': Array([0.4375, 0.4375], dtype=float32)}

      It can be passed into a transformation and returned:

      >>> import jax
      >>> target = jax.jit(lambda target, params: target.update(params))(target, {"w": jnp.ones(2)})
      >>> print(target.step, target.params["w"])
      3 [0.578125 0.578125]
    """

    __slots__ = ()

    def __init__(
        self,
        params: P,
        step_size: ArrayLike | Schedule,
        *,
        update_period: int = 1,
        mask: construct.Mask = None,
        accumulator_dtype: DTypeLike | None = None,
        compensated: bool = False,
        skip_nonfinite: bool = False,
        donate: bool = False,
    ) -> None:
        arrays = unwrap.unwrap(params)
        param_dtypes = construct.leaf_dtypes(arrays)
        averaged = construct.resolve_mask(mask, params, arrays)
        accumulator = checks.check_accumulator_dtype(accumulator_dtype)
        static_step_size, array_step_size = construct.parse_step_size(step_size)
        storage = construct.choose_storage(param_dtypes, averaged, accumulator, compensated is True)
        settings = Settings(
            plan=Plan(all(averaged) or averaged, static_step_size, is_random=storage.is_random),
            update_period=update_period,
            donate=donate,
            param_dtypes=storage.dtypes_to_restore(param_dtypes),
            compensated=compensated,
            pairs=storage.pairs,
            skip_nonfinite=skip_nonfinite,
            nnx_objects=unwrap.find_nnx_objects(params),
        )
        slow = construct.first_slow_copy(arrays, storage)
        state = State(
            settings,
            slow.params,
            host_count(0),
            skipped=placement.put_beside(host_count(0), slow.params) if skip_nonfinite else None,
            compensation=slow.compensation,
            step_size=placement.put_beside(array_step_size, slow.params),
        )
        self.__attrs_init__(state)

    @property
    def step_size(self) -> ArrayLike | Schedule:
        """How far an averaging moves the slow copy: what was given, or assigned since then.

        It may be assigned, and is checked as in the constructor. A new number or schedule compiles
        again. An array does not, if it replaces an array of the same dtype. An assignment inside a
        transformation needs a target that was passed into it, as `update` does.

        Example:
          >>> import jax.numpy as jnp
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": 0.0}, step_size=jnp.float32(0.5))
          >>> target.step_size = jnp.float32(0.25)
          >>> target.update({"w": 1.0}).params
          {'w': Array(0.25, dtype=float32)}
        """
        state = self._state
        step_size = state.settings.plan.step_size if state.step_size is None else state.step_size
        return cast("float | Schedule | jax.Array", step_size)  # one of the two was given

    @step_size.setter
    def step_size(self, step_size: ArrayLike | Schedule) -> None:
        self._check_trace("step_size")
        with self._lock:
            state = self._state
            shape = np.shape(state.step)  # that of a population
            static_step_size, array_step_size = construct.parse_step_size(step_size, shape)
            plan = state.settings.plan._replace(step_size=static_step_size)
            settings = attrs.evolve(state.settings, plan=plan)
            array_step_size = placement.put_beside(array_step_size, state.params)
            self._state = state._replace(settings=settings, step_size=array_step_size)

    def next_step_size(self) -> jax.Array:
        """Returns the step size that the next averaging will use, for logging.

        A resumed run that has lost its count shows here. A schedule is called with the number of
        averagings so far.

        Returns:
          A scalar in [0, 1], float32 or wider, on the device. Of a population, an array.

        Raises:
          TypeError: The target is abstract, or the schedule returns no real number.

        Example:
          >>> from target_nets import EMATarget, schedules
          >>> target = EMATarget({"w": 0.0}, schedules.uniform()).update({"w": 1.0})
          >>> target.next_step_size()
          Array(0.5, dtype=float32)
        """
        return views.read_step_size(self._state)

    @property
    def skipped(self) -> Count:
        """How many averagings `skip_nonfinite` has skipped so far: a 0-d int32 array, 0 without it.

        After an update it is on the device, and reading its value waits for that update. The argument of
        a schedule is the number of averagings that were due, minus this number, and at least 0. The
        number of those that were due stops growing where `step` first goes back by a period. From there
        on each skipped averaging takes the schedule back by one.

        Example:
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": 0.0}, step_size=0.5, skip_nonfinite=True)
          >>> target.update({"w": float("nan")}).skipped
          Array(1, dtype=int32)
        """
        return host_count(0) if self._state.skipped is None else self._state.skipped


@final
class PeriodicTarget(Target[P]):
    """A target whose parameters are a copy of the online parameters that is renewed periodically.

    It is used, passed into transformations and saved in the same way as an `EMATarget`.

    Args:
      params: The parameters to start from, as for an `EMATarget`. The target copies them, and the slow
        copy keeps their placement.
      update_period: The period K, an integer from 1 to 2**31-1. The updates K, 2K, ... copy the online
        parameters.
      donate: Whether `update` and `sync` in eager Python reuse the memory of the slow copy. Then what
        was read from `target.params` before can no longer be read.

    Raises:
      TypeError, ValueError: An argument is of the wrong type or out of range.

    References:
      Mnih et al., "Human-level control through deep reinforcement learning", 2015.

    Example:
      >>> import jax.numpy as jnp
      >>> from target_nets import PeriodicTarget
      >>> target = PeriodicTarget({"w": jnp.zeros(2)}, update_period=2)
      >>> for _ in range(3):
      ...     print(target.update({"w": jnp.ones(2)}).params["w"])
      [0. 0.]
      [1. 1.]
      [1. 1.]
    """

    __slots__ = ()

    def __init__(self, params: P, update_period: int, *, donate: bool = False) -> None:
        arrays = unwrap.unwrap(params)
        nnx_objects = unwrap.find_nnx_objects(params)
        settings = Settings(COPY_ALL, update_period, donate, nnx_objects=nnx_objects)
        slow = construct.first_slow_copy(arrays, construct.Storage(construct.leaf_dtypes(arrays)))
        self.__attrs_init__(State(settings, slow.params, host_count(0)))


register_pytree(EMATarget)
register_pytree(PeriodicTarget)
