"""What both classes share: the state and its methods. They differ only in how they are made."""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import attrs
import jax
from flax import nnx
from jax.core import Tracer
from jax.tree_util import GetAttrKey

from target_nets._src import summary, trace, update, views
from target_nets._src.placement import copy_to_own_buffers
from target_nets._src.state import Count, Settings, State
from target_nets._src.trees import PyTree

P = TypeVar("P")


@attrs.define(eq=False, init=False, repr=False)
class Target(Generic[P]):
    """A slow copy of a model's parameters and the count of its updates.

    Attributes:
      _settings: What is fixed when the target is made.
      _state: What updates replace, always as a whole. Each method reads it once, since another thread
        may replace it meanwhile.
      _trace: The trace that the target was made in. Only there it may be changed in place.
    """

    _settings: Settings
    _state: State
    _trace: trace.Trace = attrs.field(factory=trace.current_trace)

    if TYPE_CHECKING:  # attrs writes this method

        def __attrs_init__(self, settings: Settings, state: State) -> None: ...

    @property
    def params(self) -> P:
        """The slow copy: structure, shapes and dtypes of the online parameters.

        If the slow copy is stored in other dtypes, it is cast on reading, in one compiled call.
        Otherwise these are the target's own arrays. To train on from them, copy them before an update
        donates them.

        Example:
          >>> import jax.numpy as jnp
          >>> from target_nets import EMATarget
          >>> target = EMATarget({"w": jnp.zeros(2, jnp.bfloat16)}, step_size=0.5)
          >>> target.params  # stored in float32, read in bfloat16
          {'w': Array([0, 0], dtype=bfloat16)}
        """
        return views.read_params(self._state.slow, self._settings.dtypes)

    @property
    def step(self) -> Count:
        """How many updates so far: a 0-d int32 array, on the host until it has been through jit.

        The next eager update brings it back to the host. It stays within int32: after the largest
        multiple of the update period up to 2**31-1 it goes back by one period.

        Example:
          >>> from target_nets import PeriodicTarget
          >>> target = PeriodicTarget({"w": 0.0}, update_period=100)
          >>> target.update({"w": 1.0}).update({"w": 2.0}).step
          array(2, dtype=int32)
        """
        return self._state.step

    def update(self, online_params: P) -> Self:
        """Counts an update and, where one is due, changes the slow copy. In place.

        Everyone who holds this target sees the change. `updated` returns a new target instead.

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
        self._check_trace("update")
        self._state = update.advance(
            self._state, online_params, self._settings, donate=self._settings.donate
        )
        return self

    def updated(self, online_params: P) -> Self:
        """Returns a new target after one more update. This one stays as it was.

        This is a pure function of the target and the online parameters. Use it in code of a functional
        style, in which the old state may be read again: before a rollback, or in a branch of `lax.cond`
        that closes over the state. Inside jit it costs what `update` costs.

        Args:
          online_params: The online parameters, with the structure and shapes of `params`.

        Returns:
          The new target. With `donate` it shares no memory with this one.

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
        new = update.advance(old, online_params, self._settings, donate=False)
        if self._settings.donate and new.params is old.params and not isinstance(new.step, Tracer):
            # No averaging was due. A later update of either target must not donate the other's memory.
            new = new._replace(**copy_to_own_buffers(new.slow)._asdict())
        return make_target(type(self), self._settings, new)

    def sync(self, online_params: P) -> Self:
        """Copies all online parameters now, whatever the period, the mask and the values. In place.

        `step` stays, and the rounding errors that `compensated` keeps are cleared.

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
        self._check_trace("sync")
        self._state = update.sync(self._state, online_params, donate=self._settings.donate)
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
        return views.read_distance(self._state, online_params)

    def __repr__(self) -> str:
        return summary.summarize(type(self).__name__, self._settings, self._state)

    def _check_trace(self, method: str) -> None:
        """Raises if a change in place would be lost, or would leak out of a transformation."""
        if self._trace != trace.current_trace():
            raise RuntimeError(
                f"{type(self).__name__}.{method}: this target was made outside of the function that jax "
                "is transforming here (jit, scan, vmap, cond, grad, ...). A change in place would be "
                "lost, or would leak a tracer. Pass the target into that function as an argument and "
                f"return it, or use `updated`, which returns a new target. In a loss, take the gradient "
                "first and update the target outside."
            )

    def __copy__(self) -> Self:
        # Counters on the host stay there: nobody can write to them.
        return jax.tree.map(lambda x: copy_to_own_buffers(x) if isinstance(x, jax.Array) else x, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def __getstate__(self) -> tuple[Settings, State]:
        """Returns all that a target is: what a pickle, a pytree and a state dict are made of."""
        return self._settings, self._state

    def __setstate__(self, fields: tuple[Settings, State]) -> None:
        self.__attrs_init__(*fields)


AnyTarget = TypeVar("AnyTarget", bound=Target[Any])


def make_target(target_class: type[AnyTarget], settings: Settings, state: State) -> AnyTarget:
    """Makes a target of what `__getstate__` returns. It checks nothing."""
    target = object.__new__(target_class)
    target.__setstate__((settings, state))
    return target


# As jax pytrees with named keys, and as data of flax.nnx


def register_pytree(target_class: type[Target[Any]]) -> None:
    """Registers a class of targets."""
    unflatten = partial(_unflatten, target_class)
    jax.tree_util.register_pytree_with_keys(target_class, _flatten_with_keys, unflatten, _flatten)
    nnx.register_data_type(target_class)


def _flatten_with_keys(target: Target[Any]) -> tuple[list[tuple[Any, PyTree]], Settings]:
    children, settings = _flatten(target)
    return list(zip(map(GetAttrKey, settings.child_names), children, strict=True)), settings


def _flatten(target: Target[Any]) -> tuple[list[PyTree], Settings]:
    settings, state = target.__getstate__()
    return [getattr(state, name) for name in settings.child_names], settings


def _unflatten(
    target_class: type[Target[Any]], settings: Settings, children: Iterable[PyTree]
) -> Target[Any]:
    """Checks nothing, since jax may pass anything as a child."""
    state = State(**dict(zip(settings.child_names, children, strict=True)))
    return make_target(target_class, settings, state)
