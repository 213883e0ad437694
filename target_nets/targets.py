"""The classes: a slow copy of a model's parameters and the counter of its updates, in one object.

`EMATarget` averages, `PeriodicTarget` copies. Both are plain objects that are updated in place, and both
are pytrees. So the same code works in eager Python and inside jax's transformations.

Three traps that no check can see:

- A target that is updated inside `jax.jit` or `nnx.jit`, and neither returned nor part of an nnx object,
  keeps its old value outside: `jit` gave the function a copy. Return it.
- A function that reads `target.params` inside `jit`, of a target that was not passed in, compiles the
  value as a constant and never sees a later update. Pass the target in.
- `nnx.Optimizer(agent, ..., wrt=nnx.Param)` over an agent that owns a target holds the slow copy, too,
  and weight decay would shrink it. Build the optimizer over the network.
"""

from typing import TypeVar, final

from jax.typing import ArrayLike, DTypeLike

from target_nets._src import construct
from target_nets._src.state import COPY_ALL, Count, Rule, Schedule, Settings, State, host_count
from target_nets._src.target import Target, register_pytree

__all__ = ["EMATarget", "PeriodicTarget"]

P = TypeVar("P")


@final
class EMATarget(Target[P]):
    """A target whose parameters are a moving average of the online parameters (Polyak averaging).

    Call `update` after each gradient step and read `params`. Both classes are pytrees: pass a target
    into jit, scan, vmap or shard_map as an argument, and return it. flax.serialization saves what
    changes, the slow copy and the counters; the settings below are code, and the template's are used.

    Args:
      params: The parameters to start from: a tree of arrays of any shapes and dtypes (of an Equinox
        module, `eqx.filter(module, eqx.is_array)`). They are copied; where they are placed, the slow
        copy stays.
      step_size: How far an update moves the slow copy towards the online parameters, in [0, 1]; that
        is, 1 - decay. A number; a scalar array, which is a leaf of the target and may be swept with
        `vmap`; or a schedule, a hashable callable of the number of averagings done before this one.
        It is called with a traced int32 scalar. Arrays and what a schedule returns are clipped to
        [0, 1], and nan counts as 0. Eager updates hand a schedule's argument to the device each time,
        which `jax.transfer_guard("disallow")` refuses.
      update_period: Average on every so many-th update only.
      mask: Which leaves to average, as in `optax.masked`: a tree prefix of booleans, or a callable of
        the parameters that returns one. The others are copied, as one may want of BatchNorm's
        statistics. None: all.
      accumulator_dtype: The floating dtype that averaged leaves are held in (for complex leaves, that of
        their parts, at least float32); what it cannot hold becomes inf. None: their own, but float32
        for floats below 32 bits: a bfloat16 average at step size 0.005 never moves.
      compensated: Whether to hold the rounding error, too, in as many arrays again: then the average is
        right to one unit in the last place at any step size (as float32 holds it), however many
        updates. Worth its memory for float32 and step sizes below 1e-3. In a narrower
        `accumulator_dtype`, average and error together have twice its bits: 16 of bfloat16.
      skip_nonfinite: Whether to leave out an averaging of online parameters that hold inf or nan in any
        inexact leaf: all of the slow copy stays, `step` counts, and so does `skipped`. The device
        decides, and the host does not wait. Not for use inside `shard_map`, where each shard would
        decide for itself: jax refuses it, unless told not to check (`check_vma=False`).
      donate: Whether `update` and `sync` in eager Python reuse the slow copy's memory. Then an earlier
        `target.params` can no longer be read.

    Raises:
      TypeError, ValueError: An argument is of the wrong type or out of range.

    References:
      Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; Lillicrap et
      al., "Continuous control with deep reinforcement learning", 2015 (target networks).

    Example:
      >>> import jax.numpy as jnp
      >>> from target_nets import EMATarget
      >>> target = EMATarget({"w": jnp.zeros(2)}, step_size=0.25)
      >>> target.update({"w": jnp.ones(2)}).update({"w": jnp.ones(2)})
      EMATarget(step=2, step_size=0.25, update_period=1, arrays=1, parameters=2, bytes=8)
      >>> target.params
      {'w': Array([0.4375, 0.4375], dtype=float32)}

      As an argument and a result of a transformation:

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
        dtypes = construct.leaf_dtypes(params)
        averaged = construct.resolve_mask(mask, params)
        stored = construct.storage_dtypes(dtypes, averaged, accumulator_dtype)
        fixed_step_size, array_step_size = construct.parse_step_size(step_size)
        settings = Settings(
            rule=Rule(all(averaged) or averaged, fixed_step_size),
            update_period=update_period,
            donate=donate,
            dtypes=None if stored == dtypes else tuple(dtypes),
            compensated=compensated,
            skip_nonfinite=skip_nonfinite,
            step_size_is_array=array_step_size is not None,
        )
        slow = construct.start_slow_copy(params, stored)
        state = State(
            slow,
            host_count(0),
            skipped=construct.zero_counter(slow) if skip_nonfinite else None,
            compensation=construct.zero_compensation(slow, averaged) if compensated else None,
            step_size=array_step_size,
        )
        self.__attrs_init__(settings, state)

    @property
    def skipped(self) -> Count:
        """How many averagings `skip_nonfinite` has left out so far: a 0-d int32 array.

        On the device after an update: reading its value waits for that. A schedule's argument is the
        number of averagings due less these, and never below 0. Past 2**31-1 the former stays, so that
        each one skipped then takes the schedule back by one.

        Example:
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": 0.0}, step_size=0.5, skip_nonfinite=True)
          >>> target.update({"w": float("nan")}).skipped
          Array(1, dtype=int32)
        """
        return host_count(0) if self._state.skipped is None else self._state.skipped


@final
class PeriodicTarget(Target[P]):
    """A target whose parameters are a copy of the online parameters, taken every so many updates.

    Used, passed into transformations and saved as an `EMATarget` is.

    Args:
      params: The parameters to start from: a tree of arrays of any shapes and dtypes. They are copied;
        where they are placed, the slow copy stays.
      update_period: K: the updates K, 2K, ... copy the online parameters.
      donate: Whether `update` and `sync` in eager Python reuse the slow copy's memory. Then an earlier
        `target.params` can no longer be read.

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
        slow = construct.start_slow_copy(params, construct.leaf_dtypes(params))
        self.__attrs_init__(Settings(COPY_ALL, update_period, donate), State(slow, host_count(0)))


register_pytree(EMATarget)
register_pytree(PeriodicTarget)
