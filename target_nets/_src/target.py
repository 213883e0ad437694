"""The base class of both targets: its state, its methods, and its registration as a pytree."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import attrs
import jax
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.tree_util import GetAttrKey

from target_nets._src import summary, trace, update, views
from target_nets._src.checks import refuse_foreign_names
from target_nets._src.leaves import PyTree
from target_nets._src.placement import copy_to_own_buffers, own_host_arrays, pin_constants, put_beside
from target_nets._src.state import Count, Settings, State

P = TypeVar("P")


@attrs.define(eq=False, init=False, repr=False)
class Target(Generic[P]):
    """A slow copy of a model's parameters and a counter of its updates."""

    _state: State  # each method reads it only once, since another thread may replace it
    # Held while the state is replaced. Reentrant, so that what interrupts an update may update.
    _lock: AbstractContextManager[bool] = attrs.field(factory=RLock, init=False)
    _trace: trace.Trace = attrs.field(factory=trace.current_trace)  # where it may be changed in place

    def __new__(cls, *_: Any, **arguments: Any) -> Self:
        """Makes an empty target, or says how to write an argument that has another name elsewhere."""
        refuse_foreign_names(cls.__name__, arguments)
        return super().__new__(cls)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__base__ is not None and cls.__base__.__name__ != "Target":
            raise TypeError(f"{cls.__name__}: the classes of targets are final; hold a target instead")

    if TYPE_CHECKING:  # attrs writes this method

        def __attrs_init__(self, state: State) -> None: ...

    @property
    def params(self) -> P:
        """The slow copy, with the structure, shapes and dtypes of the parameters it was made from.

        nnx objects come back as they were, with types and metadata, each time in new Variables. Leaves
        that are stored in another dtype, or together with a rounding error, are converted on reading, in
        one compiled call. The others may be the target's own arrays. To continue training from them,
        copy them: your train step may donate them, and with `donate=True` the next update does. An
        abstract target, from `jax.eval_shape`, has abstract parameters.

        Example:
          >>> import jax.numpy as jnp
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": jnp.zeros(2, jnp.bfloat16)}, step_size=0.5)
          >>> target.params  # stored in float32, read in bfloat16
          {'w': Array([0, 0], dtype=bfloat16)}
        """
        return views.read_params(self._state)

    @property
    def step(self) -> Count:
        """How many updates so far: a 0-d int32 array.

        It is a NumPy array. After the target has been through jit it is a jax array, until the next
        eager update. It stays within int32: after the largest multiple of the update period up to
        2**31-1 it goes back by one period.

        Example:
          >>> from target_nets import PeriodicTarget
          >>> target = PeriodicTarget({"w": 0.0}, update_period=100)
          >>> target.update({"w": 1.0}).update({"w": 2.0}).step
          array(2, dtype=int32)
        """
        return self._state.step

    @property
    def update_period(self) -> int:
        """The number of updates from one averaging, or copy, to the next.

        Example:
          >>> from target_nets import PeriodicTarget
          >>> PeriodicTarget({"w": 0.0}, update_period=100).update_period
          100
        """
        return self._state.settings.update_period

    def update(self, online_params: P) -> Self:
        """Counts an update in place and, at every `update_period`-th one, changes the slow copy.

        Everyone who holds this target sees the change. `updated` returns a new target instead. Threads
        that update one target take turns. The structure and shapes of the parameters are checked at the
        first update and at every averaging. If an error is raised, the target is as it was before.

        Args:
          online_params: The online parameters, with the structure and shapes of `params`. The kind of a
            leaf may be narrower than that of the slow copy (bool < int < float < complex). An nnx
            module, its `nnx.State` and its pure dict are the same here. Refs are read.

        Returns:
          The target itself, so that calls can be chained, and returned from the body of a scan.

        Raises:
          ValueError: The structures or the shapes of two leaves differ, an integer does not fit the
            slow copy's dtype, `vmap` has batched the target, or the target was made with
            `jax_enable_x64` and that is off now.
          TypeError: A leaf is not an array or a number, its kind is wider than that of the slow copy,
            its integer dtype does not fit into the slow copy's, or the target is abstract.
          RuntimeError: The target was not passed into the jax transformation that is running.

        Example:
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": 0.0}, step_size=0.5)
          >>> target.update({"w": 1.0}).params
          {'w': Array(0.5, dtype=float32)}
        """
        self._check_trace("update")
        with self._lock:
            state = self._state
            self._state = update.advance(state, online_params, donate=state.settings.donate)
        return self

    def updated(self, online_params: P) -> Self:
        """Returns a new target after one more update. This one stays as it was.

        This is a pure function of the target and the online parameters, and may be called anywhere. Use
        it if you still need the old target: to read it after the update, to roll a step back, or in a
        branch of `lax.cond` that closes over it. Inside jit it costs what `update` costs.

        Args:
          online_params: The online parameters, as for `update`.

        Returns:
          The new target. Where no averaging was due, its slow copy is the same arrays as this one's:
          donate neither of them to a function then. With `donate=True` it is a copy.

        Raises:
          ValueError, TypeError: As `update` does.

        Example:
          >>> from target_nets import EMATarget
          >>> old = EMATarget({"w": 0.0}, step_size=0.5)
          >>> new = old.updated({"w": 1.0})
          >>> old.params, new.params
          ({'w': Array(0., dtype=float32)}, {'w': Array(0.5, dtype=float32)})
        """
        old = self._state
        if self._trace != trace.current_trace():  # a transformation closes over this target
            old = old.with_slow(pin_constants(old.slow))
        new = update.advance(old, online_params, donate=False)
        if old.settings.donate and new.params is old.params and not isinstance(new.step, Tracer):
            # No averaging was due, so both targets hold the same arrays. If one target donated them
            # later, the other would lose them.
            new = new.with_slow(copy_to_own_buffers(new.slow))
        if isinstance(new.step_size, jax.Array) and not isinstance(new.step_size, Tracer):
            # A function that the old target is donated to must not delete it here.
            new = new._replace(step_size=copy_to_own_buffers(new.step_size))
        return make_target(type(self), new)

    def sync(self, online_params: P) -> Self:
        """Copies all online parameters now, in place.

        The period, the mask and `skip_nonfinite` do not matter. `step` and `skipped` stay, and the
        rounding errors of `compensated` are cleared. A population, which `vmap` has batched, is copied
        as a whole.

        Args:
          online_params: The online parameters, as for `update`.

        Returns:
          The target itself.

        Raises:
          ValueError, TypeError, RuntimeError: As `update` does, but a population is accepted.

        Example:
          >>> import jax.numpy as jnp
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": jnp.zeros(2)}, step_size=0.5)
          >>> target.sync({"w": jnp.ones(2)}).params
          {'w': Array([1., 1.], dtype=float32)}
        """
        self._check_trace("sync")
        with self._lock:
            state = self._state
            self._state = update.sync(state, online_params, donate=state.settings.donate)
        return self

    def distance(self, online_params: P) -> jax.Array:
        """Returns how far the slow copy lags behind: the global L2 norm of online - slow.

        Args:
          online_params: The online parameters, as for `update`.

        Returns:
          A scalar over all inexact leaves, float32 or wider, on the device.

        Raises:
          ValueError, TypeError: As `update` does.

        Example:
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": 0.0, "b": 0.0}, step_size=0.5)
          >>> target.distance({"w": 3.0, "b": 4.0})
          Array(5., dtype=float32)
        """
        return views.read_distance(self._state, online_params)

    def __repr__(self) -> str:
        return summary.summarize(type(self).__name__, self._state)

    def _check_trace(self, method: str) -> None:
        """Raises if a change in place would be lost, or would leak a tracer."""
        if self._trace != trace.current_trace():
            raise RuntimeError(
                f"{type(self).__name__}.{method}: this target was made outside of the function that jax "
                "is transforming (jit, scan, vmap, cond, grad, ...), so the change would be lost, or "
                "made only once, while jax traces. Pass the target into that function as an argument "
                "and return it, or call `updated`, which returns a new target. In a loss, take the "
                "gradient first and update after it."
            )

    def __copy__(self) -> Self:
        state = self._state
        counts = {"step": state.step, "skipped": state.skipped, "step_size": state.step_size}
        # Counters that are NumPy arrays are read-only, so both targets can share them.
        on_device = {name: x for name, x in counts.items() if isinstance(x, jax.Array)}
        slow, on_device = copy_to_own_buffers((state.slow, on_device))
        return make_target(type(self), state.with_slow(slow)._replace(**on_device))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def __getstate__(self) -> State:
        """Returns all that a target holds. Pickles, pytrees and state dicts are made from it."""
        return self._state

    def __setstate__(self, state: State) -> None:
        # A pickle does not keep arrays read-only.
        children = own_host_arrays({name: getattr(state, name) for name in state.settings.child_names})
        self.__attrs_init__(state._replace(**children))


