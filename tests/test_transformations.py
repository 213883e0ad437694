"""A target works in every transformation of jax; one that was not passed in refuses and is unharmed."""

import threading
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.comparisons import assert_same
from helpers.targets import EVERYTHING, MAKERS, jitted_update, update
from helpers.trees import ONLINE, START
from jax.sharding import PartitionSpec

from target_nets import EMATarget, PeriodicTarget

ALL_MAKERS: dict[str, Callable[[Any], Any]] = MAKERS | {
    "ema, everything, array, period, donate": lambda params: EMATarget(
        params, jnp.float32(0.5), update_period=2, donate=True, **EVERYTHING
    ),
    "periodic, every update": lambda params: PeriodicTarget(params, 1),
}
every_target = pytest.mark.parametrize("kind", ALL_MAKERS)
each_class = pytest.mark.parametrize("kind", ["ema, everything, array, period, donate", "periodic"])
# These three differ in how they are read: as they are held, cast together with an error, copied.
each_way_to_read = pytest.mark.parametrize("kind", ["ema", "ema, everything", "periodic"])


def make(kind: str) -> Any:
    return ALL_MAKERS[kind](START)


def twice(function: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    return lambda target: function(function(target, ONLINE), ONLINE)


def scan_twice(target: Any) -> Any:
    return jax.lax.scan(lambda t, _: (t.update(ONLINE), None), target, length=2)[0]


def scan_without_jit(target: Any) -> Any:
    with jax.disable_jit():
        return scan_twice(target)


def cond(target: Any, online: Any) -> Any:
    return jax.lax.cond(True, update, lambda target, _: target, target, online)


# Each updates a target twice.
TRANSFORMATIONS: dict[str, Callable[[Any], Any]] = {
    "jit": twice(jitted_update),
    "jit, donated": lambda target: twice(jax.jit(update, donate_argnums=0))(
        jax.jit(lambda t: t)(target)
    ),
    "scan": scan_twice,
    "jitted scan": jax.jit(scan_twice),
    "fori_loop": lambda target: jax.lax.fori_loop(0, 2, lambda _, t: t.update(ONLINE), target),
    "while_loop": lambda target: jax.lax.while_loop(
        lambda t: t.step < 2, lambda t: t.update(ONLINE), target
    ),
    "cond": twice(cond),
    "jitted cond": twice(jax.jit(cond)),
    "switch": twice(lambda t, p: jax.lax.switch(0, [update], t, p)),
    "checkpoint": twice(jax.checkpoint(update)),
    "tree.map inside jit": jax.jit(
        lambda target: jax.tree.map(jnp.copy, target).update(ONLINE).update(ONLINE)
    ),
    "nnx.jit": twice(nnx.jit(update)),
    "disable_jit": scan_without_jit,
}


def check_transformation(kind: str, how: str) -> None:
    got, expected = TRANSFORMATIONS[how](make(kind)), twice(update)(make(kind))
    assert_same(got.params, expected.params)
    assert got.step == expected.step == 2
    # The result can be used outside of the transformation.
    assert_same(got.update(ONLINE).params, expected.update(ONLINE).params)


@each_class
@pytest.mark.parametrize("how", TRANSFORMATIONS)
def test_an_update_in_every_transformation(kind: str, how: str) -> None:
    check_transformation(kind, how)


@every_target
@pytest.mark.parametrize("how", ["scan", "jit, donated"])
def test_every_target_in_a_transformation(kind: str, how: str) -> None:
    check_transformation(kind, how)


def test_a_target_made_inside_a_transformation() -> None:
    @jax.jit
    def train(params: Any) -> Any:
        target = EMATarget(params, 0.5, update_period=2)
        return target.update(ONLINE).update(ONLINE)

    assert_same(train(START).params, {"w": jnp.full(3, 0.5)})
    assert_same(train(START).update(ONLINE).step, np.int32(3)[()])


def test_a_population_of_targets_with_their_own_step_sizes() -> None:
    step_sizes = jnp.array([0.1, 0.5, 1.0])
    targets = jax.vmap(lambda s: EMATarget(START, s))(step_sizes)
    targets = jax.vmap(update, in_axes=(0, None))(targets, ONLINE)
    targets = jax.jit(jax.vmap(update, in_axes=(0, None)))(targets, ONLINE)
    np.testing.assert_allclose(targets.params["w"][:, 0], 1 - (1 - step_sizes) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(targets.step, [2, 2, 2])
    assert "step=int32[3]" in repr(targets)
    for method in (targets.update, targets.distance):
        with pytest.raises(
            ValueError, match=r"this target is a population, of shape \[3\]; call it inside jax.vmap"
        ):
            method(ONLINE)
    one = jax.tree.map(lambda x: x[1], targets)
    np.testing.assert_allclose(one.update(ONLINE).params["w"], 0.875)


@pytest.mark.parametrize("cls", [EMATarget, PeriodicTarget])
def test_a_population_of_online_parameters(cls: Any) -> None:
    starts = {"w": jnp.zeros((4, 3))}
    onlines = {"w": jnp.arange(12.0).reshape(4, 3)}
    targets = jax.vmap(lambda p: cls(p, 1))(starts)
    targets = jax.vmap(update)(targets, onlines)
    assert_same(targets.params, onlines)
    distances = jax.vmap(lambda t, p: t.distance(p))(targets, starts)
    np.testing.assert_allclose(distances, np.linalg.norm(onlines["w"], axis=1), rtol=1e-6)


@every_target
def test_vmap_of_one_target_over_many_online_parameters(kind: str) -> None:
    target = make(kind)
    onlines = {"w": jnp.stack([ONLINE["w"], 2 * ONLINE["w"]])}
    got = jax.vmap(lambda t, p: t.update(p).update(p), in_axes=(None, 0))(target, onlines)
    expected = 2 * twice(update)(make(kind)).params["w"]
    np.testing.assert_allclose(got.params["w"][1], expected, rtol=1e-4)
    assert_same(target.params, START)
    assert target.step == 0


@every_target
def test_eval_shape_and_abstract_targets(kind: str) -> None:
    shape = jax.eval_shape(update, make(kind), ONLINE)
    assert shape.step.dtype == jnp.int32
    assert "arrays=1, parameters=3, bytes=" in repr(shape)
    assert jax.eval_shape(lambda: make(kind)).params["w"].shape == (3,)


def test_shard_map() -> None:
    mesh = jax.make_mesh((1,), ("data",))
    spec = PartitionSpec()
    sharded = jax.shard_map(update, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    got = jax.jit(sharded)(EMATarget(START, 0.5), ONLINE)
    assert_same(got.params, {"w": jnp.full(3, 0.5)})


@every_target
def test_a_field_of_another_pytree(kind: str) -> None:
    state = {"target": make(kind), "params": START}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.flatten_with_path(state)[0]]
    assert paths[1:3] == ["['target'].params['w']", "['target'].step"]
    doubled = jax.tree.map(lambda x: x + x, state)["target"]
    assert type(doubled) is type(state["target"])
    structure = jax.tree.structure(state)
    assert structure == jax.tree.structure(jax.tree.map(lambda x: x, state))
    leaves = [object() for _ in range(structure.num_leaves)]
    assert jax.tree.leaves(structure.unflatten(leaves)) == leaves  # unflattening checks nothing


def test_equal_settings_compile_once(trace_counter: Any) -> None:
    jitted = jax.jit(lambda target, params: target.update(params))
    with trace_counter() as compiled:
        for _ in range(3):
            jitted(EMATarget(START, 0.125), ONLINE)
        assert len(compiled) == 1
        jitted(EMATarget(START, 0.25), ONLINE)  # another number is another program
        assert len(compiled) == 2
        for step_size in (0.1, 0.2):
            jitted(EMATarget(START, jnp.float32(step_size)), ONLINE)  # another array is not
        assert len(compiled) == 3


# The guard against a target that was not passed in


def close_over(target: Any, method: str) -> dict[str, Callable[[], Any]]:
    """Returns the ways to call a method in a transformation that the target was not passed into."""
    call = getattr(target, method)
    x = jnp.ones(3)

    def loss(w: jax.Array) -> jax.Array:
        call({"w": w})
        return jnp.sum(w)

    def loss_of_passed(w: jax.Array, target: Any) -> jax.Array:
        getattr(target, method)({"w": w})
        return jnp.sum(w)

    def inner_jit(target: Any, w: jax.Array) -> jax.Array:
        return jax.jit(lambda w: loss_of_passed(w, target))(w)

    return {
        "jit": lambda: jax.jit(loss)(x),
        "grad": lambda: jax.grad(loss)(x),
        "value_and_grad": lambda: jax.jit(jax.value_and_grad(loss))(x),
        "vmap": lambda: jax.vmap(lambda w: loss(w))(jnp.ones((2, 3))),
        "scan": lambda: jax.lax.scan(lambda c, _: (c, loss(x)), 0.0, length=2),
        "scan, concrete parameters": lambda: jax.lax.scan(
            lambda c, _: (c, call(ONLINE).step), 0.0, length=2
        ),
        "cond": lambda: jax.lax.cond(jnp.bool_(True), loss, loss, x),
        "while_loop": lambda: jax.lax.while_loop(lambda c: c < 3, lambda c: c + loss(x), 0.0),
        "checkpoint": lambda: jax.checkpoint(loss)(x),
        "eval_shape": lambda: jax.eval_shape(loss, x),
        "linearize": lambda: jax.linearize(loss, x),
        "jvp": lambda: jax.jvp(loss, (x,), (x,)),
        "nnx.jit": lambda: nnx.jit(loss)(x),
        "grad, with the target as another argument": lambda: jax.grad(loss_of_passed)(x, target),
        "jit inside of jit": lambda: jax.jit(inner_jit)(target, x),
    }


WAYS = list(close_over(EMATarget(START, 0.5), "update"))


def check_refusal(kind: str, how: str, method: str) -> None:
    target = make(kind)
    before = jax.tree.map(np.asarray, target)
    with pytest.raises(RuntimeError, match=rf"{method}: (?s:.*)[Pp]ass the target"):
        close_over(target, method)[how]()
    assert_same(jax.tree.map(np.asarray, target), before)
    assert_same(twice(update)(target).params, twice(update)(make(kind)).params)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    ("kind", "method"), [("ema", "update"), ("ema", "sync"), ("periodic", "update")]
)
def test_a_target_that_is_closed_over_refuses_and_is_unharmed(kind: str, how: str, method: str) -> None:
    check_refusal(kind, how, method)


@every_target
def test_every_target_that_is_closed_over_refuses(kind: str) -> None:
    for method in ("update", "sync"):
        check_refusal(kind, "jit", method)


def test_a_target_that_leaks_out_of_jit_refuses_too() -> None:
    leaked = []
    jax.jit(lambda p: leaked.append(EMATarget(p, 0.5)))(START)
    with pytest.raises(RuntimeError, match=r"[Pp]ass the target"):
        leaked[0].update(ONLINE)


@each_way_to_read
def test_a_target_can_be_read_anywhere(kind: str) -> None:
    target = make(kind)

    def read(w: jax.Array) -> jax.Array:
        return jnp.sum(w * target.params["w"]) + target.distance({"w": w}) + target.step

    for transform in (jax.jit, jax.grad, lambda f: jax.vmap(lambda w: f(jnp.ones(3) * w))):
        transform(read)(jnp.ones(3))
    assert repr(target) == repr(make(kind))
    texts = []
    jax.jit(lambda t: texts.append(repr(t)))(target)
    assert "step=traced" in texts[0]


@each_class
def test_another_thread_may_update(kind: str) -> None:
    target = make(kind)
    thread = threading.Thread(target=lambda: target.update(ONLINE).sync(ONLINE))
    thread.start()
    thread.join()
    assert target.step == 1
    assert_same(target.params, ONLINE)


@each_class
def test_contexts_that_are_no_transformation(kind: str) -> None:
    target = make(kind)
    mesh = jax.make_mesh((1,), ("data",))
    with jax.set_mesh(mesh):
        target.update(ONLINE)
    with jax.default_matmul_precision("float32"), jax.named_scope("agent"), jax.debug_nans(True):
        target.update(ONLINE)
    assert target.step == 2


@each_class
def test_a_host_callback_may_update(kind: str) -> None:
    target = make(kind)

    @jax.jit
    def train(w: jax.Array) -> jax.Array:
        jax.debug.callback(lambda w: target.update({"w": w}), w, ordered=True)
        return w + 1

    jax.block_until_ready(train(jnp.zeros(3)))
    jax.effects_barrier()
    assert target.step == 1


@each_way_to_read
def test_leaves_may_be_mapped_to_none_and_combined_again(kind: str) -> None:
    target = make(kind)
    dynamic, static = eqx.partition(target, lambda x: np.ndim(x) > 0)
    combined = eqx.combine(dynamic, static)
    assert jax.tree.structure(combined) == jax.tree.structure(target)
    assert_same(eqx.filter_jit(update)(target, ONLINE).params, target.update(ONLINE).params)
    assert "None" in repr(jax.tree.map(lambda _: None, target))


def test_an_eager_update_brings_the_step_back_to_the_host() -> None:
    target = jax.jit(lambda t: t)(PeriodicTarget(START, 10))
    assert isinstance(target.step, jax.Array)
    before = target.params["w"]
    assert type(target.update(ONLINE).step) is np.ndarray
    assert target.params["w"] is before  # an update between periods touches nothing else


@every_target
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_strict_dtype_promotion(kind: str) -> None:
    with jax.numpy_dtype_promotion("strict"):
        target = jitted_update(make(kind), ONLINE).update(ONLINE)
        target.distance(ONLINE)
    assert_same(target.params, twice(update)(make(kind)).params)


def test_the_leaves_have_these_keys_in_this_order() -> None:
    settings = {"accumulator_dtype": "float16", "compensated": True, "skip_nonfinite": True}
    target = EMATarget(START, jnp.float32(0.5), **settings)
    keys = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(target)]
    assert keys == [".params['w']", ".step", ".skipped", ".compensation['w']", ".step_size"]
    keys = [
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(PeriodicTarget(START, 2))
    ]
    assert keys == [".params['w']", ".step"]
