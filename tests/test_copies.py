"""Copies and pickles share no buffer with the target; repr is one short line."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparisons import arrays, assert_equal_values, assert_same, bits
from helpers.targets import COPIES, MAKERS, at_step, harmonic
from helpers.trees import START, perturb

from target_nets import EMATarget, PeriodicTarget

WAYS: dict[str, Callable[[Any], Any]] = {
    **{how: COPIES[how] for how in ("copy", "deepcopy", "pickle")},
    "deepcopy of an owner": lambda target: copy.deepcopy({"agent": [target]})["agent"][0],
}


def donate(target: Any) -> Any:
    """Returns a target whose arrays were donated."""
    on_device = jax.jit(lambda t: t)(target)
    jax.jit(lambda t: t.update({"w": jnp.zeros((2, 3)), "b": jnp.zeros(2)}), donate_argnums=0)(on_device)
    return on_device


@pytest.mark.parametrize("how", WAYS)
def test_copies_share_no_buffer(how: str) -> None:
    params = {"w": jnp.zeros(64), "h": jnp.zeros(2, jnp.bfloat16), "key": jax.random.key(0)}
    for target in (
        EMATarget(params, 0.5, update_period=2, donate=True),
        EMATarget(params, jnp.float32(0.5)),
        EMATarget(params, 0.3, compensated=True, skip_nonfinite=True),
        EMATarget(params, 0.3, compensated=True, skip_nonfinite=True).update(perturb(params)),
        EMATarget(params, harmonic, mask={"w": True, "h": False, "key": True}),
        PeriodicTarget(params, 1, donate=True),
        jax.jit(lambda t: t)(EMATarget(params, 0.5)),
    ):
        target.update(perturb(params))
        twin = WAYS[how](target)
        assert type(twin) is type(target)
        assert twin is not target
        assert repr(twin) == repr(target)
        assert type(twin.step) is type(target.step)
        assert_same(twin.params, target.params)
        assert jax.tree.structure(twin) == jax.tree.structure(target)  # so nothing is compiled again
        ours, theirs = (
            {
                x.unsafe_buffer_pointer()
                for x in jax.tree.leaves(t)
                if isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            }
            for t in (target, twin)
        )
        assert not ours & theirs
        before = arrays(twin)
        target.update(perturb(params)).update(perturb(params)).sync(params)
        assert_equal_values(arrays(twin), before)
        twin.update(perturb(params))


def test_copies_of_every_tree(tree: Any) -> None:
    target = EMATarget(tree, 0.5).update(perturb(tree))
    for make_copy in (copy.copy, copy.deepcopy):
        assert_same(make_copy(target).params, target.params)


@pytest.mark.parametrize("how", ["copy", "deepcopy"])
def test_a_copy_shares_no_numpy_array_with_the_target(how: str) -> None:
    target = jax.device_get(EMATarget({"w": jnp.zeros(4)}, 0.5, compensated=True))
    twin = COPIES[how](target)
    for x, y in zip(jax.tree.leaves(twin), jax.tree.leaves(target), strict=True):
        assert np.ndim(x) == 0 or not np.shares_memory(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("how", COPIES)
def test_nobody_can_write_to_the_step(how: str) -> None:
    target = EMATarget({"w": jnp.zeros(4)}, 0.5, skip_nonfinite=True)
    for each in (target, COPIES[how](target)):
        with pytest.raises(ValueError, match="read-only"):
            each.step[...] = 7


@pytest.mark.parametrize("kind", ["ema", "ema, array", "ema, everything", "periodic"])
def test_nobody_can_write_into_a_target_of_host_arrays(kind: str) -> None:
    """However the target came to be, and whoever holds the arrays that it was made of."""
    leaves, treedef = jax.tree.flatten(MAKERS[kind](START))
    given = [np.array(x) for x in leaves]
    target = treedef.unflatten(given)
    twins = [target, *(copy(target) for copy in COPIES.values()), jax.tree.map(np.array, target)]
    before = [bits(twin) for twin in twins]
    for array in given:
        array[...] = 9
    for twin in twins:
        read = [twin.step, *jax.tree.leaves(twin.params)]
        read += [twin.skipped, twin.step_size] if isinstance(twin, EMATarget) else []
        for array in read:
            if isinstance(array, np.ndarray):
                with pytest.raises(ValueError, match="read-only"):
                    array[...] = 9
    assert [bits(twin) for twin in twins] == before


def test_a_copy_has_step_and_parameters_of_the_same_update() -> None:
    target = EMATarget({"w": jnp.zeros(2)}, 1.0)
    for step in range(1, 4):
        target.update({"w": jnp.full(2, float(step))})
        twin = copy.copy(target)
        assert twin.step == twin.params["w"][0] == step


BOTH_CLASSES: dict[str, Callable[[Any], Any]] = {
    "ema": lambda params: EMATarget(params, 0.5),
    "periodic": lambda params: PeriodicTarget(params, 3),
}


@pytest.mark.parametrize("make", BOTH_CLASSES.values(), ids=BOTH_CLASSES)
def test_targets_are_compared_by_identity(make: Callable[[Any], Any]) -> None:
    params = {"w": jnp.zeros(2)}
    target = make(params)
    assert target == target
    assert target != make(params)
    assert len({target, make(params)}) == 2
    assert weakref.ref(target)() is target
    assert attrs.has(type(target))


@pytest.mark.parametrize("make", BOTH_CLASSES.values(), ids=BOTH_CLASSES)
def test_params_and_unknown_attributes_cannot_be_assigned(make: Callable[[Any], Any]) -> None:
    target = make({"w": jnp.zeros(2)})
    with pytest.raises(AttributeError):
        target.params = {"w": jnp.ones(2)}  # type: ignore[misc]
    with pytest.raises(AttributeError):
        target.tau = 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (
            lambda p: EMATarget(p, 1 / 3),
            "EMATarget(step=0, step_size=0.333333, update_period=1, arrays=2, parameters=8, bytes=32)",
        ),
        (
            lambda p: EMATarget(p, 0.005),
            "EMATarget(step=0, step_size=0.005, update_period=1, arrays=2, parameters=8, bytes=32)",
        ),
        (
            lambda p: EMATarget(
                p, jnp.float32(0.25), update_period=2, mask={"w": True, "b": False}, donate=True
            ),
            "EMATarget(step=0, step_size=0.25, update_period=2, averaged=1 of 2, donate=True, arrays=2, "
            "parameters=8, bytes=32)",
        ),
        (
            lambda p: EMATarget(p, harmonic),
            "EMATarget(step=0, step_size=harmonic, update_period=1, arrays=2, parameters=8, bytes=32)",
        ),
        (
            lambda p: at_step(PeriodicTarget(p, 100), 1_234_567),
            "PeriodicTarget(step=1234567, update_period=100, arrays=2, parameters=8, bytes=32)",
        ),
        (
            lambda p: donate(EMATarget(p, 0.5)),
            "EMATarget(step=deleted, step_size=0.5, update_period=1, arrays=2, parameters=8, bytes=32)",
        ),
        (
            lambda p: PeriodicTarget(p, 100).update(p),
            "PeriodicTarget(step=1, update_period=100, arrays=2, parameters=8, bytes=32)",
        ),
    ],
)
def test_repr(target: Any, text: str) -> None:
    assert repr(target({"w": np.zeros((2, 3)), "b": jnp.zeros(2)})) == text


def test_repr_of_every_tree_is_one_line(tree: Any) -> None:
    for target in (EMATarget(tree, optax.linear_schedule(0.5, 0, 10)), PeriodicTarget(tree, 2)):
        assert "\n" not in repr(target)
        assert "bytes=" in repr(target)


def test_a_read_only_view_of_writable_memory_is_copied() -> None:
    leaves, treedef = jax.tree.flatten(EMATarget(START, 0.5))
    mine = [np.array(x) for x in leaves]
    target = treedef.unflatten([np.broadcast_to(x, x.shape) for x in mine])
    before = bits(target)
    for x in mine:
        x[...] = 7
    assert bits(target) == before


def test_donating_the_old_target_leaves_the_step_size_of_the_updated_one() -> None:
    old = EMATarget(START, jnp.float32(0.5))
    new = old.updated(START)
    jax.jit(lambda target: target.update(START), donate_argnums=0)(old)
    assert new.update(START).step_size == 0.5
