"""No buffer is ever shared with the online parameters: donating or changing them leaves the target."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparisons import arrays, assert_same
from helpers.trees import perturb

from target_nets import EMATarget, PeriodicTarget, incremental_update, periodic_update

KINDS = {
    "float32": lambda: jnp.arange(1024.0),
    "bfloat16": lambda: jnp.arange(1024, dtype=jnp.bfloat16),
    "int32": lambda: jnp.arange(1024),
    "key": lambda: jax.random.split(jax.random.key(0), 64),
    "weak": lambda: jnp.full((), 2.0),
}
MAKERS: dict[str, Callable[[Any], Any]] = {
    "ema": lambda p: EMATarget(p, 0.5),
    "ema, step size 1": lambda p: EMATarget(p, 1),
    "ema, no mask": lambda p: EMATarget(p, 0.5, mask=False),
    "ema, donate": lambda p: EMATarget(p, 1, donate=True),
    "ema, compensated": lambda p: EMATarget(p, 1, compensated=True, donate=True),
    "ema, skipping": lambda p: EMATarget(p, 1, skip_nonfinite=True),
    "periodic": lambda p: PeriodicTarget(p, 1),
    "periodic, donate": lambda p: PeriodicTarget(p, 1, donate=True),
}


def trained(params: Any) -> Any:
    """A train step that reuses the memory of its parameters."""
    return jax.jit(perturb, donate_argnums=0)(params)


def deleted(tree: Any) -> bool:
    return all(x.is_deleted() for x in jax.tree.leaves(tree))


@pytest.fixture(params=KINDS, name="params")
def _params(request: pytest.FixtureRequest) -> Any:
    return {"w": KINDS[request.param](), "again": [KINDS[request.param]()]}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("compiled", [True, False])
def test_donated_online_parameters_leave_the_target(kind: str, params: Any, compiled: bool) -> None:
    target = MAKERS[kind](params)
    for method in ("update", "sync", "update"):
        expected, before = arrays(params), params
        params = trained(params)
        assert deleted(before)
        if method == "update" and target.step == 0:
            for x, y in zip(arrays(target.params), expected, strict=True):
                np.testing.assert_array_equal(x, y)  # as constructed
        with jax.disable_jit(not compiled):  # where nothing is copied that is not told to be
            getattr(target, method)(params)
    expected, before = arrays(target.params), params
    trained(params)
    assert deleted(before)
    assert not any(x.is_deleted() for x in jax.tree.leaves(target.params))
    for x, y in zip(arrays(target.params), expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_target_updated_inside_the_train_step(kind: str, params: Any) -> None:
    target = MAKERS[kind](params)

    def train(params: Any, target: Any) -> Any:
        params = perturb(params)
        return params, target.update(params)

    step = jax.jit(train, donate_argnums=(0, 1))
    target = jax.jit(lambda t: t)(target)
    for _ in range(3):
        params, target = step(params, target)
    trained(params)
    arrays(target.params)
    sync = jax.jit(lambda p, t: (p, t.sync(p)))
    params, target = sync(perturb(target.params), target)
    trained(params)
    arrays(target.params)


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
        trained(online)
        assert deleted(online)
        for x, y in zip(arrays(slow), expected, strict=True):
            np.testing.assert_array_equal(x, y)


def aligned(value: float) -> dict[str, np.ndarray]:
    """NumPy memory that jax shares instead of copying, where it can: aligned to 64 bytes, and large."""
    memory = np.empty((1 << 20) + 16, np.float32)
    start = -memory.ctypes.data // 4 % 16
    params = memory[start : start + (1 << 20)]
    params[:] = value
    return {"w": params}


@pytest.mark.parametrize("kind", MAKERS)
def test_numpy_parameters_may_change_afterwards(kind: str) -> None:
    params = aligned(0)
    target = MAKERS[kind](params)
    params["w"][:] = 7
    assert not np.any(target.params["w"])
    for _ in range(5):  # jax may read its arguments when the call is over
        online = aligned(1)
        target.sync(online)
        online["w"][:] = 7
        assert np.all(target.params["w"] == 1)
        online["w"][:] = 1
        target.update(online)
        online["w"][:] = 7
        assert np.all(target.params["w"] == 1)


def test_numpy_tensors_of_the_rules_may_change_afterwards() -> None:
    for _ in range(5):
        new, old = aligned(1), aligned(3)
        got = incremental_update(new, old, 0.5), periodic_update(new, old, 2, 2)
        new["w"][:] = old["w"][:] = 7
        assert np.all(got[0]["w"] == 2)
        assert np.all(got[1]["w"] == 1)


def test_a_donated_target_leaves_its_copies_and_the_online_parameters() -> None:
    import copy

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
