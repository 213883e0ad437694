"""The classes: a slow copy of a model's parameters and the counter of its updates, in one object.

`EMATarget` averages, `PeriodicTarget` copies. Both are plain objects, updated in place, and pytrees,
so that the same code works in eager Python and inside jax's transformations.

Three traps that no check can see:

- A target updated inside `jax.jit` or `nnx.jit` that is neither returned nor part of an nnx object
  keeps its old value outside: `jit` gave the function a copy. Return it.
- Whoever reads `target.params` inside `jit` without passing the target in compiles its value as a
  constant, and never sees a later update. Pass the target in.
- `nnx.Optimizer(agent, ..., wrt=nnx.Param)` over an agent that owns a target holds the slow copy, too,
  and weight decay would shrink it. Build the optimizer over the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar, final

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer, eval_context
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey, keystr, tree_map_with_path
from jax.typing import ArrayLike, DTypeLike

from target_nets import rules

try:
    from jax.extend.core import get_opaque_trace_state as _current_trace
except ImportError:  # before jax 0.10
    from jax.core import get_opaque_trace_state as _current_trace

P = TypeVar("P")
Schedule = Callable[[jax.Array], ArrayLike]
Mask = Any  # a tree prefix of booleans, or a callable of the parameters that returns one

_NAMES = ("online_params", "the slow copy")
with eval_context():  # for a first import inside a traced function
    _EAGER = _current_trace()


def _period(update_period: Any) -> int:
    period = rules.check_update_period(update_period)
    if not isinstance(period, int):
        raise TypeError("update_period: expected a Python integer, got a jax.Array")
    return period


@attrs.frozen(cache_hash=True)
class _Settings:
    """What is fixed when a target is made: code, not state. The static part of its pytree."""

    update_period: int = attrs.field(converter=_period)
    donate: bool = attrs.field(validator=attrs.validators.instance_of(bool))
    averaged: bool | tuple[bool, ...]  # a leaf each, or all or none of them; the others are copied
    step_size: float | Schedule | None = None  # None: an array, or nothing to average
    swept: bool = False  # it is an array, and so a leaf
    dtypes: tuple[Any, ...] | None = None  # what `params` casts its leaves to; None: no cast is needed
    compensated: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))
    skip_nonfinite: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))

    @property
    def children(self) -> tuple[str, ...]:
        """The names of what the state holds, and the pytree has as children."""
        optional = {
            "skipped": self.skip_nonfinite,
            "compensation": self.compensated,
            "step_size": self.swept,
        }
        return ("params", "step", *(name for name, there in optional.items() if there))


class _State(NamedTuple):
    """What updates replace, as a whole: so it is always the state after one and the same update."""

    params: Any
    step: Any
    skipped: Any = None
    compensation: Any = None  # what rounding cut off; None for leaves that are not averaged
    step_size: Any = None


@attrs.define(eq=False, init=False, repr=False)
class _Target(Generic[P]):
    """All that the two classes share; they differ in their settings only."""

    _settings: _Settings
    _state: _State
    _trace: Any = attrs.field(factory=_current_trace)  # where this object may be updated
    _matched: bool = False  # whether online parameters have been checked yet

    if TYPE_CHECKING:  # what attrs makes of the fields above

        def __attrs_init__(self, settings: _Settings, state: _State) -> None: ...

    @property
    def params(self) -> P:
        """The slow copy: structure, shapes and dtypes of the online parameters.

        A slow copy held in other dtypes is cast on reading, in one compiled call. Otherwise these are
        the target's own arrays: to train on from them, copy them before they are donated.

        Example:
          >>> import jax.numpy as jnp
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": jnp.zeros(2, jnp.bfloat16)}, step_size=0.5)
          >>> target.params  # held in float32, read in bfloat16
          {'w': Array([0, 0], dtype=bfloat16)}
        """
        state, dtypes = self._state, self._settings.dtypes  # once: another thread may replace it
        params, compensation = state.params, state.compensation
        if dtypes is None:
            return jax.tree.map(lambda x: x, params)  # whoever changes a container changes their own
        try:
            return _cast(params, compensation, dtypes=dtypes)
        except TypeError:  # the target is abstract, from jax.eval_shape, and so are its parameters
            return jax.eval_shape(partial(_cast, dtypes=dtypes), params, compensation)

    @property
    def step(self) -> jax.Array | np.ndarray[Any, np.dtype[np.int32]]:
        """How many updates so far: a 0-d int32 array, on the host until it has been through jit.

        The next eager update brings it back there. It stays within int32: after the largest multiple of
        the update period up to 2**31-1 it goes back by one period.

        Example:
          >>> from target_nets import PeriodicTarget
          >>> target = PeriodicTarget({"w": 0.0}, update_period=100)
          >>> target.update({"w": 1.0}).update({"w": 2.0}).step
          array(2, dtype=int32)
        """
        return self._state.step

    def update(self, online_params: P) -> Self:
        """Counts an update and, where one is due, moves the slow copy. In place.

        So whoever holds this target sees the change; `copy.copy(target)` keeps an old one.

        Args:
          online_params: The online parameters, with the structure and shapes of `params`.

        Returns:
          The target itself, so that it composes in a scan body.

        Raises:
          ValueError: A structure or shape differs.
          TypeError: A leaf is no number, or of a wider kind than that of the slow copy.
          RuntimeError: The target was not passed into the jax transformation that is running.
          Whatever is raised, the target is as it was before.

        Example:
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": 0.0}, step_size=0.5)
          >>> target.update({"w": 1.0}).params
          {'w': Array(0.5, dtype=float32)}
        """
        move = self._compiled("update")
        settings, state = self._settings, self._state
        period, step = settings.update_period, state.step

        def moved(n: Any, slow: Any) -> Any:
            static = {"step_size": settings.step_size, "averaged": settings.averaged}
            return self._moved(move, online_params, slow, state.step_size, n, **static)

        _refuse("update", step)
        if isinstance(state.step_size, jax.ShapeDtypeStruct):
            raise TypeError(
                "update: the step size is abstract and was not saved; restore into a target with it"
            )
        slow = state.params, state.compensation, state.skipped
        if isinstance(step, Tracer):
            step = _next(step, period)
            due = partial(moved, step // period - 1)
            slow = due(slow) if period == 1 else lax.cond(step % period == 0, due, lambda x: x, slow)
        else:
            count = _next(int(step), period)  # after jit this waits for the step, once
            step = _int32(count)
            if count % period == 0:
                n = _int32(count // period - 1) if callable(settings.step_size) else None
                slow = moved(n, slow)
            elif not self._matched:
                rules.match(online_params, state.params, _NAMES)
        params, compensation, skipped = slow
        self._state = _State(params, step, skipped, compensation, state.step_size)
        self._matched = True
        return self

    def sync(self, online_params: P) -> Self:
        """Copies all online parameters now, whatever the period, the mask and the values. In place.

        `step` stays.

        Args:
          online_params: The online parameters, with the structure and shapes of `params`.

        Returns:
          The target itself.

        Raises:
          ValueError, TypeError, RuntimeError: As `update` does.

        Example:
          >>> import jax.numpy as jnp
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": jnp.zeros(2)}, step_size=0.5)
          >>> target.sync({"w": jnp.ones(2)}).params
          {'w': Array([1., 1.], dtype=float32)}
        """
        move, state = self._compiled("sync"), self._state
        _refuse("sync", state.step)
        slow = state.params, state.compensation, None
        params, compensation, _ = self._moved(move, online_params, slow, averaged=False)
        self._state = state._replace(params=params, compensation=compensation)
        self._matched = True
        return self

    def distance(self, online_params: P) -> jax.Array:
        """How far the slow copy lags behind: the global L2 norm of online - slow.

        Args:
          online_params: The online parameters, with the structure and shapes of `params`.

        Returns:
          A scalar over all inexact leaves, float32 or wider.

        Raises:
          ValueError, TypeError: As `update` does.

        Example:
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": 0.0, "b": 0.0}, step_size=0.5)
          >>> target.distance({"w": 3.0, "b": 4.0})
          Array(5., dtype=float32)
        """
        state = self._state
        _refuse("distance", state.step)
        online, _ = self._placed(online_params)
        return rules.named(_distance, online, state.params, state.compensation, names=_NAMES)

    def _compiled(self, method: str) -> Any:
        """The compiled function to call here and now."""
        if self._trace != _current_trace():
            raise RuntimeError(
                f"{type(self).__name__}.{method}: this target was made outside of the function that jax "
                "is transforming here (jit, scan, vmap, cond, grad, ...), so that the result would be "
                "lost or leak. Pass the target into that function as an argument and return it; "
                "of a loss, take the gradient first and update the target outside."
            )
        return _MOVE[self._settings.donate and self._trace == _EAGER]

    def _moved(self, move: Any, online: Any, slow: Any, *args: Any, **static: Any) -> Any:
        """The slow copy, its compensation and the count of skipped averagings after a move."""
        online, placed = self._placed(online)
        after = rules.named(move, online, *slow, *args, names=_NAMES, placed=placed, **static)
        if self._trace == _EAGER:
            return after
        return *rules.alike(after[:2], slow[:2]), after[2]

    def _placed(self, online: Any) -> tuple[Any, tuple[Any, ...] | None]:
        """The online parameters on the slow copy's devices, and how that is sharded, if it is known."""
        if self._trace != _EAGER or jax.device_count() == 1:
            return online, None
        return rules.onto(online, self._state.params), rules.shardings(self._state.params)

    def __repr__(self) -> str:
        settings, state = self._settings, self._state
        parts: dict[str, Any] = {"step": state.step}
        if settings.skip_nonfinite:
            parts["skipped"] = state.skipped
        if settings.averaged is not False:
            parts["step_size"] = state.step_size if settings.swept else settings.step_size
        parts["update_period"] = settings.update_period
        if isinstance(settings.averaged, tuple):
            parts["averaged"] = f"{sum(settings.averaged)} of {len(settings.averaged)}"
        parts |= {name: True for name in ("compensated", "donate") if getattr(settings, name)}
        leaves, errors = jax.tree.leaves(state.params), jax.tree.leaves(state.compensation)
        both = [*leaves, *errors]
        if all(hasattr(x, "shape") and hasattr(x, "dtype") for x in both):  # else stand-ins, as in nnx
            parts["arrays"] = len(leaves)
            parts["parameters"] = sum(math.prod(x.shape) for x in leaves)
            parts["bytes"] = sum(math.prod(x.shape) * x.dtype.itemsize for x in both)
        return f"{type(self).__name__}({', '.join(f'{k}={_brief(v)}' for k, v in parts.items())})"

    def __copy__(self) -> Self:
        state = self._state
        counters = {"step": state.step, "skipped": state.skipped}
        on_host = {k: v for k, v in counters.items() if not isinstance(v, jax.Array)}  # they stay there
        return _made(type(self), self._settings, _own(state)._replace(**on_host))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def _replaced(self, **saved: Any) -> Self:
        """A new target with the same settings."""
        step_size = self._state.step_size
        if isinstance(step_size, jax.Array):
            step_size = _own(step_size)
        return _made(type(self), self._settings, _State(**saved, step_size=step_size))

    def __reduce__(self) -> Any:
        return _made, (type(self), self._settings, self._state)


