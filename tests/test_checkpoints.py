"""A checkpoint of flax.serialization or Orbax restores a target bit for bit, alone or in any state."""

import contextlib
import gc
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx, serialization
from flax.training.train_state import TrainState
from helpers.comparisons import arrays, assert_same
from helpers.targets import MAKERS, jitted_update, through_bytes, update
from helpers.trees import Network, Tied, make_tree, perturb
from jax.sharding import NamedSharding, PartitionSpec

from target_nets import EMATarget, PeriodicTarget


def check_resumption(tree: Any, make: Callable[[Any], Any], update: Callable[[Any, Any], Any]) -> None:
    """Saves and restores a run at every step, and compares it with an uninterrupted run."""
    resumed, uninterrupted = make(tree), make(tree)
    for step in range(3):
        online = perturb(tree, step + 1.0)
        uninterrupted = update(uninterrupted, online)
        resumed = update(through_bytes(resumed, make(tree)), online)
        restored = through_bytes(resumed, make(perturb(tree, 5.0)))
        for got in (resumed, restored):
            assert type(got) is type(uninterrupted)
            assert_same(got.params, uninterrupted.params)
            assert_same(arrays(got), arrays(uninterrupted))
            assert got.step == uninterrupted.step == step + 1
        assert jax.tree.structure(restored) == jax.tree.structure(make(tree))


def test_a_run_of_every_tree_resumes_bit_for_bit(tree: Any) -> None:
    check_resumption(tree, MAKERS["ema, compensated"], update)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_run_with_every_setting_resumes_bit_for_bit(kind: str) -> None:
    check_resumption(make_tree("every dtype"), MAKERS[kind], update)


@pytest.mark.parametrize("kind", ["ema", "ema, schedule", "ema, everything", "periodic"])
def test_a_jitted_run_resumes_bit_for_bit(kind: str) -> None:
    check_resumption(make_tree("every dtype"), MAKERS[kind], jitted_update)


def test_the_state_dict_is_plain_and_named(tree: Any) -> None:
    target = EMATarget(tree, 0.3).update(tree)
    state = serialization.to_state_dict(target)
    assert list(state) == ["step", "params"]
    assert type(state["step"]) is int

    def check(node: Any) -> int:
        if isinstance(node, dict):
            assert all(isinstance(key, str) for key in node)
            return sum(check(child) for child in node.values())
        assert node is None or isinstance(node, jax.Array)
        return node is not None

    assert check(state["params"]) == len(jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "name",
    [
        "dict",
        "FrozenDict",
        "list and tuple",
        "NamedTuple",
        "flax struct",
        "Linen",
        "Haiku",
        "integer keys",
        "None and empty nodes",
        "bare array",
    ],
)
def test_nodes_that_flax_knows_are_named_as_in_flax(name: str) -> None:
    tree = make_tree(name)
    assert_same(
        serialization.to_state_dict(EMATarget(tree, 0.3))["params"], serialization.to_state_dict(tree)
    )


def test_nnx_state_is_named_as_in_to_pure_dict_with_string_keys() -> None:
    network = Network()
    expected = {
        "dropout": {"rngs": {"count": (), "key": (2,)}},
        "layers": {"0": {"bias": (4,), "kernel": (3, 4)}, "1": {"bias": (2,), "kernel": (4, 2)}},
        "norm": {"bias": (4,), "mean": (4,), "scale": (4,), "var": (4,)},
        "scale": (),
    }
    for params in (network, nnx.state(network)):
        state = serialization.to_state_dict(PeriodicTarget(params, 2))["params"]
        assert jax.tree.map(jnp.shape, state) == expected
    pure = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    assert_same(
        serialization.to_state_dict(PeriodicTarget(nnx.state(network, nnx.Param), 2))["params"]["norm"],
        pure["norm"],
    )


def test_other_nodes_are_named_by_key_path() -> None:
    for name, expected in {
        "chex dataclass": {"a": {"kernel": (2,)}},
        "attrs class": {"0": {"kernel": (2,)}, "1": None},
        "unkeyed node": {"0": (2,), "1": {"a": (3,)}},
    }.items():
        state = serialization.to_state_dict(PeriodicTarget(make_tree(name), 2))["params"]
        assert jax.tree.map(jnp.shape, state) == expected


def test_the_accumulator_is_saved() -> None:
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    target = EMATarget(params, 1e-3).update(perturb(params))
    assert serialization.to_state_dict(target)["params"]["w"].dtype == jnp.float32
    restored = through_bytes(target, EMATarget(params, 1e-3))
    np.testing.assert_array_equal(jax.tree.leaves(restored)[0], jax.tree.leaves(target)[0])
    model = serialization.to_state_dict(target.params)  # this loads into a model
    assert_same(serialization.from_state_dict(params, model), target.params)


