"""Comparisons of trees: bit for bit, or up to rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def arrays(tree: Any) -> list[np.ndarray]:
    """Returns the leaves as NumPy arrays, keys as their data.

    They are copies, since a view would keep jax from donating the array.
    """
    return [
        np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


def bits(tree: Any) -> tuple[bytes, ...]:
    """Returns the bytes of each leaf."""
    return tuple(x.tobytes() for x in arrays(tree))


def assert_same(got: Any, expected: Any) -> None:
    """Asserts that structures, dtypes, shapes and bits are equal."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(arrays(got), arrays(expected), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def assert_equal_values(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Asserts that two lists of arrays have equal values; nan equals nan."""
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(got: Any, expected: Any) -> None:
    """Asserts that two trees are equal up to the rounding of float32."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, expected)
