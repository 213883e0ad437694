"""Which of jax's transformations is running: the one place that asks jax for it."""

from typing import TypeAlias

from jax.core import eval_context

try:
    from jax.extend.core import get_opaque_trace_state as current_trace
except ImportError:  # before jax 0.10
    from jax.core import get_opaque_trace_state as current_trace

Trace: TypeAlias = object  # it has no public type; two of them are equal within one and the same trace

with eval_context():  # the first import of the package may happen inside a traced function
    EAGER: Trace = current_trace()


def is_eager() -> bool:
    """Whether no transformation is running, so that arrays are concrete."""
    return current_trace() == EAGER
