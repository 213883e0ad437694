"""Parameter trees of every kind that a project may hold, and a way to change their values."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import attrs
import chex
import equinox as eqx
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core import FrozenDict


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
    """BatchNorm has statistics, Dropout has a PRNG key and a counter, and the list has integer names."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = nnx.data(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[1](self.dropout(self.norm(self.layers[0](x)))) * self.scale


class Tied(nnx.Module):
    """Two attributes that are one and the same layer."""

    def __init__(self) -> None:
        self.encoder = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.decoder = self.encoder


def _evaluating(module: Any) -> Any:
    module.eval()
    return module


def _equinox() -> Any:
    return eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)


def _haiku() -> Any:
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))
    return network.init(jax.random.key(0), jnp.ones((1, 3)))


_BUILDERS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "b": jnp.ones(())},
    "integer keys": lambda: {0: jnp.ones(2), 1: {2: jnp.zeros(3)}},
    "FrozenDict": lambda: FrozenDict({"a": {"kernel": jnp.ones((2, 3))}}),
    "list and tuple": lambda: [jnp.ones(2), (jnp.zeros(3), [jnp.ones((1, 2))])],
    "NamedTuple": lambda: Pair(jnp.ones((2, 3)), jnp.zeros(3)),
    "bare array": lambda: jnp.arange(3.0),
    "None and empty nodes": lambda: {"a": None, "b": {}, "c": [], "d": (), "e": jnp.ones(2)},
    "no array at all": lambda: {"a": {}},
    "flax struct": lambda: {"a": FlaxStruct(jnp.ones(2))},
    "chex dataclass": lambda: {"a": ChexStruct(kernel=jnp.ones(2))},
    "attrs class": lambda: [AttrsStruct(jnp.ones(2)), None],
    "unkeyed node": lambda: Unkeyed(jnp.ones(2), {"a": jnp.zeros(3)}),
    "nnx.State": lambda: nnx.state(Network()),
    "nnx.State, tied": lambda: nnx.state(Tied()),
    "nnx.State in a dict": lambda: {"network": nnx.state(Network()), "log_alpha": jnp.zeros(())},
    "nnx.Module": Network,
    "nnx.Module, evaluating": lambda: _evaluating(Network()),
    "nnx.Param": lambda: {"w": nnx.Param(jnp.ones(2))},
    "Linen": lambda: linen.Dense(2).init(jax.random.key(0), jnp.ones((1, 3))),
    "Equinox": _equinox,
    "Haiku": _haiku,
    "NumPy": lambda: {"w": np.ones((2, 3), np.float32), "n": np.zeros((), np.int32)},
    "every dtype": lambda: {
        "bfloat16": jnp.ones(3, jnp.bfloat16),
        "float16": jnp.ones(3, jnp.float16),
        "float8": jnp.ones(3, jnp.float8_e4m3fn),
        "complex64": jnp.ones(3, jnp.complex64) * (1 + 2j),
        "int32": jnp.arange(3),
        "int8": jnp.arange(3, dtype=jnp.int8),
        "bool": jnp.array([True, False]),
        "key": jax.random.split(jax.random.key(0), 2),
        "rbg": jax.random.key(0, impl="rbg"),
        "old key": jax.random.PRNGKey(0),
    },
}


TREES = tuple(_BUILDERS)
_build = functools.cache(lambda name: _BUILDERS[name]())


def make_tree(name: str) -> Any:
    """Returns a new tree by its name in TREES; the arrays are made once."""
    return jax.tree.map(lambda x: x, _build(name))


START, ONLINE = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}  # where the tree does not matter

# One leaf of each kind. "copied" is the leaf that MIXED_MASK keeps from being averaged.
MIXED: dict[str, Any] = {
    "w": jnp.zeros((2, 2)),
    "h": jnp.zeros(3, jnp.bfloat16),
    "z": jnp.zeros(2, jnp.complex64),
    "copied": jnp.zeros(()),
    "n": jnp.int32(0),
    "on": jnp.bool_(False),
    "key": jax.random.key(0),
}
MIXED_MASK = {name: name != "copied" for name in MIXED}


def mixed(seed: int) -> dict[str, Any]:
    """Returns random values in the tree MIXED."""
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32),
        "h": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
        "z": jnp.asarray(rng.normal(size=2) + 1j * rng.normal(size=2), jnp.complex64),
        "copied": jnp.float32(rng.normal()),
        "n": jnp.int32(seed),
        "on": jnp.bool_(seed % 2),
        "key": jax.random.key(seed),
    }


def perturb(tree: Any, by: float = 1.0) -> Any:
    """Returns the same tree with other values, as training would leave them."""

    def perturb_leaf(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(x)
            return jax.random.wrap_key_data(jax.random.key_data(x) + np.uint32(by), impl=impl)
        if x.dtype == bool:
            return ~x
        return (x + jnp.asarray(by).astype(x.dtype)).astype(x.dtype)

    return jax.tree.map(perturb_leaf, tree)


def stack(trees: list[Any]) -> Any:
    """Stacks trees leaf by leaf along a new first axis, as `scan` and `vmap` take them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
