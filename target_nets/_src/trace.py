"""Which jax transformation is running. No other file asks jax for it.

jax documents no way to ask. If this one is ever gone, targets still work, but an update that a
transformation would lose is no longer refused, and `updated` no longer notices that a transformation
closes over the target (see `placement.pin_constants`).
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import jax
from jax.core import Tracer

from target_nets._src.leaves import PyTree

# jax has no public type for it. Two of them are equal if the same transformation is running.
Trace: TypeAlias = object


def current_trace() -> Trace:
    """Returns what identifies the transformation that is running."""
    return _get_trace()()


def is_eager(*arrays: PyTree) -> bool:
    """Whether no transformation is running, or, where jax does not tell, these arrays are concrete."""
    if (eager := _eager_trace()) is not None:
        return current_trace() == eager
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(arrays))


@cache
def _get_trace() -> Callable[[], Trace]:
    try:
        from jax.extend.core import get_opaque_trace_state
    except ImportError:
        warnings.warn(
            "target_nets: this jax does not tell which transformation is running, so `update` cannot "
            "refuse a target that was made outside of it. Such an update is lost, or leaks a tracer.",
            RuntimeWarning,
            stacklevel=2,
        )
        return lambda: None
    return get_opaque_trace_state


@cache
def _eager_trace() -> Trace:
    try:
        from jax.core import eval_context
    except ImportError:
        return None  # then `is_eager` looks at the arrays, and nothing is lost
    with eval_context():  # the first call may come from inside a transformation
        return current_trace()
