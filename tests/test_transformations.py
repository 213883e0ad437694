"""One object in every transformation of jax; where it was not passed in, it refuses and is unharmed."""

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
from jax.sharding import PartitionSpec

from target_nets import EMATarget, PeriodicTarget

START, ONLINE = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
MAKERS: dict[str, Callable[[], Any]] = {
    "ema": lambda: EMATarget(START, 0.5),
    "ema, array": lambda: EMATarget(START, jnp.float32(0.5)),
    "ema, schedule": lambda: EMATarget(START, lambda n: jnp.where(n >= 0, 0.5, 0.0)),
    "ema, period": lambda: EMATarget(START, 0.5, update_period=2),
    "ema, donate": lambda: EMATarget(START, 0.5, donate=True),
    "ema, compensated": lambda: EMATarget(START, 0.5, compensated=True),
    "ema, skipping": lambda: EMATarget(START, 0.5, skip_nonfinite=True),
    "ema, everything": lambda: EMATarget(
        START,
        jnp.float32(0.5),
        update_period=2,
        accumulator_dtype=jnp.bfloat16,
        compensated=True,
        skip_nonfinite=True,
        donate=True,
    ),
    "periodic": lambda: PeriodicTarget(START, 2),
    "periodic, donate": lambda: PeriodicTarget(START, 1, donate=True),
}


def update(target: Any, params: Any) -> Any:
    return target.update(params)


@pytest.fixture(params=MAKERS, name="make")
def _make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return MAKERS[request.param]


def scanned(target: Any) -> Any:
    return jax.lax.scan(lambda t, _: (t.update(ONLINE), None), target, length=2)[0]


def twice(function: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    return lambda target: function(function(target, ONLINE), ONLINE)


PASSED: dict[str, Callable[[Any], Any]] = {
    "jit": twice(jax.jit(update)),
    "jit, donated": lambda target: twice(jax.jit(update, donate_argnums=0))(
        jax.jit(lambda t: t)(target)
    ),
    "scan": scanned,
    "jitted scan": jax.jit(scanned),
    "fori_loop": lambda target: jax.lax.fori_loop(0, 2, lambda _, t: t.update(ONLINE), target),
    "while_loop": lambda target: jax.lax.while_loop(
        lambda t: t.step < 2, lambda t: t.update(ONLINE), target
    ),
    "cond": twice(lambda t, p: jax.lax.cond(True, update, lambda t, _: t, t, p)),
    "jitted cond": twice(jax.jit(lambda t, p: jax.lax.cond(True, update, lambda t, _: t, t, p))),
    "switch": twice(lambda t, p: jax.lax.switch(0, [update], t, p)),
    "checkpoint": twice(jax.checkpoint(update)),
    "mapped inside jit": jax.jit(
        lambda target: type(target).update(jax.tree.map(jnp.copy, target), ONLINE).update(ONLINE)
    ),
    "nnx.jit": twice(nnx.jit(update)),
    "disable_jit": lambda target: _disabled(target),
}


def _disabled(target: Any) -> Any:
    with jax.disable_jit():
        return scanned(target)


@pytest.mark.parametrize("how", PASSED)
def test_passed_in_and_returned(make: Callable[[], Any], how: str) -> None:
    got, expected = PASSED[how](make()), twice(update)(make())
    assert_same(got.params, expected.params)
    assert got.step == expected.step == 2
    assert_same(got.update(ONLINE).params, expected.update(ONLINE).params)  # usable outside again


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
            ValueError, match=r"population, its step of shape \[3\]; call it inside jax.vmap"
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


def test_vmap_of_one_target_over_many_online_parameters(make: Callable[[], Any]) -> None:
    target = make()
    onlines = {"w": jnp.stack([ONLINE["w"], 2 * ONLINE["w"]])}
    got = jax.vmap(lambda t, p: t.update(p).update(p), in_axes=(None, 0))(target, onlines)
    np.testing.assert_array_equal(got.params["w"][1], 2 * twice(update)(make()).params["w"])
    assert_same(target.params, START)
    assert target.step == 0


def test_eval_shape_and_abstract_targets(make: Callable[[], Any]) -> None:
    shape = jax.eval_shape(update, make(), ONLINE)
    assert shape.step.dtype == jnp.int32
    assert "arrays=1, parameters=3, bytes=" in repr(shape)
    assert jax.eval_shape(make).params["w"].shape == (3,)


def test_shard_map() -> None:
    mesh = jax.make_mesh((1,), ("data",))
    spec = PartitionSpec()
    sharded = jax.shard_map(update, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    got = jax.jit(sharded)(EMATarget(START, 0.5), ONLINE)
    assert_same(got.params, {"w": jnp.full(3, 0.5)})


def test_as_a_field_of_other_pytrees_and_through_tree_maps(make: Callable[[], Any]) -> None:
    state = {"target": make(), "params": START}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.flatten_with_path(state)[0]]
    assert paths[1:3] == ["['target'].params['w']", "['target'].step"]
    doubled = jax.tree.map(lambda x: x + x, state)["target"]
    assert type(doubled) is type(state["target"])
    structure = jax.tree.structure(state)
    assert structure == jax.tree.structure(jax.tree.map(lambda x: x, state))
    leaves = [object() for _ in range(structure.num_leaves)]
    assert jax.tree.leaves(structure.unflatten(leaves)) == leaves  # nothing is checked


def test_equal_settings_compile_once(trace_counter: Any) -> None:
    jitted = jax.jit(lambda target, params: target.update(params))
    with trace_counter() as compiled:
        for _ in range(3):
            jitted(EMATarget(START, 0.125), ONLINE)
        assert len(compiled) == 1
        jitted(EMATarget(START, 0.25), ONLINE)  # in a user's jit another number is another program
        assert len(compiled) == 2
        for step_size in (0.1, 0.2):
            jitted(EMATarget(START, jnp.float32(step_size)), ONLINE)  # an array is not
        assert len(compiled) == 3


# The trap guard


def closed_over(target: Any) -> dict[str, Callable[[], Any]]:
    call = target.update
    x = jnp.ones(3)

    def loss(w: jax.Array) -> jax.Array:
        call({"w": w})
        return jnp.sum(w)

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
        "handed through by grad": lambda: jax.grad(lambda w, t: (t.update({"w": w}), jnp.sum(w))[1])(
            x, target
        ),
        "inner jit of an outer argument": lambda: jax.jit(
            lambda t, w: jax.jit(lambda w: (t.update({"w": w}), w)[1])(w)
        )(target, x),
    }


