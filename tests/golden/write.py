"""Writes checkpoints that later versions of the package must read: a file for each case below.

    python tests/golden/write.py

`tests/test_golden.py` reads them. The trees are defined here and not shared with other tests, which
may change theirs. A file that exists is never written again, nor is its entry in
`keys.json`; a new case adds one to both. All values are short binary fractions, and all step sizes are
powers of two, so that a run gives the same bits wherever it runs.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import chex
import equinox as eqx
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx, serialization
from flax.core import FrozenDict
from flax.training.train_state import TrainState

from target_nets import EMATarget, PeriodicTarget, schedules

FOLDER = Path(__file__).parent
KEYS = FOLDER / "keys.json"


# Values


def filled(tree: Any, t: int) -> Any:
    """The tree with values that depend on a time and the place in it, and on nothing else."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([_values(leaf, index, t) for index, leaf in enumerate(leaves)])


def _values(leaf: Any, index: int, t: int) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _values(jax.random.key_data(leaf), index, t)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    count = 3 * np.arange(leaf.size, dtype=np.int32).reshape(leaf.shape) + index + 5 * t
    if leaf.dtype == bool:
        values = count % 2 == 0
    elif jnp.issubdtype(leaf.dtype, jnp.integer):
        values = count % 100
    else:
        values = (count % 15 - 7).astype(np.float32) / 8
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            values = values + np.complex64(1j) * values[..., ::-1]
    values = np.asarray(values).astype(leaf.dtype)
    return values if isinstance(leaf, np.ndarray) else jnp.asarray(values)


def with_nan(tree: Any) -> Any:
    """The tree with nan in its first leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([jnp.full_like(leaves[0], jnp.nan), *leaves[1:]])


# Trees


class Pair(NamedTuple):
    kernel: Any
    bias: Any


@flax.struct.dataclass
class FlaxStruct:
    kernel: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


@chex.dataclass
class ChexStruct:
    kernel: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel"], meta_fields=["name"])
@attrs.frozen
class AttrsStruct:
    kernel: Any
    name: str = "static"


@jax.tree_util.register_pytree_node_class
class Unkeyed:
    """A node whose children have no names."""

    def __init__(self, *children: Any) -> None:
        self.children = children

    def tree_flatten(self) -> tuple[Any, None]:
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Unkeyed":
        return cls(*children)


class Network(nnx.Module):
    """BatchNorm has statistics, Dropout a PRNG key and a counter; the list has integer names."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = nnx.data(zeros())


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.encoder = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.decoder = self.encoder


def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


def layers() -> Any:
    return {"a": {"kernel": zeros(2, 3), "bias": zeros(3)}, "b": zeros()}


def every_dtype() -> Any:
    numbers = (
        *("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "complex64", "bool"),
        *("int8", "int16", "int32", "uint8", "uint16", "uint32"),
    )
    return {
        **{name: zeros(3, dtype=jnp.dtype(name)) for name in numbers},
        "key": jax.random.key(0, impl="threefry2x32"),
        "keys": jax.random.split(jax.random.key(0, impl="threefry2x32"), 2),
        "rbg": jax.random.key(0, impl="rbg"),
    }


def linen_params(**settings: Any) -> Any:
    return linen.Dense(2, **settings).init(jax.random.key(0), zeros(1, 3))


def partitioned() -> Any:
    partition = linen.with_partitioning(linen.initializers.ones, (None, "model"))
    logical = linen.with_logical_partitioning(linen.initializers.zeros, ("embed",))
    return linen_params(kernel_init=partition, bias_init=logical)


def haiku_params() -> Any:
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))
    return network.init(jax.random.key(0), zeros(1, 3))


def equinox_params() -> Any:
    network = eqx.nn.MLP(3, 2, 4, 1, dtype=jnp.float32, key=jax.random.key(0))
    return eqx.filter(network, eqx.is_array)


# Cases


