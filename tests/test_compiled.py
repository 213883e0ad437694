"""What XLA makes of an update: in a donated train step no more than the same line written by hand."""

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


def trained(params: Any) -> Any:
    return jax.tree.map(lambda p: p - 0.001 * jnp.sin(p), params)


def operations(step: Callable[..., Any], *args: Any) -> Counter[str]:
    """How often each operation stands in the compiled program's entry; all arguments are donated."""
    compiled = jax.jit(step, donate_argnums=tuple(range(len(args)))).lower(*args).compile()
    entry = compiled.as_text().partition("ENTRY")[2]
    return Counter(re.findall(r"^ .*?[\])}] ([a-z-]+)\(", entry, re.MULTILINE))


def with_target(params: Any, target: Any) -> Any:
    params = trained(params)
    return params, target.update(params)


def by_hand(params: Any, slow: Any, step: Any) -> Any:
    params = trained(params)
    return params, jax.tree.map(lambda p, q: q + 0.005 * (p - q), params, slow), step + 1


@pytest.mark.parametrize("settings", [{}, {"accumulator_dtype": "float32"}, {"donate": True}])
def test_as_many_loops_as_by_hand_and_no_copy_of_the_slow_copy(settings: Any) -> None:
    ours = operations(with_target, PARAMS, jax.jit(lambda t: t)(EMATarget(PARAMS, 0.005, **settings)))
    theirs = operations(by_hand, PARAMS, PARAMS, jnp.int32(0))
    assert ours["fusion"] == theirs["fusion"] == 2 * len(SHAPES) + 1  # the counter is one
    assert ours["copy"] == theirs["copy"] == 0


def test_a_schedule_and_a_swept_step_size_cost_no_loop_either() -> None:
    for step_size in (jnp.float32(0.005), lambda n: 1 / (n + 10.0)):
        ours = operations(with_target, PARAMS, jax.jit(lambda t: t)(EMATarget(PARAMS, step_size)))
        assert ours["copy"] <= 1  # at most of the step size itself
        assert ours["fusion"] <= 2 * len(SHAPES) + 2


def test_between_its_periods_a_target_in_a_step_copies_nothing() -> None:
    ours = operations(with_target, PARAMS, jax.jit(lambda t: t)(PeriodicTarget(PARAMS, 10)))
    assert ours["conditional"] == 1
    assert ours["copy"] <= 1


def test_no_second_slow_copy_in_a_donated_update() -> None:
    target = jax.jit(lambda t: t)(EMATarget(PARAMS, 0.005))
    update = jax.jit(lambda t, p: t.update(p), donate_argnums=0)
    memory = update.lower(target, PARAMS).compile().memory_analysis()
    if memory is not None:
        assert memory.temp_size_in_bytes < 1000
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in PARAMS)


@pytest.mark.parametrize("settings", [{}, {"compensated": True}])
def test_the_program_that_skips_grows_with_the_number_of_arrays_not_its_square(settings: Any) -> None:
    def lines(count: int) -> int:
        params = [jnp.ones(1)] * count
        target = EMATarget(params, 0.005, skip_nonfinite=True, **settings)
        compiled = jax.jit(lambda t, p: t.update(p)).lower(target, params).compile()
        return compiled.as_text().count("\n")

    assert lines(32) < 2.5 * lines(16)