@final
@attrs.define(eq=False, init=False, repr=False)
class EMATarget(_Target[P]):
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

    def __init__(
        self,
        params: P,
        step_size: ArrayLike | Schedule,
        *,
        update_period: int = 1,
        mask: Mask = None,
        accumulator_dtype: DTypeLike | None = None,
        compensated: bool = False,
        skip_nonfinite: bool = False,
        donate: bool = False,
    ) -> None:
        dtypes = _dtypes(params)
        averaged = _resolved(mask, params)
        held = _held(dtypes, averaged, accumulator_dtype)
        fixed, array = _sorted_step_size(step_size)
        settings = _Settings(
            update_period=update_period,
            donate=donate,
            averaged=all(averaged) or averaged,
            step_size=fixed,
            swept=array is not None,
            dtypes=None if held == dtypes else tuple(dtypes),
            compensated=compensated,
            skip_nonfinite=skip_nonfinite,
        )
        slow = _begun(params, held)
        state = _State(
            params=slow,
            step=_int32(0),
            skipped=_counter(slow) if skip_nonfinite else None,
            compensation=_no_errors(slow, averaged) if compensated else None,
            step_size=array,
        )
        self.__attrs_init__(settings, state)

    @property
    def skipped(self) -> jax.Array | np.ndarray[Any, np.dtype[np.int32]]:
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
        return self._state.skipped if self._settings.skip_nonfinite else _int32(0)