@dataclass(frozen=True)
class Case:
    """A target and its updates: an EMATarget, or without a step size a PeriodicTarget."""

    tree: Callable[[], Any] = layers
    step_size: Any = 0.25
    settings: Mapping[str, Any] = field(default_factory=dict)
    updates: int = 2
    nan_at: tuple[int, ...] = ()  # the updates whose online parameters hold nan
    counters: Mapping[str, int] = field(default_factory=dict)  # to begin with

    def params(self, t: int) -> Any:
        """The online parameters at a time; those at 0 begin the slow copy."""
        values = filled(self.tree(), t)
        return with_nan(values) if t in self.nan_at else values

    def make(self, params: Any) -> Any:
        """A target, or a state that holds one."""
        if self.step_size is None:
            return PeriodicTarget(params, **self.settings)
        return EMATarget(params, self.step_size, **self.settings)

    def update(self, state: Any, online: Any) -> Any:
        return state.update(online)

    def target(self, state: Any) -> Any:
        """The target in a state; of a state dict, the part that belongs to the target."""
        return state

    def run(self) -> Any:
        """The state after all updates, which is what the file holds."""
        state = self.make(self.params(0))
        if self.counters:
            begun = {**serialization.to_state_dict(state), **self.counters}
            state = serialization.from_state_dict(state, begun)
        for t in range(1, self.updates + 1):
            state = self.update(state, self.params(t))
        return state


class Population(Case):
    """Targets that `jax.vmap` has stacked, each with its own step size."""

    def make(self, params: Any) -> Any:
        return jax.vmap(lambda p, s: EMATarget(p, s, **self.settings))(params, self.step_size)

    def update(self, state: Any, online: Any) -> Any:
        return jax.vmap(lambda target, p: target.update(p))(state, online)


class State(TrainState):
    target: Any


class InTrainState(Case):
    """A target as a field of a flax TrainState, updated under jit."""

    def make(self, params: Any) -> Any:
        target = super().make(params)
        return State.create(apply_fn=None, params=params, tx=optax.identity(), target=target)

    def update(self, state: Any, online: Any) -> Any:
        target = jax.jit(lambda target: target.update(online))(state.target)
        return state.replace(step=state.step + 1, params=online, target=target)

    def target(self, state: Any) -> Any:
        return state["target"] if isinstance(state, dict) else state.target


MASK = {"a": {"kernel": True, "bias": False}, "b": True}
SMALL = 2.0**-12  # the second update already rounds

