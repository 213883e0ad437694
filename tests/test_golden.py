"""Checkpoints that version 0.1 wrote are read, continued and written again, to the bit.

The files in `golden/` are never written again. A test that fails here says that users' checkpoints can
no longer be read, that they are read as something else, or that new ones differ from them.
"""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from golden.write import CASES, FOLDER, KEYS, Case, described, path
from helpers.targets import INT32_MAX

from target_nets import PeriodicTarget


@pytest.fixture(params=CASES, name="name")
def _name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(name="case")
def _case(name: str) -> Case:
    return CASES[name]


@pytest.fixture(name="saved")
def _saved(name: str) -> bytes:
    return path(name).read_bytes()


def restored(case: Case, saved: bytes) -> Any:
    """A state from the file; the template holds other values."""
    return serialization.from_bytes(case.make(case.params(9)), saved)


def flat(node: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of a state dict by path, as NumPy arrays; None and empty dicts are leaves, too."""
    if isinstance(node, dict) and node:
        return {key: leaf for k in node for key, leaf in flat(node[k], (*prefix, k)).items()}
    return {prefix: node if node is None or isinstance(node, dict) else np.asarray(node)}


def named(params: Any) -> dict[tuple[str, ...], Any]:
    """The leaves of parameters by the path that they are saved under."""
    return flat(serialization.to_state_dict(PeriodicTarget(params, 1))["params"])


def assert_same(got: dict[Any, Any], expected: dict[Any, Any]) -> None:
    """The same leaves in the same order, to the bit."""
    assert list(got) == list(expected)
    for key, x in expected.items():
        if isinstance(x, np.ndarray):
            assert (got[key].dtype, got[key].shape) == (x.dtype, x.shape), key
            assert got[key].tobytes() == x.tobytes(), key
        else:
            assert got[key] == x, key


def is_averaged(case: Case, key: tuple[str, ...], x: np.ndarray) -> bool:
    mask = case.settings.get("mask", True)
    for name in key:
        mask = mask[name] if isinstance(mask, dict) else mask
    return case.step_size is not None and mask and jnp.issubdtype(x.dtype, jnp.inexact)


def total(x: np.ndarray, error: np.ndarray | None = None) -> np.ndarray:
    """A leaf with what rounding cut off, in double precision."""
    wide = np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64
    return x.astype(wide) if error is None else x.astype(wide) + error.astype(wide)


def along(step_size: Any, x: np.ndarray) -> np.ndarray:
    """A step size, or one for each member of a population, to be multiplied with a leaf."""
    step_size = np.asarray(step_size, np.float64)
    return step_size.reshape(step_size.shape + (1,) * (x.ndim - step_size.ndim))


def precision(x: np.ndarray, error: np.ndarray | None) -> float:
    """How far an average may be off: with the rounding error beside it, it has twice as many digits."""
    eps = float(jnp.finfo(x.dtype).eps)
    return 8 * (eps if error is None else eps**2)


def test_every_case_has_a_file_and_every_file_a_case() -> None:
    files = {file.stem for file in FOLDER.glob("*.msgpack")}
    assert files == set(CASES) == set(json.loads(KEYS.read_text()))


def test_names_dtypes_and_shapes_are_those_listed(name: str, case: Case, saved: bytes) -> None:
    expected = json.loads(KEYS.read_text())[name]
    assert described(serialization.msgpack_restore(saved)) == expected
    template = serialization.to_bytes(case.make(case.params(9)))
    assert described(serialization.msgpack_restore(template)) == expected


def test_a_file_is_restored_to_the_bit_and_written_again(case: Case, saved: bytes) -> None:
    state, plain = restored(case, saved), serialization.msgpack_restore(saved)
    assert type(state) is type(case.make(case.params(0)))
    assert_same(flat(serialization.to_state_dict(state)), flat(plain))
    assert serialization.to_bytes(state) == saved


def test_what_a_user_reads_is_what_is_in_the_file(case: Case, saved: bytes) -> None:
    target, plain = case.target(restored(case, saved)), case.target(serialization.msgpack_restore(saved))
    np.testing.assert_array_equal(target.step, plain["step"])
    if "skipped" in plain:
        np.testing.assert_array_equal(target.skipped, plain["skipped"])
    params, held = named(target.params), flat(plain["params"])
    errors, online = flat(plain.get("compensation")), named(case.params(0))
    assert list(params) == list(held)
    for key, x in held.items():
        if isinstance(x, np.ndarray) and x.dtype != online[key].dtype:  # read in another dtype
            x = total(x, errors.get(key)).astype(online[key].dtype)
        assert_same({key: params[key]}, {key: x})


# Version 0.1 rounded these accumulators to nearest.
ROUNDED_STOCHASTICALLY = ["accumulator_bfloat16"]


def test_the_same_run_writes_the_same_file(name: str, case: Case, saved: bytes) -> None:
    written = serialization.to_bytes(case.run())
    if name not in ROUNDED_STOCHASTICALLY:
        assert written == saved
        return
    after, before = (flat(serialization.msgpack_restore(file)["params"]) for file in (written, saved))
    for key, x in before.items():
        atol = float(jnp.finfo(x.dtype).eps) * np.abs(x.astype(float)).max()
        np.testing.assert_allclose(after[key].astype(float), x.astype(float), atol=2 * atol)


def test_the_next_update_equals_that_of_an_uninterrupted_run(
    name: str, case: Case, saved: bytes
) -> None:
    online = case.params(case.updates + 1)
    if name in ROUNDED_STOCHASTICALLY:
        saved = serialization.to_bytes(case.run())
    resumed, uninterrupted = (
        case.target(serialization.to_state_dict(case.update(state, online)))
        for state in (restored(case, saved), case.run())
    )
    assert_same(flat(resumed), flat(uninterrupted))


def test_the_next_update_is_the_average_computed_in_double_precision(case: Case, saved: bytes) -> None:
    online = case.params(case.updates + 1)
    plain = case.target(serialization.msgpack_restore(saved))
    after = case.target(serialization.to_state_dict(case.update(restored(case, saved), online)))
    period = case.settings.get("update_period", 1)
    step = np.asarray(plain["step"], np.int64) + 1
    step = np.where(step > INT32_MAX // period * period, step - period, step)
    np.testing.assert_array_equal(after["step"], step)
    due = np.all(step % period == 0)
    skips = due and case.updates + 1 in case.nan_at
    if "skipped" in plain:
        np.testing.assert_array_equal(after["skipped"], np.minimum(plain["skipped"] + skips, INT32_MAX))
    step_size = case.step_size
    if callable(step_size):
        step_size = step_size(int(step // period - 1 - plain.get("skipped", 0)))

    new, old, got = named(online), flat(plain["params"]), flat(after["params"])
    errors, errors_after = (flat(state.get("compensation")) for state in (plain, after))
    assert list(got) == list(old)
    assert list(errors) == list(errors_after)
    for key, x in old.items():
        if not isinstance(x, np.ndarray) or not due or skips:
            assert_same({key: got[key]}, {key: x})
        elif is_averaged(case, key, x):
            error, error_after = errors.get(key), errors_after.get(key)
            start, end = total(x, error), total(new[key])
            expected = start + along(step_size, x) * (end - start)
            tolerance = precision(x, error)
            np.testing.assert_allclose(total(got[key], error_after), expected, tolerance, tolerance)
        else:
            assert_same({key: got[key]}, {key: new[key]})
