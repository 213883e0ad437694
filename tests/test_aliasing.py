"""A target shares no buffer with the online parameters, which may be donated or changed."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparisons import arrays, assert_equal_values, assert_same
from helpers.targets import MAKERS, make_makers
from helpers.trees import perturb

from target_nets import EMATarget, incremental_update, periodic_update

LEAVES: dict[str, Callable[[], Any]] = {
    "float32": lambda: jnp.arange(1024.0),
    "bfloat16": lambda: jnp.arange(1024, dtype=jnp.bfloat16),
    "int32": lambda: jnp.arange(1024),
    "key": lambda: jax.random.split(jax.random.key(0), 64),
    "weak": lambda: jnp.full((), 2.0),
}
# At step size 1 the average is the online value, which could be returned instead of a copy.
COPYING = make_makers(step_size=1, period=1)
DONATING = make_makers(step_size=1, period=1, donate=True)
TARGETS: dict[str, Callable[[Any], Any]] = {
    "ema": MAKERS["ema"],
    "ema, step size 1": COPYING["ema"],
    "ema, nothing averaged": make_makers(mask=False)["ema"],
    "ema, donate": DONATING["ema"],
    "ema, compensated, donate": DONATING["ema, compensated"],
    "ema, skipping": COPYING["ema, skipping"],
    "periodic": COPYING["periodic"],
    "periodic, donate": DONATING["periodic"],
}


def train_and_donate(params: Any) -> Any:
    """A train step that reuses the memory of its parameters."""
    return jax.jit(perturb, donate_argnums=0)(params)


def is_deleted(tree: Any) -> bool:
    return all(x.is_deleted() for x in jax.tree.leaves(tree))


@pytest.fixture(params=["float32", "every kind"], name="params")
def _params(request: pytest.FixtureRequest) -> Any:
    """A tree that is read as it is held, and one whose bfloat16 leaf is cast on reading."""
    names = LEAVES if request.param == "every kind" else ["float32"]
    return {name: [LEAVES[name](), LEAVES[name]()] for name in names}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("compiled", [True, False])
def test_donated_online_parameters_leave_the_target(kind: str, params: Any, compiled: bool) -> None:
    target = TARGETS[kind](params)
    for method in ("update", "sync", "update"):
        expected, before = arrays(params), params
        params = train_and_donate(params)
        assert is_deleted(before)
        if method == "update" and target.step == 0:
            assert_equal_values(arrays(target.params), expected)  # as constructed
        with jax.disable_jit(not compiled):  # without jit the package has to make every copy
            getattr(target, method)(params)
    expected, before = arrays(target.params), params
    train_and_donate(params)
    assert is_deleted(before)
    assert not any(x.is_deleted() for x in jax.tree.leaves(target.params))
    assert_equal_values(arrays(target.params), expected)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_updated_inside_the_train_step(kind: str, params: Any) -> None:
    target = TARGETS[kind](params)

    def train(params: Any, target: Any) -> Any:
        params = perturb(params)
        return params, target.update(params)

    step = jax.jit(train, donate_argnums=(0, 1))
    target = jax.jit(lambda t: t)(target)
    for _ in range(3):
        params, target = step(params, target)
    expected = arrays(target.params)
    train_and_donate(params)
    assert_equal_values(arrays(target.params), expected)
    sync = jax.jit(lambda p, t: (p, t.sync(p)))
    params, target = sync(perturb(target.params), target)
    expected = arrays(params)
    train_and_donate(params)
    assert_equal_values(arrays(target.params), expected)


def test_the_rules_return_no_buffer_of_the_new_tensors(params: Any) -> None:
    rules: list[Callable[[Any, Any], Any]] = [
        lambda new, old: incremental_update(new, old, 1),
        lambda new, old: incremental_update(new, old, 0.5),
        lambda new, old: periodic_update(new, old, 2, 2),
        lambda new, old: periodic_update(new, old, jnp.int32(2), 2),
        jax.jit(lambda new, old: periodic_update(new, old, 2, 2)),
        jax.jit(lambda new, old: incremental_update(new, old, 1)),
        lambda new, old: jax.jit(lambda new, old: (new, periodic_update(new, old, 0, 2)))(new, old)[1],
    ]
    for rule in rules:
        online = perturb(params)
        slow = rule(online, params)
        expected = arrays(slow)
        train_and_donate(online)
        assert is_deleted(online)
        assert_equal_values(arrays(slow), expected)


def make_aligned(value: float) -> dict[str, np.ndarray]:
    """Returns NumPy arrays that jax would share instead of copying: large and aligned to 64 bytes."""
    memory = np.empty((1 << 20) + 16, np.float32)
    start = -memory.ctypes.data // 4 % 16
    params = memory[start : start + (1 << 20)]
    params[:] = value
    return {"w": params}


@pytest.mark.parametrize("kind", TARGETS)
def test_numpy_parameters_may_change_afterwards(kind: str) -> None:
    params = make_aligned(0)
    target = TARGETS[kind](params)
    params["w"][:] = 7
    assert not np.any(target.params["w"])
    for _ in range(5):  # jax may read its arguments when the call is over
        online = make_aligned(1)
        target.sync(online)
        online["w"][:] = 7
        assert np.all(target.params["w"] == 1)
        online["w"][:] = 1
        target.update(online)
        online["w"][:] = 7
        assert np.all(target.params["w"] == 1)


def test_numpy_tensors_of_the_rules_may_change_afterwards() -> None:
    for _ in range(5):
        new, old = make_aligned(1), make_aligned(3)
        got = incremental_update(new, old, 0.5), periodic_update(new, old, 2, 2)
        new["w"][:] = old["w"][:] = 7
        assert np.all(got[0]["w"] == 2)
        assert np.all(got[1]["w"] == 1)


def test_a_donated_target_leaves_its_copies_and_the_online_parameters() -> None:
    params = {"w": jnp.ones(64)}
    target = EMATarget(params, 0.5)
    twin = copy.copy(target)
    jax.jit(lambda t: t.update(params), donate_argnums=0)(jax.tree.map(jnp.asarray, target))
    assert target.params["w"].is_deleted()
    assert_same(twin.params, params)


def test_a_numpy_step_size_may_change_afterwards() -> None:
    online, slow = {"w": jnp.ones(1 << 20)}, {"w": jnp.zeros(1 << 20)}
    for _ in range(5):
        step_size = np.array(0.5, np.float32)
        target = EMATarget(slow, step_size)
        got = incremental_update(online, slow, step_size)
        step_size[...] = 0
        assert np.all(got["w"] == 0.5)
        assert np.all(target.update(online).params["w"] == 0.5)