@pytest.mark.parametrize("how", closed_over(EMATarget(START, 0.5)))
@pytest.mark.parametrize("method", ["update", "sync"])
def test_closed_over_it_refuses_and_is_unharmed(make: Callable[[], Any], how: str, method: str) -> None:
    target = make()
    before = jax.tree.map(np.asarray, target)
    if method == "sync":
        real = target
        target = _Calling(real)
    else:
        real = target
    with pytest.raises(RuntimeError, match=rf"{method}: .*Pass the target into that function"):
        closed_over(target)[how]()
    assert_same(jax.tree.map(np.asarray, real), before)
    assert_same(twice(update)(real).params, twice(update)(make()).params)


@jax.tree_util.register_pytree_node_class
class _Calling:
    """Passes `update` on as `sync`."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def update(self, params: Any) -> Any:
        return self.target.sync(params)

    def tree_flatten(self) -> Any:
        return (self.target,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Any:
        return cls(*children)


def test_a_target_that_leaks_out_of_jit_refuses_too() -> None:
    leaked = []
    jax.jit(lambda p: leaked.append(EMATarget(p, 0.5)))(START)
    with pytest.raises(RuntimeError, match="Pass the target"):
        leaked[0].update(ONLINE)


def test_reading_is_allowed_anywhere(make: Callable[[], Any]) -> None:
    target = make()

    def read(w: jax.Array) -> jax.Array:
        return jnp.sum(w * target.params["w"]) + target.distance({"w": w}) + target.step

    for transform in (jax.jit, jax.grad, lambda f: jax.vmap(lambda w: f(jnp.ones(3) * w))):
        transform(read)(jnp.ones(3))
    assert repr(target) == repr(make())
    texts = []
    jax.jit(lambda t: texts.append(repr(t)))(target)
    assert "step=traced" in texts[0]


def test_other_threads(make: Callable[[], Any]) -> None:
    target = make()
    thread = threading.Thread(target=lambda: target.update(ONLINE).sync(ONLINE))
    thread.start()
    thread.join()
    assert target.step == 1
    assert_same(target.params, ONLINE)


def test_contexts_that_are_no_transformation(make: Callable[[], Any]) -> None:
    target = make()
    mesh = jax.make_mesh((1,), ("data",))
    with jax.set_mesh(mesh):
        target.update(ONLINE)
    with jax.default_matmul_precision("float32"), jax.named_scope("agent"), jax.debug_nans(True):
        target.update(ONLINE)
    assert target.step == 2


def test_host_callbacks(make: Callable[[], Any]) -> None:
    target = make()

    @jax.jit
    def train(w: jax.Array) -> jax.Array:
        jax.debug.callback(lambda w: target.update({"w": w}), w, ordered=True)
        return w + 1

    jax.block_until_ready(train(jnp.zeros(3)))
    jax.effects_barrier()
    assert target.step == 1


def test_leaves_may_be_mapped_to_none_and_combined_again(make: Callable[[], Any]) -> None:
    target = make()
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
    assert target.params["w"] is before  # and nothing else is touched between syncs


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_strict_dtype_promotion(make: Callable[[], Any]) -> None:
    with jax.numpy_dtype_promotion("strict"):
        target = jax.jit(update)(make(), ONLINE).update(ONLINE)
        target.distance(ONLINE)
    assert_same(target.params, twice(update)(make()).params)