@final
@attrs.define(eq=False, init=False, repr=False)
class PeriodicTarget(_Target[P]):
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

    def __init__(self, params: P, update_period: int, *, donate: bool = False) -> None:
        settings = _Settings(update_period=update_period, donate=donate, averaged=False)
        self.__attrs_init__(settings, _State(_begun(params, _dtypes(params)), _int32(0)))


# One update, compiled


def _move(
    online: Any,
    slow: Any,
    compensation: Any,
    skipped: Any = None,
    swept: Any = None,
    n: Any = None,
    *,
    step_size: float | Schedule | None = None,
    averaged: bool | tuple[bool, ...],
    placed: tuple[Any, ...] | None = None,
) -> tuple[Any, Any, Any]:
    """The slow copy, its compensation and the count of skipped averagings after a move."""
    pairs, treedef = rules.match(online, slow, _NAMES)
    errors = _errors(compensation, treedef)
    which = averaged if isinstance(averaged, tuple) else [averaged] * len(pairs)
    rate: Any = step_size if swept is None else swept
    if callable(step_size):
        n = n if skipped is None else jnp.maximum(n - skipped, 0)
        rate = jnp.asarray(rules.real_scalar("step_size, as the schedule returned it", step_size(n)))
    plain, exact = (rules.once_a_shape(rule, rate) for rule in (rules.average, rules.compensated))

    finite = None if skipped is None else rules.all_finite([new for new, _ in pairs])

    def moved(new: Any, old: Any, error: Any, average: bool) -> tuple[Any, Any]:
        if finite is not None:
            new = rules.zero_unless(finite, new)
        if not average:  # the zeros of an error are its own, where it is placed
            after = rules.copy(new, old), None if error is None else error - error
        else:
            after = (plain(new, old), None) if error is None else exact(new, old, error)
        return (
            after if finite is None else jax.tree.map(partial(lax.select, finite), after, (old, error))
        )

    after = [
        rules.kept(partial(moved, average=average), new, (old, error), sharding)
        for (new, old), error, average, sharding in zip(
            pairs, errors, which, placed or [None] * len(pairs), strict=True
        )
    ]
    if finite is not None:
        skipped = jax.tree.map(partial(lax.select, finite), skipped, _next(skipped, 1))
    params = treedef.unflatten([value for value, _ in after])
    if compensation is not None:
        compensation = treedef.unflatten([error for _, error in after])
    return params, compensation, skipped