AnyTarget = TypeVar("AnyTarget", bound=Target[Any])


def make_target(target_class: type[AnyTarget], state: State) -> AnyTarget:
    """Makes a target from what `__getstate__` returns, without any check."""
    target = object.__new__(target_class)
    target.__attrs_init__(state)
    return target


# Registration


def register_pytree(target_class: type[Target[Any]]) -> None:
    """Registers a class as a jax pytree with named keys, and as data that an nnx object may hold."""
    unflatten = partial(_unflatten, target_class)
    jax.tree_util.register_pytree_with_keys(target_class, _flatten_with_keys, unflatten, _flatten)
    nnx.register_data_type(target_class)


def _flatten_with_keys(target: Target[Any]) -> tuple[list[tuple[Any, PyTree]], Settings]:
    children, settings = _flatten(target)
    return list(zip(map(GetAttrKey, settings.child_names), children, strict=True)), settings


def _flatten(target: Target[Any]) -> tuple[list[PyTree], Settings]:
    state = target.__getstate__()
    if isinstance(state.step, np.ndarray):
        # jit would return it beside a slow copy that is placed, and compile again if it came from here.
        state = state._replace(step=put_beside(state.step, state.params))
    return [getattr(state, name) for name in state.settings.child_names], state.settings


def _unflatten(
    target_class: type[Target[Any]], settings: Settings, children: Iterable[PyTree]
) -> Target[Any]:
    # Nothing is checked, since jax may pass anything as a child.
    children = own_host_arrays(list(children))
    state = State(settings, **dict(zip(settings.child_names, children, strict=True)))
    return make_target(target_class, state)
