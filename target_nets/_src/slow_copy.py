"""The arrays of a slow copy, and how a value and its rounding error are stored."""

from collections.abc import Iterable
from functools import partial
from typing import TypeAlias

import attrs
import jax
import jax.numpy as jnp
from jax import lax

from target_nets._src import placement
from target_nets._src.dtypes import real_dtype
from target_nets._src.leaves import PyTree

# A slow value, and its rounding error if that is kept.
Word: TypeAlias = tuple[jax.Array, jax.Array | None]


@attrs.define
class SlowCopy:
    """The arrays that an averaging replaces, and whose memory it may reuse. A pytree.

    With `compensated` a leaf is a value and its rounding error. Those of a float32 or float64 leaf are a
    pair: one complex array, with the value as its real part. On CPUs XLA makes a loop for each array
    that it writes. With two arrays the second loop would read what the first one has overwritten, so XLA
    would copy both.

    Attributes:
      params: The slow parameters: pairs, or values in their storage dtypes.
      compensation: The rounding errors that are stored apart: a tree like `params`, with None for a leaf
        that is a pair or has no error. None without `compensated`.
      pairs: Whether each leaf of `params` is a pair. Empty if none is.
    """

    params: PyTree
    compensation: PyTree = None
    pairs: tuple[bool, ...] = ()

    def values(self) -> PyTree:
        """Returns the slow parameters in their storage dtypes."""
        if not any(self.pairs):
            return self.params
        leaves, treedef = jax.tree.flatten(self.params)
        stored = zip(leaves, self.pairs, strict=True)
        return treedef.unflatten([jnp.real(x) if is_pair else x for x, is_pair in stored])

    def words(self) -> list[Word]:
        """Returns the value and the error of each leaf, in device memory, inside a compiled function."""
        params, treedef = jax.tree.flatten(self.params)
        no_errors = [None] * len(params)
        apart = no_errors if self.compensation is None else treedef.flatten_up_to(self.compensation)
        stored = placement.to_device_memory(list(zip(params, apart, strict=True)))
        pairs = self.pairs or [False] * len(params)
        return [
            (jnp.real(x), jnp.imag(x)) if is_pair else (x, error)
            for (x, error), is_pair in zip(stored, pairs, strict=True)
        ]

    def with_words(self, words: Iterable[Word]) -> "SlowCopy":
        """Returns a slow copy of new values and errors, stored in the same way."""
        old, treedef = jax.tree.flatten(self.params)
        pairs = self.pairs or [False] * len(old)
        stored: list[Word] = []
        for (value, error), x, is_pair in zip(words, old, pairs, strict=True):
            if is_pair and error is not None:
                value, error = lax.complex(value, error), None
            stored.append(placement.match_memory((value, error), x))
        params, errors = ([word[i] for word in stored] for i in range(2))
        has_errors = self.compensation is not None or any(error is not None for error in errors)
        compensation = treedef.unflatten(errors) if has_errors else None
        return SlowCopy(treedef.unflatten(params), compensation, self.pairs)


jax.tree_util.register_dataclass(SlowCopy, ["params", "compensation"], ["pairs"])


# For state dicts, which hold values and errors apart


@jax.jit
def take_apart(slow: SlowCopy) -> SlowCopy:
    """Returns a slow copy whose pairs are stored apart, as a value and an error."""
    return SlowCopy(slow.params, slow.compensation).with_words(slow.words())


@partial(jax.jit, static_argnames="pairs")
def put_together(apart: SlowCopy, pairs: tuple[bool, ...]) -> SlowCopy:
    """Returns the slow copy that was taken apart."""
    return SlowCopy(apart.params, apart.compensation, pairs).with_words(apart.words())


def abstract_apart(slow: SlowCopy) -> SlowCopy:
    """Returns what `take_apart` does, with shapes, dtypes and shardings in place of pairs."""
    params, treedef = jax.tree.flatten(slow.params)
    errors = treedef.flatten_up_to(slow.compensation)
    for index, (x, is_pair) in enumerate(zip(params, slow.pairs, strict=True)):
        if is_pair:
            dtype, sharding = real_dtype(x.dtype), placement.sharding_of(x)
            params[index] = errors[index] = jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)
    return SlowCopy(treedef.unflatten(params), treedef.unflatten(errors))