def test_a_target_in_a_train_state_and_other_states() -> None:
    class State(TrainState):
        target: Any

    def fresh() -> Any:
        network = linen.Dense(2)
        params = network.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
        target = EMATarget(params, 0.3)
        return State.create(apply_fn=network.apply, params=params, tx=optax.adam(1e-2), target=target)

    @jax.jit
    def train(state: Any) -> Any:
        state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
        return state.replace(target=state.target.update(state.params))

    state = train(train(fresh()))
    restored = serialization.from_bytes(fresh(), serialization.to_bytes(state))
    assert_same(train(restored).target.params, train(state).target.params)
    nested = {"a": [state, {"critics": (state.target, PeriodicTarget(state.params, 2))}]}
    twin = serialization.from_bytes(nested, serialization.to_bytes(nested))
    assert_same(arrays(twin["a"][1]["critics"][0]), arrays(state.target))
    assert isinstance(twin["a"][1]["critics"][1], PeriodicTarget)


def test_a_population_is_restored() -> None:
    targets = jax.vmap(lambda s: EMATarget({"w": jnp.zeros(2)}, s))(jnp.array([0.1, 0.5]))
    updated = jax.vmap(lambda t: t.update({"w": jnp.ones(2)}))(targets)
    np.testing.assert_array_equal(serialization.to_state_dict(updated)["step"], [1, 1])
    restored = through_bytes(updated, targets)
    assert_same(restored.params, updated.params)
    np.testing.assert_array_equal(restored.step, [1, 1])
    with pytest.raises(ValueError, match=r"/step: expected integers of shape \[2\], got int"):
        serialization.from_state_dict(targets, {**serialization.to_state_dict(updated), "step": 3})


def test_restoring_inside_jit() -> None:
    @jax.jit
    def resume(params: Any, step_size: Any) -> Any:
        template = EMATarget(params, step_size, skip_nonfinite=True)
        return serialization.from_state_dict(template, {"step": 3, "skipped": 1, "params": params})

    target = resume({"w": jnp.ones(2)}, 0.5).update({"w": jnp.zeros(2)})
    assert (target.step, target.skipped) == (4, 1)
    assert_same(target.params, {"w": jnp.full(2, 0.5)})


def test_an_abstract_template_restores_the_step() -> None:
    target = EMATarget({"w": jnp.ones(2)}, 0.3).update({"w": jnp.zeros(2)})
    template = jax.eval_shape(lambda: EMATarget({"w": jnp.ones(2)}, 0.3))
    assert_same(through_bytes(target, template).update({"w": jnp.zeros(2)}).step, np.array(2, np.int32))


def test_an_abstract_template_restores_every_tree(tree: Any) -> None:
    target = PeriodicTarget(tree, 2)
    restored = through_bytes(target, jax.eval_shape(lambda: PeriodicTarget(tree, 2)))
    assert_same(restored.params, target.params)


def test_restoring_leaves_the_template_as_it_was_and_shares_no_buffer() -> None:
    target = EMATarget({"w": jnp.ones(64)}, 0.3, donate=True)
    template = EMATarget({"w": jnp.zeros(64)}, 0.3)
    saved = {"step": 3, "params": {"w": np.full(64, 2, np.float32)}}
    restored = serialization.from_state_dict(template, saved)
    saved["params"]["w"][:] = 7
    assert_same(restored.params, {"w": jnp.full(64, 2.0)})
    assert_same(template.params, {"w": jnp.zeros(64)})
    twin = serialization.from_state_dict(template, serialization.to_state_dict(target))
    target.update({"w": jnp.zeros(64)})
    assert_same(twin.params, {"w": jnp.ones(64)})