def _errors(compensation: Any, treedef: Any) -> list[Any]:
    """The compensation leaf by leaf: None where there is none."""
    return [None] * treedef.num_leaves if compensation is None else treedef.flatten_up_to(compensation)


# A copy does not read the slow copy: unless it is kept as an argument, its memory is not reused.
_MOVE = {
    donate: jax.jit(
        _move,
        static_argnames=("step_size", "averaged", "placed"),
        donate_argnames=("slow", "compensation") if donate else (),
        keep_unused=donate,
    )
    for donate in (False, True)
}


def _next(step: Any, period: int) -> Any:
    """The step after this one; past int32 it goes back by a period, so that periods are kept."""
    last = rules.INT32_MAX // period * period
    if isinstance(step, int):
        return step + 1 - period * (step >= last)
    return jnp.where(step >= last, step + 1 - period, step + 1)


def _refuse(method: str, step: Any) -> None:
    """Says what is to be done with a target that is not one target of arrays."""
    if isinstance(step, jax.ShapeDtypeStruct):
        raise TypeError(f"{method}: this target is abstract, from jax.eval_shape; restore it first")
    if np.ndim(step) and method != "sync":  # a copy of all is a copy of each
        shape = list(np.shape(step))
        raise ValueError(f"{method}: a population, its step of shape {shape}; call it inside jax.vmap")


