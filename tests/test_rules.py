"""The rules keep structure and dtypes, agree with optax where it is right, and refuse invalid input."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparisons import arrays, assert_same
from helpers.targets import RULES
from helpers.trees import perturb

import target_nets
from target_nets import EMATarget, PeriodicTarget, apply_updates, incremental_update, periodic_update

OLD = {"a": {"w": jnp.array([[1.0, 2.0]]), "b": jnp.zeros(2)}, "c": (jnp.ones(()), None)}
NEW = perturb(OLD)


def test_apply_updates_is_optax() -> None:
    assert_same(apply_updates(OLD, NEW), optax.apply_updates(OLD, NEW))


@pytest.mark.parametrize("step_size", [0, 0.005, 0.5, 0.9, 1])
def test_incremental_update_is_optax_up_to_rounding(step_size: float) -> None:
    ours = incremental_update(NEW, OLD, step_size)
    theirs = optax.incremental_update(NEW, OLD, step_size)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize("kind", [int, np.int64, np.asarray, jnp.asarray])
def test_periodic_update_is_optax(kind: Any) -> None:
    for steps in range(-3, 7):
        ours = periodic_update(NEW, OLD, kind(steps), kind(3))
        assert_same(ours, optax.periodic_update(NEW, OLD, steps, 3))


def test_periodic_update_in_jit_is_optax() -> None:
    update = jax.jit(periodic_update)
    for steps in range(-3, 7):
        assert_same(update(NEW, OLD, steps, 3), optax.periodic_update(NEW, OLD, steps, 3))


def test_a_period_that_the_dtype_of_the_steps_cannot_hold() -> None:
    for steps in (0, 1, 44, 255):
        got = periodic_update(NEW, OLD, jnp.uint8(steps), 300)
        assert_same(got, NEW if steps == 0 else OLD)
    # In 8 bits 300 would be 44.
    assert_same(periodic_update(NEW, OLD, jnp.uint8(44), jnp.int32(300)), OLD)


def test_steps_of_64_bits_keep_them() -> None:
    with jax.enable_x64(True):
        steps = jnp.int64(2**32 + 2)  # a multiple of 3, unlike its lower 32 bits
        assert_same(periodic_update(NEW, OLD, steps, 3), NEW)


def test_old_tensors_of_numpy_are_copied_where_the_device_decides() -> None:
    old = {"w": np.zeros(1000, np.float32)}
    got = periodic_update({"w": np.ones(1000, np.float32)}, old, jnp.int32(1), 2)
    old["w"][:] = 7
    np.testing.assert_array_equal(got["w"], np.zeros(1000))


def test_an_old_leaf_that_is_no_array_is_named() -> None:
    for rule in (
        lambda new, old: incremental_update(new, old, 0.5),
        lambda new, old: periodic_update(new, old, 2, 2),
        lambda new, old: periodic_update(new, old, jnp.int32(2), 2),
    ):
        with pytest.raises(TypeError, match=r"old_tensors\['w'\]: expected an array, got str"):
            rule({"w": jnp.ones(2)}, {"w": "a string"})


@pytest.mark.parametrize("refused", [2**70, "a string"], ids=["huge", "string"])
def test_a_refused_leaf_is_named_with_and_without_jit(refused: Any) -> None:
    tensors = {"a": 1.5}, {"a": refused}
    for disabled in (False, True):
        with jax.disable_jit(disabled):
            for new, old in (tensors, tensors[::-1]):
                refused_tree = "old_tensors" if old is tensors[1] else "new_tensors"
                for rule in (
                    lambda new, old: incremental_update(new, old, 0.5),
                    lambda new, old: periodic_update(new, old, 2, 2),
                    lambda new, old: periodic_update(new, old, jnp.int32(2), 2),
                ):
                    with pytest.raises(TypeError, match=rf"{refused_tree}\['a'\]: expected"):
                        rule(new, old)
                refused_tree = "updates" if old is tensors[1] else "params"
                with pytest.raises(TypeError, match=rf"{refused_tree}\['a'\]: expected"):
                    apply_updates(new, old)
            for target in (EMATarget(tensors[0], 0.5), PeriodicTarget(tensors[0], 1)):
                for method in (target.update, target.sync, target.distance):
                    with pytest.raises(TypeError, match=r"online_params\['a'\]: expected"):
                        method(tensors[1])


def test_periodic_update_on_plain_numbers_starts_nothing_off_its_period(trace_counter: Any) -> None:
    assert periodic_update(NEW, OLD, 199, 100) is OLD
    assert periodic_update(NEW, OLD, np.int32(199), np.int64(100)) is OLD
    assert periodic_update(NEW, OLD, 2**70 + 1, 2) is OLD
    with jax.transfer_guard("disallow"), trace_counter() as compiled:
        assert periodic_update(NEW, OLD, 1, 100) is OLD
    assert not compiled


def test_periodic_update_traces_once_for_all_device_steps(trace_counter: Any) -> None:
    online = {"w": jnp.ones(17)}
    with trace_counter() as traces:
        for step in range(5):
            periodic_update(online, online, jnp.int32(step), jnp.int32(3))
    assert len(traces) == 1


def test_vmapped_steps() -> None:
    steps = jnp.arange(4)
    got = jax.vmap(lambda step: periodic_update(1.0, 0.0, step, 2))(steps)
    np.testing.assert_array_equal(got, [1, 0, 1, 0])


def test_results_have_the_structure_and_dtypes_of_the_slow_tensors(tree: Any) -> None:
    online = perturb(tree)
    jax_tree = jax.tree.map(jnp.asarray, tree)

    @jax.jit
    def jitted(online: Any, slow: Any, step_size: jax.Array, steps: jax.Array) -> tuple[Any, Any]:
        return incremental_update(online, slow, step_size), periodic_update(online, slow, steps, 2)

    for got in (
        incremental_update(online, tree, 0.3),
        periodic_update(online, tree, 4, 2),
        *jitted(online, tree, jnp.float32(0.3), jnp.int32(4)),
    ):
        assert jax.tree.structure(got) == jax.tree.structure(tree)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(jax_tree), strict=True):
            assert isinstance(x, jax.Array)
            assert (x.shape, x.dtype, getattr(x, "weak_type", False)) == (y.shape, y.dtype, False)
    assert_same(periodic_update(online, tree, 4, 2), jax.tree.map(jnp.asarray, online))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e5m2, jnp.float32])
def test_a_step_size_never_promotes(dtype: Any) -> None:
    for step_size in (0.5, np.float32(0.5), np.float64(0.5), jnp.float32(0.5)):
        got = incremental_update(jnp.ones(2, jnp.float32), jnp.zeros(2, dtype), step_size)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(jnp.float32), 0.5)


def test_the_result_of_weakly_typed_tensors_is_strongly_typed() -> None:
    weak, integers = jnp.full(2, 1.0), jnp.full(2, 1)
    assert weak.weak_type
    assert integers.weak_type
    old = jnp.zeros(2)
    for got in (
        incremental_update(weak, old, 0.5),
        incremental_update(integers, old.astype(int), 0.5),
        periodic_update(weak, old, 4, 2),
        jax.jit(periodic_update)(weak, old, 4, 2),
        apply_updates(old, weak),
        target_nets.PeriodicTarget(old, 1).update(weak).params,
        target_nets.EMATarget(old, 0.5, mask=False).update(weak).params,
        target_nets.EMATarget(old, 0.5).sync(weak).params,
    ):
        assert not got.weak_type


def test_float64_becomes_float32_without_a_warning() -> None:
    got = incremental_update(np.ones(2), np.zeros(2), np.float64(0.5))  # warnings are errors here
    assert got.dtype == jnp.float32
    with jax.enable_x64(True):
        got = incremental_update(np.ones(2), np.zeros(2), 0.1)
        assert got.dtype == jnp.float64
        np.testing.assert_array_equal(got, 0.1)
        assert (
            incremental_update(np.ones(2), np.zeros(2, np.float32), jnp.float64(0.1)).dtype
            == jnp.float32
        )


def test_integers_booleans_and_keys_take_the_new_value() -> None:
    old = {"n": jnp.int32(10), "flag": jnp.array(False), "key": jax.random.key(0)}
    new = {"n": jnp.int32(15), "flag": jnp.array(True), "key": jax.random.key(1)}
    assert_same(incremental_update(new, old, 0.1), new)
    assert_same(incremental_update(new, old, 0.0), new)


def test_narrower_kinds_are_averaged_in_the_old_dtype() -> None:
    got = incremental_update({"a": 3, "b": True, "c": 1.0}, {"a": 1.0, "b": 0.0, "c": 1j}, 0.5)
    np.testing.assert_array_equal(jnp.stack([got["a"], got["b"], got["c"]]), [2, 0.5, 0.5 + 0.5j])
    assert got["c"].dtype == jnp.complex64


def test_none_in_the_new_tensors_gives_none() -> None:
    new, old = {"a": None, "b": jnp.ones(2)}, {"a": {"deep": jnp.ones(2)}, "b": jnp.zeros(2)}
    for rules in (optax, target_nets):
        assert rules.incremental_update(new, old, 0.5)["a"] is None
        assert rules.apply_updates(new, old)["a"] is None
    with pytest.raises(ValueError, match=r"new_tensors\['b'\]: expected float32\[3\]"):
        incremental_update(new, {"a": 1.0, "b": jnp.zeros(3)}, 0.5)
    with pytest.raises(ValueError, match=r"new_tensors\['b'\]: expected list .* got float32\[2\]"):
        incremental_update(new, {"a": 1.0, "b": [1.0]}, 0.5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_of_small_floats_are_rounded_once(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    params = rng.normal(size=1000).astype(dtype)
    updates = (rng.normal(size=1000) * 1e-2).astype(np.float32)
    expected = (params.astype(np.float64) + updates.astype(np.float64)).astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(arrays(apply_updates(params, updates))[0], expected)


def test_a_key_takes_no_update() -> None:
    with pytest.raises(TypeError, match=r"updates\['key'\]: a PRNG key takes no update"):
        apply_updates({"key": jax.random.key(0)}, {"key": jax.random.key(0)})


BAD_TENSORS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "missing": ({}, {"w": 1.0}, ValueError, r"\['w'\]: expected float32\[\] as in .*, got nothing"),
    "extra": ({"w": 1.0, "v": 2.0}, {"w": 1.0}, ValueError, r"\['v'\]: expected nothing"),
    "transposed": (jnp.ones((2, 3)), jnp.ones((3, 2)), ValueError, r": expected float32\[3, 2\]"),
    "broadcastable": (
        [jnp.ones((3, 1))],
        [jnp.ones((1, 3))],
        ValueError,
        r"\[0\]: .* got float32\[3, 1\]",
    ),
    "scalar": ({"w": 1.0}, {"w": np.ones(3)}, ValueError, r"\['w'\]: .* got float32\[\]"),
    "string": ({"w": "x"}, {"w": np.ones(3)}, TypeError, r"\['w'\]: .* got str"),
    "object": ({"w": object()}, {"w": 1.0}, TypeError, r"\['w'\]: .* got object"),
    "list for tuple": ({"w": [1.0]}, {"w": (1.0,)}, ValueError, r"\['w'\]: expected tuple .* got list"),
    "leaf for node": (
        {"w": 1.0},
        {"w": (1.0,)},
        ValueError,
        r"\['w'\]: expected tuple .* got float32\[\]",
    ),
    "complex into float": ({"w": 1j}, {"w": 1.0}, TypeError, r"\['w'\]: .* got complex64\[\]"),
    "float into int": ({"w": 1.5}, {"w": 1}, TypeError, r"\['w'\]: expected int32\[\] .* got float32"),
    "int into bool": ({"w": 1}, {"w": True}, TypeError, r"\['w'\]: expected bool\[\] .* got int32"),
    "key into uint": (jax.random.key(0), np.ones(2, np.uint32), TypeError, r": expected uint32\[2\]"),
    "uint into key": (np.ones(2, np.uint32), jax.random.key(0), TypeError, ": expected key<"),
    "other key": (jax.random.key(0, impl="rbg"), jax.random.key(0), TypeError, "got key<rbg>"),
    "float0": (np.zeros(2, jax.dtypes.float0), np.ones(2), TypeError, "float0"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(case: str) -> None:
    new, old, error, message = BAD_TENSORS[case]
    for name, call in (
        ("new_tensors", lambda: incremental_update(new, old, 0.5)),
        ("new_tensors", jax.jit(lambda: incremental_update(new, old, 0.5))),
        ("new_tensors", lambda: periodic_update(new, old, 2, 2)),
        ("new_tensors", lambda: periodic_update(new, old, 1, 2)),
        ("new_tensors", lambda: periodic_update(new, old, jnp.int32(1), 2)),
        ("updates", lambda: apply_updates(old, new)),
    ):
        with pytest.raises(error, match=f"{name}.*{message}|^{name}{message}"):
            call()


@pytest.mark.parametrize(
    ("step_size", "error"),
    [
        (-0.1, ValueError),
        (1.1, ValueError),
        (float("nan"), ValueError),
        (np.float32(2), ValueError),
        (np.array(2.0), ValueError),
        (np.ones(3), ValueError),
        (jnp.ones(3), ValueError),
        ("0.1", TypeError),
        (None, TypeError),
        (0.5j, TypeError),
        (True, TypeError),
        (float, TypeError),
    ],
)
def test_invalid_step_sizes(step_size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="step_size: expected"):
        incremental_update(1.0, 0.0, step_size)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("update_period", 0, ValueError),
        ("update_period", -1, ValueError),
        ("update_period", 2**31, ValueError),
        ("update_period", np.int64(0), ValueError),
        ("update_period", 2.0, TypeError),
        ("update_period", None, TypeError),
        ("update_period", True, TypeError),
        ("update_period", np.ones(2, int), ValueError),
        ("steps", 1.0, TypeError),
        ("steps", "1", TypeError),
        ("steps", jnp.ones(2, int), ValueError),
        ("steps", jnp.float32(1), TypeError),
    ],
)
def test_invalid_steps_and_periods(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{name}: expected"):
        periodic_update(1.0, 0.0, **{"steps": 1, "update_period": 1, name: value})


def test_a_traced_period_below_one_counts_as_one() -> None:
    assert periodic_update(1.0, 0.0, jnp.int32(3), jnp.int32(0)) == 1.0


def test_a_weakly_typed_carry_in_a_scan() -> None:
    def body(slow: jax.Array, online: jax.Array) -> tuple[jax.Array, jax.Array]:
        slow = incremental_update(online, slow, 0.25)
        return slow, slow

    online = jnp.arange(5.0)
    _, got = jax.lax.scan(body, 0.0, online)
    expected, slow = [], 0.0
    for value in np.arange(5.0):
        slow += 0.25 * (value - slow)
        expected.append(slow)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("step_size", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_derivatives_are_those_of_the_textbook_formula(step_size: float) -> None:
    args = ({"w": jnp.array([1.0, 2.0, 3.0])}, {"w": jnp.array([1.0, 1.0, 2.0])}, step_size)

    def total(rules: Any) -> Any:
        return lambda *args: jnp.sum(rules.incremental_update(*args)["w"] ** 2)

    ours, theirs = (jax.grad(total(rules), argnums=(0, 1))(*args) for rules in (target_nets, optax))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), ours, theirs)
    if 0 < step_size < 1:
        ours, theirs = (jax.grad(total(rules), argnums=2)(*args) for rules in (target_nets, optax))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    ours, theirs = (
        jax.grad(
            lambda *args, rules=rules: jnp.sum(rules.periodic_update(*args, jnp.int32(4), 2)["w"] ** 2)
        )(*args[:2])
        for rules in (target_nets, optax)
    )
    assert_same(ours, theirs)


def test_derivatives_through_updates_of_a_target() -> None:
    def loss(scale: jax.Array) -> jax.Array:
        target = target_nets.EMATarget({"w": jnp.ones(3), "n": jnp.int32(0)}, 0.25)
        for step in range(3):
            target.update({"w": scale * jnp.ones(3), "n": jnp.int32(step)})
        return jnp.sum(target.params["w"])

    np.testing.assert_allclose(jax.grad(loss)(1.0), 3 * (1 - 0.75**3), rtol=1e-6)


# Integers that the old leaf cannot hold

WRAPPING = {  # new, old, and the error
    "dtype": (jnp.int32(300), jnp.int8(0), TypeError),
    "dtype, though the value fits": (jnp.int32(3), jnp.int8(0), TypeError),
    "unsigned": (jnp.uint32(2**32 - 1), jnp.int32(0), TypeError),
    "negative": (jnp.int32(-1), jnp.uint8(0), TypeError),
    "NumPy": (np.int32(300), np.int8(0), TypeError),
    "number": (300, jnp.int8(0), ValueError),
    "negative number": (-1, jnp.uint8(0), ValueError),
    "NumPy, 64 bits": (np.int64(2**40), jnp.int32(0), ValueError),
    "NumPy array, 64 bits": (np.array([1, -(2**40)]), jnp.zeros(2, jnp.int32), ValueError),
}
INTEGER_RULES: dict[str, Callable[[Any, Any], Any]] = {
    **RULES,
    "EMATarget": lambda new, old: EMATarget(old, 0.5).update(new).params,
    "PeriodicTarget": lambda new, old: PeriodicTarget(old, 2).update(new).params,
    "sync": lambda new, old: PeriodicTarget(old, 2).sync(new).params,
}


@pytest.mark.parametrize("rule", INTEGER_RULES)
@pytest.mark.parametrize("case", WRAPPING)
def test_integers_that_do_not_fit_are_refused_by_path(case: str, rule: str) -> None:
    new, old, error = WRAPPING[case]

    def tree(n: Any) -> Any:
        return {"n": n, "w": jnp.ones(2)}

    with pytest.raises(error, match=r"\['n'\]: expected .*int"):
        INTEGER_RULES[rule](tree(new), tree(old))
    with pytest.raises(error, match=r"\['n'\]: expected .*int"):
        jax.jit(lambda old: INTEGER_RULES[rule](tree(new), old))(tree(old))


@pytest.mark.parametrize("rule", ["incremental_update", "EMATarget", "sync", "periodic_update, jax"])
def test_integers_that_fit_keep_their_values(rule: str) -> None:
    for new, old in (
        (jnp.int8(-7), jnp.int32(0)),
        (jnp.uint8(200), jnp.int16(0)),
        (True, jnp.int8(0)),
        (127, jnp.int8(0)),
        (-128, jnp.int8(0)),
        (np.int64(7), jnp.int32(0)),
        (np.arange(3), jnp.zeros(3, jnp.int32)),
        (2**31 - 1, 0),
    ):
        got = INTEGER_RULES[rule]({"n": new}, {"n": old})["n"]
        assert got.dtype == jnp.asarray(old).dtype
        np.testing.assert_array_equal(got, np.asarray(new))


@pytest.mark.parametrize("rule", INTEGER_RULES)
def test_integers_of_64_bits_keep_their_values_as_floats(rule: str) -> None:
    for new, old in (
        (np.int64(2**40), jnp.float32(0)),
        (np.array([2**31, -(2**31) - 2**9]), jnp.zeros(2)),
        (np.array([2**63], np.uint64), jnp.zeros(1, jnp.complex64)),
    ):
        got = INTEGER_RULES[rule]({"n": new}, {"n": old})["n"]
        if rule in ("apply_updates", "sync"):
            np.testing.assert_array_equal(got, np.asarray(new).astype(np.float32))
        elif rule in ("incremental_update", "EMATarget"):
            np.testing.assert_array_equal(got, np.asarray(new).astype(np.float32) / 2)
    distance = EMATarget({"n": jnp.float32(0)}, 0.5).distance({"n": np.int64(2**40)})
    assert distance == 2.0**40


def test_integers_that_need_64_bits_are_refused_where_a_tree_begins() -> None:
    wide, small = {"n": np.array([2**40, 1])}, {"n": np.array([1, 1])}
    for call in (
        lambda: EMATarget(wide, 0.5),
        lambda: PeriodicTarget(wide, 2),
        lambda: incremental_update(small, wide, 0.5),
        lambda: periodic_update(small, wide, 1, 2),
        lambda: apply_updates(wide, small),
    ):
        with pytest.raises(ValueError, match=r"\['n'\]: 1 to 1099511627776 needs jax_enable_x64"):
            call()
    with pytest.raises(ValueError, match=r"online_params\['n'\]: expected values of int32"):
        EMATarget(small, 0.5).distance(wide)
    with pytest.raises(ValueError, match=r"steps: expected at most 2\*\*31-1"):
        periodic_update(small, small, 2**40, jnp.int32(2))