SAVED = {"step": 3, "params": {"w": np.ones(2, np.float32), "n": np.int32(1), "empty": None}}
UNFIT: dict[str, tuple[Any, str]] = {
    "no dict": (3, r"^\./target: expected a dict of \['step', 'params'\], got int32"),
    "no step": ({"params": SAVED["params"]}, r"^\./target/step: missing"),
    "no params": ({"step": 3}, r"^\./target/params: missing"),
    "another part": ({**SAVED, "skipped": 1}, r"^\./target/skipped: unexpected"),
    "missing leaf": ({"params": {"w": None, "empty": None}}, r"/params/n: missing"),
    "extra leaf": ({"params": {**SAVED["params"], "z": 1}}, r"/params/z: unexpected"),
    "leaf for a node": ({"params": 1.0}, r"/params: expected a dict of"),
    "node for a leaf": (
        {"params": {**SAVED["params"], "w": {"x": 1}}},
        r"/params/w: expected float32\[2\]",
    ),
    "None for a leaf": ({"params": {**SAVED["params"], "w": None}}, r"/params/w: .* got None"),
    "leaf for None": ({"params": {**SAVED["params"], "empty": 1.0}}, r"/params/empty: expected None"),
    "shape": (
        {"params": {**SAVED["params"], "w": np.ones((1, 2), "float32")}},
        r"/params/w: .* got float32\[1, 2\]",
    ),
    "kind": ({"params": {**SAVED["params"], "w": np.ones(2, "int8")}}, r"/params/w: .* got int8\[2\]"),
    "wider kind": (
        {"params": {**SAVED["params"], "w": np.ones(2, "complex64")}},
        r"/params/w: .* got complex64",
    ),
    "string": ({"params": {**SAVED["params"], "w": "x"}}, r"/params/w: .* got str"),
    "lossy": ({"params": {**SAVED["params"], "n": np.int64(1)}}, r"/params/n: expected int32\[\]"),
    "negative step": ({"step": -1}, r"/step: expected 0 to 2\*\*31-1, got -1"),
    "large step": ({"step": 2**31}, r"/step: expected 0 to 2\*\*31-1"),
    "step a float": ({"step": 3.0}, r"/step: expected an integer, got float32"),
    "step a boolean": ({"step": True}, r"/step: expected an integer, got bool"),
    "huge step": ({"step": 10**30}, r"/step: expected 0 to 2\*\*31-1"),
    "ragged step": ({"step": [1, [2]]}, r"/step: expected an integer, got list"),
    "ragged leaf": ({"params": {**SAVED["params"], "w": [1, [2]]}}, r"/params/w: .* got list"),
    "large number": (
        {"params": {**SAVED["params"], "n": 2**31}},
        r"/params/n: expected int32.* got int64",
    ),
    "step None": ({"step": None}, r"/step: expected an integer, got None"),
    "step an object": ({"step": np.array(1.5, object)}, r"/step: expected an integer, got object\[\]"),
    "step a date": (
        {"step": np.array(3, "datetime64[ns]")},
        r"/step: expected an integer, got datetime",
    ),
    "step a time": ({"step": np.timedelta64(3, "ns")}, r"/step: expected an integer, got timedelta"),
    "of a model alone": (
        {"w": SAVED["params"]["w"]},
        r"^\./target/step: missing; the state holds \['w'\]",
    ),
    "of a whole agent": ({"target": SAVED}, r"^\./target/step: missing; the state holds \['target'\]"),
    "of a list": ([3, SAVED["params"]], r"^\./target: expected a dict of .*, got list"),
    "of optax": ({"count": 3, "ema": SAVED["params"]}, r"^\./target/step: missing; the state holds"),
    "step a string": ({"step": "3"}, r"/step: expected an integer, got str"),
    "step a vector": ({"step": np.ones(2, int)}, r"/step: expected an integer, got int"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_state_that_does_not_fit_is_refused_by_path(case: str) -> None:
    state, message = UNFIT[case]
    if isinstance(state, dict) and not case.startswith(("no ", "another", "of ")):
        state = {**SAVED, **state}
    params = {"w": jnp.zeros(2), "n": jnp.int32(0), "empty": None}
    for template in (EMATarget(params, 0.3), PeriodicTarget(params, 2)):
        with pytest.raises(ValueError, match=message):
            serialization.from_state_dict({"target": template}, {"target": state})
        assert_same(template.params, params)
        assert template.step == 0
        assert template.update(perturb(params)).step == 1


def test_the_template_decides_the_class() -> None:
    def make(dtype: Any, **settings: Any) -> tuple[Any, Any]:
        params = {"w": jnp.ones(2, dtype)}
        return EMATarget(params, 0.3, **settings).update(perturb(params)), PeriodicTarget(params, 2)

    ema, periodic = make(jnp.float32)
    for target, template in ((ema, periodic), (periodic, ema)):  # both have a step and parameters
        restored = through_bytes(target, template)
        assert type(restored) is type(template)
        assert_same(arrays(restored), arrays(target))
    half, periodic = make(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"^\./params/w: expected bfloat16\[2\], .* got float32\[2\]"):
        through_bytes(half, periodic)
    everything, periodic = make(jnp.float32, compensated=True, skip_nonfinite=True)
    with pytest.raises(ValueError, match=r"^\./skipped: unexpected; the target holds"):
        through_bytes(everything, periodic)
    with pytest.raises(ValueError, match=r"^\./skipped: missing; the state holds"):
        through_bytes(periodic, everything)


@pytest.mark.parametrize(
    ("saved", "held", "fits"),
    [
        ("bfloat16", "float32", True),
        ("float16", "float32", True),
        ("float32", "bfloat16", False),
        ("float16", "bfloat16", False),
        ("bfloat16", "float16", False),
        ("float64", "float32", False),
        ("float8_e4m3fn", "float32", True),
        ("float32", "float8_e5m2", False),
    ],
)
def test_another_accumulator_is_cast_if_nothing_can_be_lost(saved: str, held: str, fits: bool) -> None:
    template = EMATarget({"w": jnp.zeros(2)}, 0.3, accumulator_dtype=held)
    state = {"step": 1, "params": {"w": np.ones(2).astype(jnp.dtype(saved))}}
    if fits:
        restored = serialization.from_state_dict(template, state)
        assert jax.tree.leaves(restored)[0].dtype == held
    else:
        with pytest.raises(ValueError, match=rf"\./params/w: expected {held}\[2\], .* got {saved}\[2\]"):
            serialization.from_state_dict(template, state)


def test_a_key_of_another_implementation_is_refused() -> None:
    target = PeriodicTarget({"key": jax.random.key(0, impl="rbg")}, 2)
    with pytest.raises(ValueError, match=r"\./params/key: expected uint32\[2\]"):
        through_bytes(target, PeriodicTarget({"key": jax.random.key(0)}, 2))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda b: b[:-1], "incomplete"),
        (lambda b: b[:0], "incomplete"),
        (lambda b: b + b"x", "extra data"),
    ],
)
def test_undecodable_bytes_raise_the_error_of_msgpack(
    damage: Callable[[bytes], bytes], error: str
) -> None:
    target = EMATarget({"w": jnp.zeros(2)}, 0.3)
    with pytest.raises(ValueError, match=error):
        serialization.from_bytes(target, damage(serialization.to_bytes(target)))
    assert target.step == 0


