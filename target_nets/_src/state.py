"""What a target holds: its settings, and the arrays and counters that updates replace."""

from collections.abc import Callable
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from target_nets._src.checks import INT32_MAX, bool_converter, count_converter
from target_nets._src.dtypes import DType
from target_nets._src.leaves import PyTree, TreeDef
from target_nets._src.slow_copy import SlowCopy
from target_nets._src.unwrap import NnxObjects

Schedule: TypeAlias = Callable[[jax.Array], ArrayLike]
Count: TypeAlias = jax.Array | np.ndarray[Any, np.dtype[np.int32]]


class Plan(NamedTuple):
    """Which leaves an update averages, and with what step size. A static argument of compiled functions.

    Attributes:
      averaged: Whether to average each leaf; the others are copied. One boolean stands for all leaves.
      step_size: A number or a schedule. None if it is passed separately, as an array or a number, or if
        no leaf is averaged.
      is_random: Whether averages are rounded stochastically, where they are stored in less than 32 bits.
    """

    averaged: bool | tuple[bool, ...]
    step_size: float | Schedule | None = None
    is_random: bool = False

    @property
    def needs_count(self) -> bool:
        """Whether an averaging depends on how many were due before it."""
        return self.is_random or callable(self.step_size)


AVERAGE_ALL, COPY_ALL = Plan(averaged=True), Plan(averaged=False)


@attrs.frozen(cache_hash=True)
class Settings:
    """What updates do not change: the static part of the pytree. Checkpoints do not hold it.

    Attributes:
      plan: What an update does to the leaves.
      update_period: The number of updates from one averaging (or copy) to the next.
      donate: Whether eager updates reuse the memory of the slow copy.
      param_dtypes: The dtypes that `Target.params` returns, one for each leaf, with None for a leaf that
        is stored in its own dtype. None if all leaves are.
      compensated: Whether the state holds the rounding errors of the averages.
      pairs: Which slow leaves hold a value and its rounding error; see `SlowCopy`.
      skip_nonfinite: Whether to skip averagings when parameters hold inf or nan, and to count the
        skipped ones.
      nnx_objects: The nnx objects in the parameters that the target was made from. The slow copy has
        nested dicts in their places, and `Target.params` makes them again.
    """

    plan: Plan
    update_period: int = attrs.field(converter=count_converter("update_period"))
    donate: bool = attrs.field(converter=bool_converter("donate"))
    param_dtypes: tuple[DType | None, ...] | None = None
    compensated: bool = attrs.field(default=False, converter=bool_converter("compensated"))
    pairs: tuple[bool, ...] = ()
    skip_nonfinite: bool = attrs.field(default=False, converter=bool_converter("skip_nonfinite"))
    nnx_objects: NnxObjects = ()

    @property
    def step_size_is_array(self) -> bool:
        """Whether the state holds the step size."""
        return self.plan.averaged is not False and self.plan.step_size is None

    @property
    def child_names(self) -> tuple[str, ...]:
        """The names of the fields of the state that are children of the pytree, in their order."""
        has = self.skip_nonfinite, self.compensated, self.step_size_is_array
        return ("params", "step", *compress(("skipped", "compensation", "step_size"), has))


class State(NamedTuple):
    """All that a target holds.

    An update replaces the whole record in one assignment. So other threads never see half of an update.

    Attributes:
      settings: What updates do not change.
      params: The slow parameters; see `SlowCopy`.
      step: How many updates so far, an int32 scalar.
      skipped: How many averagings were skipped so far, an int32 scalar. None without `skip_nonfinite`.
      compensation: The rounding errors; see `SlowCopy`.
      step_size: The step size if it is an array, a real scalar, else None.
      treedef: The treedef of `params`, once online parameters have been compared with it. Then eager
        updates between two averagings need not compare them again. It is not a child of the pytree.
    """

    settings: Settings
    params: PyTree
    step: Count
    skipped: Count | None = None
    compensation: PyTree = None
    step_size: jax.Array | None = None
    treedef: TreeDef | None = None

    @property
    def slow(self) -> SlowCopy:
        """The arrays that an averaging replaces."""
        return SlowCopy(self.params, self.compensation, self.settings.pairs)

    def with_slow(self, slow: SlowCopy) -> "State":
        """Returns the state with other arrays of the same values."""
        return self._replace(params=slow.params, compensation=slow.compensation)

    def after_update(self, slow: SlowCopy, step: Count, skipped: Count | None) -> "State":
        """Returns the state with what an update has changed."""
        treedef = self.treedef or jax.tree.structure(slow.params)
        return State(
            self.settings, slow.params, step, skipped, slow.compensation, self.step_size, treedef
        )


def check_is_not_abstract(state: State, method: str) -> None:
    """Raises if a target holds shapes and dtypes in place of arrays."""
    if isinstance(state.step, jax.ShapeDtypeStruct):
        raise TypeError(f"{method}: this target is abstract, from jax.eval_shape; restore it first")


def check_is_one_target(state: State, method: str) -> None:
    """Raises if a target is abstract, or if it is a population: one that `vmap` has batched."""
    check_is_not_abstract(state, method)
    if np.ndim(state.step):
        shape = list(np.shape(state.step))
        raise ValueError(
            f"{method}: this target is a population, of shape {shape}; call it inside jax.vmap"
        )


# Counters, int32 scalars that do not overflow


def host_count(count: int) -> Count:
    """Returns a count as a 0-d NumPy array that is read-only."""
    array = np.array(count, np.int32)
    array.setflags(write=False)
    return array


def next_count(count: Any, period: int) -> Any:
    """Returns `count + 1`, as an int for an int and as a jax array for an array.

    After the largest multiple of the period within int32 the count goes back by one period. So
    averagings stay one period apart, and a schedule keeps its last value.
    """
    last = INT32_MAX // period * period
    if isinstance(count, int):
        return count + 1 - period * (count >= last)
    return jnp.where(count >= last, count + 1 - period, count + 1)
