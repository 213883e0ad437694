"""The counters of updates and of skipped averagings, int32 scalars that do not overflow."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from target_nets._src.checks import INT32_MAX
from target_nets._src.records import Count


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