def test_tied_variables() -> None:
    network, online = Tied(), Tied()
    nnx.update(online, perturb(nnx.state(network)))
    for read in (nnx.state, lambda module: module):
        target = EMATarget(read(network), 0.3).update(read(online))
        assert "arrays=2" in repr(target)
        restored = through_bytes(target, EMATarget(read(network), 0.3))
        assert_same(restored.params, target.params)
        assert_same(nnx.state(restored.params), EMATarget(nnx.state(network), 0.3).update(online).params)
    module = restored.params
    assert module.encoder is module.decoder


@pytest.mark.parametrize("kind", ["ema", "ema, array", "ema, everything", "periodic"])
def test_orbax_restores_the_target_as_a_pytree(kind: str, tmp_path: Path) -> None:
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "layers": [jnp.zeros(2)]}
    target = MAKERS[kind](params).update(perturb(params))
    state = {"params": params, "target": target}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "alone", target)
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        alone = checkpointer.restore(tmp_path / "alone", MAKERS[kind](params))
        within = checkpointer.restore(
            tmp_path / "state", {"params": params, "target": MAKERS[kind](params)}
        )
    for restored in (alone, within["target"]):
        assert type(restored) is type(target)
        assert_same(restored.params, target.params)
        assert restored.step == 1
        assert_same(
            restored.update(params).params, jax.tree.map(lambda x: x, target).update(params).params
        )


def test_restored_targets_share_no_step_size() -> None:
    template = EMATarget({"w": jnp.ones(4)}, jnp.float32(0.5))
    saved = serialization.to_bytes(template)
    first, second = (serialization.from_bytes(template, saved) for _ in range(2))
    jax.jit(lambda t: t.update({"w": jnp.zeros(4)}), donate_argnums=0)(first)
    for target in (second, template):
        assert_same(target.update({"w": jnp.zeros(4)}).params, {"w": jnp.full(4, 0.5)})


def test_an_abstract_target_has_a_state_dict_of_the_same_names_and_shapes() -> None:
    def make() -> Any:
        params = {"w": jnp.ones(4), "key": jax.random.key(0)}
        return EMATarget(params, 0.5, compensated=True, skip_nonfinite=True)

    abstract = serialization.to_state_dict(jax.eval_shape(make))
    concrete = serialization.to_state_dict(make())
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, concrete)


