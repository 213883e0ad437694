"""How the constructors turn their arguments into the settings and the first state of a target."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_map_with_path
from jax.typing import ArrayLike

from target_nets._src import checks, differences, leaves, placement, trees
from target_nets._src.dtypes import DType, is_inexact, is_key, pair_dtype, storage_dtype
from target_nets._src.leaves import PyTree
from target_nets._src.slow_copy import SlowCopy
from target_nets._src.state import Schedule
from target_nets._src.unwrap import is_nnx_object, unwrap_mask

# A tree prefix of booleans, a callable of the parameters that returns one, or None.
Mask: TypeAlias = Any


def leaf_dtypes(params: PyTree) -> list[DType]:
    """Returns the dtypes that the parameters have as jax arrays, or raises if a leaf is not one."""
    trees.check_arrays(params, "params")
    trees.check_wide_integers(params, "params")
    return [leaves.array_type(x).dtype for x in jax.tree.leaves(params)]


class Storage(NamedTuple):
    """How the leaves of a slow copy are stored.

    Attributes:
      dtypes: The dtypes of the slow values.
      has_error: Whether the rounding error of each leaf is stored, too. Empty without `compensated`.
      is_random: Whether a leaf is rounded stochastically: one of less than 32 bits, without an error.
    """

    dtypes: Sequence[DType]
    has_error: tuple[bool, ...] = ()
    is_random: bool = False

    @property
    def pairs(self) -> tuple[bool, ...]:
        """Which leaves are pairs; see `SlowCopy.pairs`."""
        leaves = zip(self.dtypes, self.has_error, strict=bool(self.has_error))
        pairs = tuple(has_error and pair_dtype(dtype) is not None for dtype, has_error in leaves)
        return pairs if any(pairs) else ()

    def dtypes_to_restore(self, param_dtypes: Sequence[DType]) -> tuple[DType | None, ...] | None:
        """Returns `Settings.param_dtypes` for parameters of these dtypes."""
        pairs = self.pairs or [False] * len(self.dtypes)
        leaves = zip(param_dtypes, self.dtypes, pairs, strict=True)
        restored = tuple(
            dtype if is_pair or dtype != stored else None for dtype, stored, is_pair in leaves
        )
        return None if all(dtype is None for dtype in restored) else restored


def choose_storage(
    param_dtypes: Sequence[DType],
    averaged: Sequence[bool],
    accumulator: DType | None,
    compensated: bool,
) -> Storage:
    """Returns how to store the slow copy of an `EMATarget`.

    Args:
      param_dtypes: The dtypes of the parameters.
      averaged: Whether a leaf is averaged. Copied leaves are stored in their own dtype.
      accumulator: The dtype that the user wants for averaged leaves, or None.
      compensated: Whether the user wants rounding errors to be kept.
    """
    leaves = list(zip(param_dtypes, averaged, strict=True))
    stored = [storage_dtype(dtype, accumulator) if average else dtype for dtype, average in leaves]
    inexact = [average and is_inexact(dtype) for dtype, average in leaves]
    is_random = not compensated and accumulator is not None and accumulator.itemsize < 4
    has_error = tuple(inexact) if compensated else ()
    return Storage(stored, has_error, is_random)


def first_slow_copy(params: PyTree, storage: Storage) -> SlowCopy:
    """Returns copies of the parameters, strongly typed, with the rounding errors that they have: 0."""
    copies, treedef = jax.tree.flatten(placement.copy_to_own_buffers(params))
    leaves = zip(copies, storage.dtypes, strict=True)
    values = [x if is_key(dtype) else x.astype(dtype) for x, dtype in leaves]
    if not storage.has_error:
        return SlowCopy(treedef.unflatten(values))
    errors: list[jax.Array | None] = [None] * len(values)
    pairs = storage.pairs or [False] * len(values)
    for index, (value, has_error) in enumerate(zip(values, storage.has_error, strict=True)):
        if pairs[index]:
            pair = placement.to_device_memory(value).astype(pair_dtype(value.dtype))
            values[index] = placement.match_memory(pair, value)
        elif has_error:
            zeros = placement.match_sharding(jnp.zeros_like(value), value)
            errors[index] = placement.link_shardings(placement.match_memory(zeros, value), value)
    return SlowCopy(treedef.unflatten(values), treedef.unflatten(errors), storage.pairs)


def resolve_mask(mask: Mask, params: PyTree, arrays: PyTree) -> tuple[bool, ...]:
    """Returns whether to average each leaf of `arrays`, which are those of `params`."""
    if isinstance(mask, type):  # an nnx filter, most likely
        raise TypeError(
            f"mask: expected booleans, or a function of the parameters that returns them, got {mask}"
        )
    if mask is None:
        mask = True
    elif callable(mask) and leaves.is_leaf(mask) and not is_nnx_object(mask):  # not a tree of booleans
        mask = mask(params)

    def spread(path: leaves.KeyPath, value: object, branch: PyTree) -> list[bool]:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"mask{keystr(path)}: expected a boolean, got {leaves.describe(value)}")
        return [bool(value)] * jax.tree.structure(branch).num_leaves

    mask = unwrap_mask(mask, params)
    if (difference := differences.find_prefix_difference(mask, arrays)) is not None:
        path, got, expected = difference
        raise ValueError(f"mask{path}: expected {expected} as in params, or a boolean, got {got}")
    return tuple(jax.tree.leaves(tree_map_with_path(spread, mask, arrays)))


def parse_step_size(
    step_size: ArrayLike | Schedule, shape: tuple[int, ...] = ()
) -> tuple[float | Schedule | None, jax.Array | None]:
    """Returns a static step size, which is a number or a schedule, and an array. One of them is None.

    Args:
      step_size: What the user gave.
      shape: The shape of an array: that of a population, which `vmap` has batched.
    """
    if callable(step_size):
        try:
            hash(step_size)
        except TypeError:
            raise TypeError(f"step_size: a schedule must be hashable, got {step_size!r}") from None
        return step_size, None
    if shape and isinstance(step_size, np.ndarray):
        step_size = jnp.asarray(step_size)
    checked = checks.check_step_size(step_size, shape)
    if isinstance(checked, float):
        checks.warn_of_decay("step_size", checked)
    if isinstance(step_size, jax.Array | np.ndarray):
        array = jnp.array(step_size)
        # It is made strongly typed, so that assigning another one compiles nothing.
        return None, array.astype(array.dtype)
    return float(checked), None
