"""Faults that are injected at a chosen moment: an action between two lines, and a full disk."""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import target_nets

PACKAGE = str(Path(target_nets.__file__).parent)


def run_with_action_at(
    call: Callable[[], Any], action: Callable[[], Any], moment: int, event: str
) -> tuple[Any, bool]:
    """Runs a call, and an action in the middle of it.

    Args:
      call: What to run.
      action: What to do before the chosen moment.
      moment: Which line or instruction of the package, counted from 0 as the call reaches them.
      event: What to count: "line" or "opcode".

    Returns:
      The result of the call, and whether the call got as far as that moment.
    """
    left, acted = moment, False

    def trace(frame: FrameType, what: str, _: Any) -> Any:
        nonlocal left, acted
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = event == "opcode"
        if what == event:
            left -= 1
            if left == -1:
                acted = True
                sys.settrace(None)
                action()
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        return call(), acted
    finally:
        sys.settrace(previous)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Lets no file grow beyond a size in bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