@pytest.mark.parametrize("fits", [True, False])
def test_restoring_leaves_no_array_to_the_garbage_collector(fits: bool) -> None:
    def restore() -> None:
        template = EMATarget({"w": jnp.ones(4)}, 0.5)
        saved = {"step": 3, "params": {"w": np.ones(4 if fits else 5, np.float32)}}
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="w: expected"):
            serialization.from_state_dict(template, saved)

    restore()
    gc.collect()
    gc.disable()
    try:
        before = len(jax.live_arrays())
        restore()
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


def test_the_template_decides_the_placement() -> None:
    sharding = NamedSharding(jax.make_mesh((1,), ("d",)), PartitionSpec("d"))
    target = EMATarget({"w": jax.device_put(jnp.zeros(4), sharding), "b": jnp.zeros(2)}, 0.5)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), target
    )
    for template in (target, abstract):
        assert through_bytes(target, template).params["w"].sharding == sharding
    assert not through_bytes(target, target).params["b"].committed  # jax may still choose


@pytest.mark.parametrize("settings", [{}, {"compensated": True}])
def test_what_orbax_restores_without_a_template_is_a_state_dict(settings: Any, tmp_path: Path) -> None:
    params = {"w": jnp.ones(3), "layers": [jnp.zeros(2), {"b": jnp.ones(1)}], "c": jnp.ones(2, complex)}
    mask = {"w": True, "layers": True, "c": False, "key": True}
    make = partial(EMATarget, step_size=0.3, mask=mask, **settings)
    params["key"] = jax.random.key(0)
    target = make(params).update(perturb(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"target": target})
        checkpointer.wait_until_finished()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Orbax says that it takes the shardings from the file
            saved = checkpointer.restore(tmp_path / "state")["target"]
    restored = serialization.from_state_dict(make(params), saved)
    assert serialization.to_bytes(restored) == serialization.to_bytes(target)
    with pytest.raises(ValueError, match=r"params/w: expected float32\[5\], .* got float32\[3\]"):
        serialization.from_state_dict(make({**params, "w": jnp.ones(5)}), saved)


def test_a_target_among_the_tracked_parameters() -> None:
    def make(value: float) -> dict[str, Any]:
        inner = {
            "ema": EMATarget({"w": jnp.full(2, value)}, 0.5),
            "copy": PeriodicTarget(jnp.ones(2), 2),
        }
        return {"params": {"w": jnp.full(2, value)}, **inner}

    target, online = EMATarget(make(0.0), 0.5), make(1.0)
    online["ema"].update({"w": jnp.full(2, 3.0)})
    target.update(online)
    restored = through_bytes(target, EMATarget(make(9.0), 0.5))
    assert_same(restored.params, target.params)
    assert restored.params["ema"].step == 1


@pytest.mark.parametrize(
    ("saved", "held", "fits"),
    [
        ("float8_e4m3fn", "float16", True),
        ("float8_e5m2", "float16", True),
        ("float8_e4m3fn", "bfloat16", True),
        ("float8_e4m3fn", "float8_e5m2", False),
        ("bfloat16", "float32", True),
        ("float16", "bfloat16", False),
        ("float32", "float16", False),
        ("int8", "int32", True),
        ("uint8", "int16", True),
        ("uint8", "int8", False),
        ("complex64", "complex64", True),
    ],
)
def test_a_saved_dtype_fits_where_all_its_values_do(saved: str, held: str, fits: bool) -> None:
    target = PeriodicTarget({"w": jnp.zeros(2, held)}, 1)
    state = {"step": 0, "params": {"w": np.ones(2).astype(jnp.dtype(saved))}}
    if fits:
        assert serialization.from_state_dict(target, state).params["w"].dtype == held
    else:
        with pytest.raises(ValueError, match=f"params/w: expected {held}.* got {saved}"):
            serialization.from_state_dict(target, state)


@pytest.mark.parametrize("settings", [{}, {"compensated": True}])
def test_float64_is_not_restored_as_float32(settings: Any) -> None:
    with jax.enable_x64(True):
        target = EMATarget({"w": np.full(3, 1 / 3)}, 0.5, **settings)
        saved = serialization.to_bytes(target)
    with pytest.raises(ValueError, match=r"params/w: float64 needs jax_enable_x64"):
        serialization.from_bytes(target, saved)
    with pytest.raises(ValueError, match=r"\['w'\]: float64 was made with jax_enable_x64"):
        target.update({"w": np.ones(3)})
    if settings:
        with pytest.raises(ValueError, match=r"\['w'\]: float64 was made with jax_enable_x64"):
            print(target.params)