CASES: dict[str, Case] = {
    # Every kind of tree, with the default settings.
    "dict": Case(),
    "integer_keys": Case(lambda: {0: zeros(2), 1: {2: zeros(3)}, 10: zeros()}),
    "frozen_dict": Case(lambda: FrozenDict(layers())),
    "list_and_tuple": Case(lambda: [zeros(2), (zeros(3), [zeros(1, 2)])]),
    "long_list": Case(lambda: [zeros(1) for _ in range(12)]),
    "named_tuple": Case(lambda: Pair(zeros(2, 3), zeros(3))),
    "bare_array": Case(lambda: zeros(3)),
    "none_and_empty_nodes": Case(lambda: {"a": None, "b": {}, "c": [], "d": (), "e": zeros(2)}),
    "no_array": Case(lambda: {"a": {}}),
    "empty_arrays": Case(lambda: {"a": zeros(0), "b": zeros(2, 0, 3)}),
    "flax_struct": Case(lambda: {"a": FlaxStruct(zeros(2))}),
    "chex_dataclass": Case(lambda: {"a": ChexStruct(kernel=zeros(2))}),
    "attrs_class": Case(lambda: [AttrsStruct(zeros(2)), None]),
    "node_without_keys": Case(lambda: Unkeyed(zeros(2), {"a": zeros(3)})),
    "nnx_state": Case(lambda: nnx.state(Network())),
    "nnx_state_in_dict": Case(lambda: {"network": nnx.state(Network(), nnx.Param), "alpha": zeros()}),
    "nnx_state_tied": Case(lambda: nnx.state(Tied())),
    "nnx_module": Case(Network),
    "nnx_module_tied": Case(Tied),
    "nnx_param_in_dict": Case(lambda: {"w": nnx.Param(zeros(2)), "b": zeros(2)}),
    "linen": Case(linen_params),
    "linen_partitioned": Case(partitioned),
    "equinox": Case(equinox_params),
    "haiku": Case(haiku_params),
    "numpy": Case(lambda: {"w": np.zeros((2, 3), np.float32), "n": np.zeros((), np.int32)}),
    "every_dtype": Case(every_dtype),
    # Every setting.
    "periodic": Case(step_size=None, settings={"update_period": 2}, updates=3),
    "periodic_every_dtype": Case(every_dtype, step_size=None, settings={"update_period": 1}),
    "update_period": Case(settings={"update_period": 3}, updates=4),
    "mask": Case(settings={"mask": MASK}),
    "accumulator_bfloat16": Case(step_size=2.0**-6, settings={"accumulator_dtype": jnp.bfloat16}),
    "compensated": Case(step_size=SMALL, settings={"compensated": True}, updates=5),
    "compensated_bfloat16": Case(
        step_size=2.0**-6, settings={"compensated": True, "accumulator_dtype": jnp.bfloat16}, updates=3
    ),
    "skip_nonfinite": Case(settings={"skip_nonfinite": True}, updates=3, nan_at=(2,)),
    "compensated_skip_nonfinite_mask": Case(
        step_size=SMALL,
        settings={"compensated": True, "skip_nonfinite": True, "mask": MASK},
        updates=5,
        nan_at=(2,),
    ),
    "donate": Case(settings={"donate": True}),
    "array_step_size": Case(step_size=np.array(0.25, np.float32)),
    "schedule": Case(step_size=schedules.uniform()),
    "schedule_update_period_skip_nonfinite": Case(
        step_size=schedules.uniform(),
        settings={"update_period": 2, "skip_nonfinite": True},
        updates=7,
        nan_at=(2,),
    ),
    "population": Population(
        lambda: {"w": zeros(3, 2, 2), "n": zeros(3, dtype=jnp.int32)},
        step_size=np.array([0.125, 0.25, 0.5], np.float32),
        settings={"skip_nonfinite": True},
    ),
    "train_state": InTrainState(settings={"skip_nonfinite": True}),
    # The largest counts: the next step goes back by a period, and what is skipped no longer counts.
    "largest_counts": Case(
        settings={"skip_nonfinite": True},
        updates=1,
        nan_at=(1, 2),
        counters={"step": 2**31 - 2, "skipped": 2**31 - 2},
    ),
    "largest_counts_update_period": Case(
        settings={"update_period": 3, "skip_nonfinite": True},
        updates=1,
        counters={"step": 2**31 - 3, "skipped": 7},
    ),
}


# Files


def path(name: str) -> Path:
    return FOLDER / f"{name}.msgpack"


def described(node: Any) -> Any:
    """What `msgpack_restore` has read, with the dtype and shape of an array in its place."""
    if isinstance(node, dict):
        return {key: described(child) for key, child in node.items()}
    if isinstance(node, np.ndarray):
        return f"{node.dtype.name}{list(node.shape)}"
    return None if node is None else type(node).__name__


def main() -> None:
    keys = json.loads(KEYS.read_text()) if KEYS.exists() else {}
    for name, case in CASES.items():
        if path(name).exists():
            continue
        if name in keys:
            raise FileNotFoundError(f"{path(name)}: it was written before, and is not written again")
        saved = serialization.to_bytes(case.run())
        keys[name] = described(serialization.msgpack_restore(saved))
        with path(name).open("xb") as file:
            file.write(saved)
        KEYS.write_text(json.dumps(keys, indent=1) + "\n")
        print(f"{path(name).name}: {len(saved)} bytes")


if __name__ == "__main__":
    main()
