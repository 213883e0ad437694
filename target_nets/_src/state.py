"""What a target holds: settings that are fixed when it is made, and the state that updates replace."""

from collections.abc import Callable
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from target_nets._src.checks import INT32_MAX, check_python_count
from target_nets._src.dtypes import DType
from target_nets._src.trees import PyTree

Schedule: TypeAlias = Callable[[jax.Array], ArrayLike]
Count: TypeAlias = jax.Array | np.ndarray[Any, np.dtype[np.int32]]

_is_bool = attrs.validators.instance_of(bool)


class Rule(NamedTuple):
    """How an update changes the leaves of the slow copy. It is static in the compiled update.

    Attributes:
      averaged: Whether to average a leaf; the others are copied. One boolean for each leaf, or one for
        all of them.
      step_size: A number or a schedule. None if the step size is an array, which is part of the state,
        or if nothing is averaged.
    """

    averaged: bool | tuple[bool, ...]
    step_size: float | Schedule | None = None


AVERAGE_ALL, COPY_ALL = Rule(averaged=True), Rule(averaged=False)


@attrs.frozen(cache_hash=True)
class Settings:
    """What is fixed when a target is made. It is code, not state: the static part of the pytree.

    Attributes:
      rule: How an update changes the slow copy.
      update_period: Only every so many-th update changes the slow copy.
      donate: Whether eager updates reuse the memory of the slow copy.
      dtypes: The dtypes that `params` casts the leaves to, or None if they are stored in their own.
      compensated: Whether the state holds the rounding errors of the averages.
      skip_nonfinite: Whether averagings of inf and nan are left out, and the state counts them.
      step_size_is_array: Whether the state holds the step size.
    """

    rule: Rule
    update_period: int = attrs.field(converter=check_python_count("update_period"))
    donate: bool = attrs.field(validator=_is_bool)
    dtypes: tuple[DType, ...] | None = None
    compensated: bool = attrs.field(default=False, validator=_is_bool)
    skip_nonfinite: bool = attrs.field(default=False, validator=_is_bool)
    step_size_is_array: bool = False

    @property
    def child_names(self) -> tuple[str, ...]:
        """The names of the fields of the state that are children of the pytree, in their order."""
        has = self.skip_nonfinite, self.compensated, self.step_size_is_array
        return ("params", "step", *compress(("skipped", "compensation", "step_size"), has))


class SlowCopy(NamedTuple):
    """The arrays that an averaging replaces, and whose memory it may reuse.

    Attributes:
      params: The slow parameters, in the dtypes that they are stored in.
      compensation: The rounding errors of the averages, a tree like `params` with None for each leaf
        that is not averaged. None without `compensated`.
    """

    params: PyTree
    compensation: PyTree = None


class State(NamedTuple):
    """What updates replace. A target holds one such record, so it is never between two updates.

    Attributes:
      params: The slow parameters; see `SlowCopy`.
      step: How many updates so far, an int32 scalar.
      skipped: How many averagings were left out so far, an int32 scalar. None without `skip_nonfinite`.
      compensation: The rounding errors; see `SlowCopy`.
      step_size: The step size if it is an array, a real scalar, else None.
      is_checked: Whether online parameters have been compared with the slow copy yet. It is no child.
    """

    params: PyTree
    step: Count
    skipped: Count | None = None
    compensation: PyTree = None
    step_size: jax.Array | None = None
    is_checked: bool = False

    @property
    def slow(self) -> SlowCopy:
        """The arrays that an averaging replaces."""
        return SlowCopy(self.params, self.compensation)

    def after(self, slow: SlowCopy, step: Count, skipped: Count | None) -> "State":
        """Returns the state after an update."""
        return State(slow.params, step, skipped, slow.compensation, self.step_size, True)


def compensation_leaves(slow: SlowCopy) -> list[jax.Array | None]:
    """Returns the rounding errors leaf by leaf, with None where there is none."""
    treedef = jax.tree.structure(slow.params)
    if slow.compensation is None:
        return [None] * treedef.num_leaves
    return treedef.flatten_up_to(slow.compensation)


def check_is_not_abstract(state: State, method: str) -> None:
    """Raises if a target holds shapes and dtypes in place of arrays."""
    if isinstance(state.step, jax.ShapeDtypeStruct):
        raise TypeError(f"{method}: this target is abstract, from jax.eval_shape; restore it first")


def check_is_one_target(state: State, method: str) -> None:
    """Raises if a target is abstract, or a population that `vmap` has made."""
    check_is_not_abstract(state, method)
    if np.ndim(state.step):
        shape = list(np.shape(state.step))
        raise ValueError(f"{method}: a population, its step of shape {shape}; call it inside jax.vmap")


# Counters, int32 scalars that do not overflow


def host_count(count: int) -> Count:
    """Returns a count as an array on the host that nobody can write to."""
    array = np.array(count, np.int32)
    array.setflags(write=False)
    return array


def next_count(count: Any, period: int) -> Any:
    """Returns the count after this one: an int for an int, and a jax array for an array.

    After the largest multiple of the period within int32 it goes back by one period, so that the period
    is kept and a schedule holds its last value.
    """
    last = INT32_MAX // period * period
    if isinstance(count, int):
        return count + 1 - period * (count >= last)
    return jnp.where(count >= last, count + 1 - period, count + 1)
