"""The reference of these tests: the textbook average of the online parameters in float64."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from helpers.comparisons import arrays


def assert_follows(slow: Any, online: list[Any], step_size: float | Callable[[int], float]) -> None:
    """Asserts that a slow copy is the average of the online parameters.

    The target was made of `online[0]`; each update was given one of the others.
    """
    expected, *updates = ([x.astype(np.float64) for x in arrays(params)] for params in online)
    before = expected
    for n, new in enumerate(updates):
        s = step_size(n) if callable(step_size) else step_size
        before, expected = expected, [s * x + (1 - s) * y for x, y in zip(new, expected, strict=True)]
    for x, y in zip(arrays(slow), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    # The last update changes the average, so the comparison above would find a missing one.
    assert max(np.abs(x - y).max() for x, y in zip(expected, before, strict=True)) > 1e-3


def entry(tree: Any, *index: int) -> Any:
    """Returns one entry of every array, such as one step of a scan or one lane of a vmap."""
    return jax.tree.map(lambda x: x[index], tree)