def _int32(count: int) -> np.ndarray:
    """A count as an array on the host, which nobody can write to."""
    array = np.array(count, np.int32)
    array.setflags(write=False)
    return array


@partial(jax.jit, static_argnames="dtypes")
def _cast(params: P, compensation: Any, dtypes: tuple[Any, ...]) -> P:
    leaves, treedef = jax.tree.flatten(params)
    held = zip(leaves, _errors(compensation, treedef), dtypes, strict=True)

    def cast(x: Any, error: Any, dtype: Any) -> Any:
        if x.dtype == dtype:
            return x
        return rules.put_back(rules.total(*rules.on_device((x, error)), dtype), (x, error))

    return treedef.unflatten([cast(*leaf) for leaf in held])


@jax.jit
def _distance(online: Any, slow: Any, compensation: Any) -> jax.Array:
    pairs, treedef = rules.match(online, slow, _NAMES)
    gaps = []
    for (new, old), error in zip(pairs, _errors(compensation, treedef), strict=True):
        if jnp.issubdtype(old.dtype, jnp.inexact):
            near, slow = rules.beside(new, (old, error))
            gaps.append(rules.difference(near, *slow))
    total = jnp.asarray(sum((jnp.sum(jnp.abs(gap) ** 2) for gap in gaps), 0.0))
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), total)  # has a gradient at 0


# What the constructors make of their arguments


def _dtypes(params: Any) -> list[Any]:
    """The dtypes of the parameters, as jax canonicalizes them."""
    return [aval.dtype for aval in rules.array_types(params, "params")]


def _resolved(mask: Mask, params: Any) -> tuple[bool, ...]:
    """Which leaves to average, a boolean each."""
    if mask is None:
        mask = True
    elif callable(mask) and rules.is_leaf(mask):  # a Module of booleans is callable, too
        mask = mask(params)

    def spread(path: rules.Path, value: Any, branch: Any) -> Any:
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"mask{keystr(path)}: expected a boolean, got {rules.describe(value)}")
        return [bool(value)] * jax.tree.structure(branch).num_leaves

    try:
        return tuple(jax.tree.leaves(tree_map_with_path(spread, mask, params)))
    except ValueError as error:
        raise ValueError(f"mask: expected a tree prefix of params; {error}") from None


def _held(dtypes: list[Any], averaged: tuple[bool, ...], accumulator: Any) -> list[Any]:
    """The dtypes that the slow copy is held in."""
    if accumulator is not None:
        try:
            accumulator = jnp.dtype(accumulator)
        except TypeError:
            raise TypeError(f"accumulator_dtype: expected a dtype, got {accumulator!r}") from None
        if not jnp.issubdtype(accumulator, jnp.floating):
            raise TypeError(f"accumulator_dtype: expected a floating dtype, got {accumulator}")
        if jax.dtypes.canonicalize_dtype(accumulator) != accumulator:
            raise ValueError(f"accumulator_dtype: {accumulator} needs jax_enable_x64")

    def held(dtype: Any) -> Any:
        if not jnp.issubdtype(dtype, jnp.inexact):
            return dtype
        if accumulator is None:
            return rules.widened(dtype)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return jnp.dtype(jnp.complex128 if accumulator.itemsize == 8 else jnp.complex64)
        return accumulator

    return [held(dtype) if average else dtype for dtype, average in zip(dtypes, averaged, strict=True)]


