"""Whether a jax transformation is running, and which one. No other file asks jax for it."""

from typing import TypeAlias

from jax.core import eval_context

try:
    from jax.extend.core import get_opaque_trace_state as current_trace
except ImportError:  # before jax 0.10
    from jax.core import get_opaque_trace_state as current_trace

Trace: TypeAlias = (
    object  # jax has no public type for it; two of them are equal if the trace is the same
)

with eval_context():  # the package may be imported for the first time inside a traced function
    EAGER: Trace = current_trace()


def is_eager() -> bool:
    """Whether no transformation is running, so that arrays are concrete."""
    return current_trace() == EAGER
