"""Settings of the test processes, and the fixtures that several files use."""

import os

# Limits BLAS to one thread: the threads of several test processes would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import Any

import pytest
from threadpoolctl import threadpool_limits

threadpool_limits(1)  # of what a plugin of pytest has loaded before
pytest.register_assert_rewrite("helpers")  # before they are imported

from helpers.compilations import count_compilations  # noqa: E402
from helpers.trees import TREES, make_tree  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Lets a test process that is done take over tests from another: a few tests take long."""
    if config.getoption("dist", None) == "load":
        config.option.dist = "worksteal"


@pytest.fixture(params=TREES, name="tree")
def _tree(request: pytest.FixtureRequest) -> Any:
    return make_tree(request.param)


@pytest.fixture(name="trace_counter")
def _trace_counter() -> Any:
    """Returns a context manager that lists what jax compiles."""
    return count_compilations