def _counter(slow: Any) -> Any:
    """A counter that begins where updates will leave it: beside the slow copy, if that was placed."""
    for x in jax.tree.leaves(slow):
        if sharding := rules.placement(x):
            if isinstance(sharding, NamedSharding):
                sharding = NamedSharding(sharding.mesh, PartitionSpec())
            return jax.device_put(_int32(0), sharding)
    return _int32(0)


def _no_errors(slow: Any, averaged: tuple[bool, ...]) -> Any:
    """The compensation to start with: zeros for the leaves that are averaged, None for the others."""
    leaves, treedef = jax.tree.flatten(slow)
    eager = _current_trace() == _EAGER

    def zeros(x: Any) -> Any:
        start = jnp.zeros_like(x)
        if eager:  # they are where x is
            return start
        return rules.alike(rules.kept(lambda zeros, *_: zeros, start, (x, None)), x)

    return treedef.unflatten(
        [
            zeros(x) if average and jnp.issubdtype(x.dtype, jnp.inexact) else None
            for x, average in zip(leaves, averaged, strict=True)
        ]
    )


def _sorted_step_size(step_size: Any) -> tuple[Any, jax.Array | None]:
    """A step size by what it is: a number or a schedule, or an array."""
    if callable(step_size):
        try:
            hash(step_size)
        except TypeError:
            raise TypeError(f"step_size: a schedule must be hashable, got {step_size!r}") from None
        return step_size, None
    checked = rules.check_step_size(step_size)
    if isinstance(step_size, jax.Array | np.ndarray):
        return None, jnp.array(step_size)
    return checked, None


def _own(tree: P) -> P:
    """A copy in memory of its own, where the arrays are placed."""
    tree = rules.own_numpy(tree)
    # Of arrays whose parts are in several processes, jax must be told the place.
    return jax.device_put(tree, jax.tree.map(rules.placement, tree), may_alias=False)


def _begun(params: Any, dtypes: list[Any]) -> Any:
    """The slow copy to start with: strongly typed copies of the parameters."""
    leaves, treedef = jax.tree.flatten(_own(params))
    return treedef.unflatten(
        [x if rules.is_key(x) else x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]
    )


def _brief(value: Any) -> str:
    """A setting or a counter for `repr`."""
    if isinstance(value, Tracer):
        return "traced"
    if isinstance(value, jax.Array) and value.is_deleted():
        return "deleted"
    if isinstance(value, jax.Array | np.ndarray):
        return _brief(value.item()) if value.size == 1 else rules.describe(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return getattr(value, "__qualname__", None) or str(value)


# As pytrees and as flax data


def _made(cls: type[_Target[P]], settings: _Settings, state: _State) -> Any:
    target = object.__new__(cls)
    target.__attrs_init__(settings, state)
    return target


def _flatten_with_keys(target: _Target[Any]) -> tuple[Any, _Settings]:
    state, names = target._state, target._settings.children
    return [(GetAttrKey(name), getattr(state, name)) for name in names], target._settings


def _flatten(target: _Target[Any]) -> tuple[Any, _Settings]:
    state = target._state
    return [getattr(state, name) for name in target._settings.children], target._settings


def _unflatten(cls: type[_Target[Any]], settings: _Settings, children: Any) -> Any:
    return _made(cls, settings, _State(**dict(zip(settings.children, children, strict=True))))


for _class in (EMATarget, PeriodicTarget):
    jax.tree_util.register_pytree_with_keys(
        _class,
        _flatten_with_keys,
        partial(_unflatten, _class),
        _flatten,
    )
    nnx.register_data_type(_class)
