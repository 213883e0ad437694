"""In a donated train step an update compiles to no more than the same line written by hand."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from target_nets import EMATarget, PeriodicTarget

SHAPES = [(64, 128), (128,), (128, 32), (32,)]
PARAMS = [jnp.ones(shape) for shape in SHAPES]


def train(params: Any) -> Any:
    return jax.tree.map(lambda p: p - 0.001 * jnp.sin(p), params)


def operations(step: Callable[..., Any], *args: Any) -> Counter[str]:
    """Counts the operations of the compiled program, all of whose arguments are donated."""
    compiled = jax.jit(step, donate_argnums=tuple(range(len(args)))).lower(*args).compile()
    entry = compiled.as_text().partition("ENTRY")[2]
    return Counter(re.findall(r"^ .*?[\])}] ([a-z-]+)\(", entry, re.MULTILINE))


def step_with_target(params: Any, target: Any) -> Any:
    params = train(params)
    return params, target.update(params)


def step_by_hand(params: Any, slow: Any, step: Any) -> Any:
    params = train(params)
    return params, jax.tree.map(lambda p, q: q + 0.005 * (p - q), params, slow), step + 1


@pytest.mark.parametrize(
    "settings", [{}, {"accumulator_dtype": "float32"}, {"donate": True}, {"compensated": True}]
)
def test_an_update_has_as_many_loops_as_by_hand_and_no_copy(settings: Any) -> None:
    ours = operations(
        step_with_target, PARAMS, jax.jit(lambda t: t)(EMATarget(PARAMS, 0.005, **settings))
    )
    theirs = operations(step_by_hand, PARAMS, PARAMS, jnp.int32(0))
    assert ours["fusion"] == theirs["fusion"] == 2 * len(SHAPES) + 1  # one is the counter
    assert ours["copy"] == theirs["copy"] == 0


def test_a_schedule_and_an_array_as_step_size_need_no_further_loop() -> None:
    for step_size in (jnp.float32(0.005), lambda n: 1 / (n + 10.0)):
        ours = operations(step_with_target, PARAMS, jax.jit(lambda t: t)(EMATarget(PARAMS, step_size)))
        assert ours["copy"] <= 1  # at most one of the step size itself
        assert 2 * len(SHAPES) < ours["fusion"] <= 2 * len(SHAPES) + 3  # scalars, beside the leaves


def test_between_periods_nothing_is_copied() -> None:
    ours = operations(step_with_target, PARAMS, jax.jit(lambda t: t)(PeriodicTarget(PARAMS, 10)))
    assert ours["conditional"] == 1
    assert ours["copy"] <= 1


def test_a_donated_update_needs_no_second_slow_copy() -> None:
    target = jax.jit(lambda t: t)(EMATarget(PARAMS, 0.005))
    update = jax.jit(lambda t, p: t.update(p), donate_argnums=0)
    memory = update.lower(target, PARAMS).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1000
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in PARAMS)


@pytest.mark.parametrize("settings", [{}, {"compensated": True}])
def test_with_skip_nonfinite_the_program_grows_linearly_in_the_arrays(settings: Any) -> None:
    def lines(count: int) -> int:
        params = [jnp.ones(1)] * count
        target = EMATarget(params, 0.005, skip_nonfinite=True, **settings)
        compiled = jax.jit(lambda t, p: t.update(p)).lower(target, params).compile()
        return compiled.as_text().count("\n")

    assert lines(32) < 2.5 * lines(16)
