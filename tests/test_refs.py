"""Refs, and nnx Variables that hold them, are read wherever online parameters come in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.comparisons import arrays, assert_same
from helpers.targets import MAKERS, RULES

from target_nets import EMATarget, incremental_update

START = {"w": jnp.zeros((2, 3)), "k": jax.random.key(0), "b": jnp.zeros(2, jnp.bfloat16)}
ONLINE = {"w": jnp.full((2, 3), 0.25), "k": jax.random.key(1), "b": jnp.ones(2, jnp.bfloat16)}


def as_refs(tree: Any) -> Any:
    """The tree with Refs in the places of its numbers. jax has no Refs of keys."""

    def as_ref(x: jax.Array) -> Any:
        return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.new_ref(x)

    return jax.tree.map(as_ref, tree)


METHODS: dict[str, Callable[[Any, Any], Any]] = {
    "update": lambda target, online: target.update(online),
    "updated": lambda target, online: target.updated(online),
    "sync": lambda target, online: target.sync(online),
    "distance": lambda target, online: target.distance(online),
    "constructor": lambda _, online: EMATarget(online, 0.5),
}


@pytest.mark.parametrize("kind", ["ema", "ema, period", "ema, everything", "periodic, donate"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_read_refs(method: str, kind: str) -> None:
    call = METHODS[method]
    for wrap in (lambda f: f, jax.jit):
        got = wrap(call)(MAKERS[kind](START), as_refs(ONLINE))
        expected = wrap(call)(MAKERS[kind](START), ONLINE)
        assert_same(got, expected)


@pytest.mark.parametrize("rule", RULES)
def test_rules_read_new_refs(rule: str) -> None:
    call = RULES[rule]
    new, old = ({name: tree[name] for name in ("w", "b")} for tree in (ONLINE, START))
    for wrap in (lambda f: f, jax.jit):
        assert_same(wrap(call)(as_refs(new), old), wrap(call)(new, old))


@pytest.mark.parametrize("rule", RULES)
def test_rules_refuse_old_refs(rule: str) -> None:
    call, name = RULES[rule], "params" if rule == "apply_updates" else "old_tensors"
    new, old = {"w": ONLINE["w"]}, {"w": jax.new_ref(START["w"])}
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(TypeError, match=rf"{name}\['w'\]: expected an array, got Ref"):
            wrap(call)(new, old)


def test_a_ref_that_a_train_step_writes_to() -> None:
    """The Ref is read at the time of the call, and the slow copy does not follow it afterwards."""

    @jax.jit
    def train(target: EMATarget[Any], ref: Any) -> EMATarget[Any]:
        ref[...] += 1.0
        target.update({"w": ref})
        ref[...] += 100.0
        ref[...] -= 100.0
        return target

    target, ref = EMATarget({"w": jnp.zeros(3)}, 0.5), jax.new_ref(jnp.zeros(3))
    for _ in range(3):
        target = train(target, ref)
    np.testing.assert_allclose(target.params["w"], 2.125)  # of 1, 2 and 3
    ref[...] = jnp.full(3, 9.0)
    assert target.params["w"][0] < 9


def test_refs_in_loops_and_branches() -> None:
    ref, target = {"w": jax.new_ref(jnp.ones(3))}, EMATarget({"w": jnp.zeros(3)}, 0.5, update_period=2)

    def body(target: Any, _: None) -> tuple[Any, jax.Array]:
        return target.update(ref), target.distance(ref)

    target, _ = jax.lax.scan(body, target, length=4)
    np.testing.assert_array_equal(target.params["w"], np.full(3, 0.75))

    def step(target: Any, p: jax.Array) -> Any:
        return jax.lax.cond(p, lambda t: t.updated(ref), lambda t: t, target)

    target = jax.jit(step)(target, True)
    assert target.step == 5


@pytest.mark.parametrize("form", ["module", "state", "nested"])
@pytest.mark.parametrize(
    "defaults", [{"ref": True}, {"hijax": True}, {"ref": True, "hijax": True}], ids=str
)
def test_variables_that_hold_refs_or_are_hijax(defaults: dict[str, bool], form: str) -> None:
    with nnx.var_defaults(**defaults):
        module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    params = {"module": module, "state": nnx.state(module), "nested": {"net": module}}[form]
    plain = nnx.to_pure_dict(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    plain = {"net": plain} if form == "nested" else plain
    for kind in ("ema", "ema, everything", "periodic"):
        target, expected = MAKERS[kind](params), MAKERS[kind](plain)
        for method in ("update", "sync", "update"):
            METHODS[method](target, params)
            METHODS[method](expected, plain)
        assert_same(arrays(target), arrays(expected))
        assert_same(target.distance(params), expected.distance(plain))
        assert jax.tree.structure(target.params) == jax.tree.structure(params)
        if defaults != {"ref": True, "hijax": True}:  # jax cannot read these inside jit
            assert_same(
                arrays(jax.jit(METHODS["update"])(target, params)), arrays(expected.update(plain))
            )
    for rule in RULES.values():
        assert type(rule(params, params)) is type(params)


def variables(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


@pytest.mark.parametrize("defaults", [{"ref": True}, {"hijax": True}], ids=str)
def test_they_come_back_as_they_were(defaults: dict[str, bool]) -> None:
    with nnx.var_defaults(**defaults):
        module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    variable = module.kernel
    for params in (module, nnx.state(module), {"w": variable}, variable):
        target = EMATarget(params, 0.5)
        for got in (target.update(params).params, incremental_update(params, params, 0.5)):
            assert jax.tree.structure(got) == jax.tree.structure(params)
            for x, y in zip(variables(got), variables(params), strict=True):
                assert (type(x), x.get_metadata()) == (type(y), y.get_metadata())
                assert_same(x[...], y[...])
                assert x.get_raw_value() is not y.get_raw_value()


def test_a_module_of_refs_can_be_trained_on() -> None:
    with nnx.var_defaults(ref=True):
        module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    @jax.jit
    def clear(module: nnx.Linear) -> None:
        module.kernel[...] = jnp.zeros((2, 3))

    target = EMATarget(module, 0.5)
    slow = target.params
    clear(slow)
    assert not np.any(slow.kernel[...])
    assert np.all(target.params.kernel[...] != 0)


def test_whatever_else_jax_gives_a_type_is_refused_by_path() -> None:
    for leaf in (jax.lax.create_token(), "text", object()):
        with pytest.raises(TypeError, match=r"params\['w'\]: expected an array"):
            EMATarget({"w": leaf}, 0.5)
