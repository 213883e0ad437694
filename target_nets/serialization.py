"""Checkpoints: how `flax.serialization` saves and restores a target.

Importing the package registers both classes, so that `to_state_dict`, `from_state_dict`, `to_bytes` and
`from_bytes` of flax take a target, alone or anywhere inside a state such as a `TrainState`.

The state is `{"step": int, "params": nested dict}`: what changes while training. With `skip_nonfinite`
there is also `skipped`, an integer, and with `compensated` a `compensation`, nested as `params` is.
`params` is the slow copy in the dtype that it is held in, PRNG keys as their data;
`to_state_dict(target.params)` is what loads into a model. Settings are code: they come from the target
that is restored into, as do its class, dtypes and shardings.

A state that does not fit is a ValueError. Bytes that cannot be decoded never reach the target: they are
a ValueError of msgpack or, where an array is damaged, whatever flax's decoder stumbles over (TypeError,
IndexError, KeyError). Neither sees a flipped bit among an array's values: that takes a checksum.

Example:
  >>> import jax.numpy as jnp
  >>> from flax import serialization
  >>> from target_nets import EMATarget
  >>> target = EMATarget({"w": jnp.zeros(2)}, step_size=0.5).update({"w": jnp.ones(2)})
  >>> saved = serialization.to_bytes(target)
  >>> fresh = EMATarget({"w": jnp.zeros(2)}, step_size=0.5)
  >>> serialization.from_bytes(fresh, saved)
  EMATarget(step=1, step_size=0.5, update_period=1, arrays=1, parameters=2, bytes=8)
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx, serialization
from jax.core import Tracer

from target_nets import rules
from target_nets.targets import EMATarget, PeriodicTarget

Target = TypeVar("Target", EMATarget[Any], PeriodicTarget[Any])

_SAVED = ("step", "params", "skipped", "compensation")
_COUNTERS = ("step", "skipped")


def _to_state_dict(target: Target) -> dict[str, Any]:
    return {
        name: _count(saved) if name in _COUNTERS else _nested(jax.tree.map(_data, saved))
        for name, saved in _saved(target).items()
    }


def _from_state_dict(target: Target, saved: Any) -> Target:
    path = serialization.current_path()
    templates = _saved(target)
    _check_keys(templates, saved, path)
    restored = {
        name: (_restored_count if name in _COUNTERS else _restored_tree)(
            template, saved[name], f"{path}/{name}"
        )
        for name, template in templates.items()
    }
    if placement := rules.placement(templates.get("skipped")):
        restored["skipped"] = jax.device_put(restored["skipped"], placement)
    return target._replaced(**restored)


def _saved(target: Target) -> dict[str, Any]:
    """What changes while training, by its key."""
    state, held = target._state, target._settings.children
    return {name: getattr(state, name) for name in _SAVED if name in held}


def _count(count: Any) -> Any:
    """A counter as an integer; those of a whole population, traced or abstract ones as they are."""
    if isinstance(count, Tracer | jax.ShapeDtypeStruct) or np.ndim(count):
        return count
    return int(count)


def _data(leaf: Any) -> Any:
    if not rules.is_key(leaf):
        return leaf
    abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    return jax.eval_shape(jax.random.key_data, leaf) if abstract else jax.random.key_data(leaf)


def _nested(tree: Any) -> Any:
    """A tree as nested dicts with string keys, its leaves as they are.

    Named by flax.serialization where it knows the node, by `nnx.to_pure_dict` for nnx, else by key path.
    """
    if tree is None or rules.is_leaf(tree):
        return tree
    if isinstance(tree, nnx.Variable):
        return _nested(tree.get_value())
    if isinstance(tree, nnx.State | nnx.Pytree):
        tree = nnx.to_pure_dict(nnx.state(tree))
    named = serialization.to_state_dict(tree)
    if named is tree:
        named = rules.named_children(tree)
    return {key: _nested(child) for key, child in named.items()}


def _restored_tree(template: Any, saved: Any, path: str) -> Any:
    leaves, treedef = jax.tree.flatten(template)
    # The template's own names, with the index of a leaf in its place (an array, so that nnx knows it).
    indices = [np.array(index) for index in range(len(leaves))]
    names = _nested(treedef.unflatten(indices))
    restored = dict(_restored_leaves(names, leaves, saved, path))
    return treedef.unflatten([restored[index] for index in range(len(leaves))])


def _restored_leaves(names: Any, leaves: Any, saved: Any, path: str) -> Iterator[tuple[int, Any]]:
    """The leaves with their indices; no closure that calls itself, which would outlive the call."""
    if isinstance(names, dict):
        _check_keys(names, saved, path)
        for key, name in names.items():
            yield from _restored_leaves(name, leaves, saved[key], f"{path}/{key}")
    elif names is not None:
        yield int(names), _restored_leaf(leaves[int(names)], saved, path)
    elif saved is not None:
        raise ValueError(f"{path}: expected None, got {rules.describe(saved)}")


def _restored_leaf(leaf: Any, saved: Any, path: str) -> Any:
    wanted = jax.eval_shape(jax.random.key_data, leaf) if rules.is_key(leaf) else leaf
    got = saved if isinstance(saved, jax.Array) or not _is_number(saved) else np.asarray(saved)
    if not (
        _is_number(got)
        and got.shape == wanted.shape
        and rules.kind(got.dtype) == rules.kind(wanted.dtype)
        and np.can_cast(got.dtype, wanted.dtype)
    ):
        expected = f"{wanted.dtype}{list(wanted.shape)}, or a dtype that fits into it"
        raise ValueError(f"{path}: expected {expected}, got {rules.describe(got)}")
    restored = jax.device_put(got.astype(wanted.dtype), rules.placement(leaf), may_alias=False)
    if rules.is_key(leaf):
        return jax.random.wrap_key_data(restored, impl=_implementation(leaf))
    return restored


def _implementation(key: Any) -> Any:
    """The implementation of a PRNG key, also of an abstract one, which only a trace can tell."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


def _is_number(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _restored_count(template: Any, saved: Any, path: str) -> np.ndarray[Any, Any]:
    count, shape = np.asarray(saved if _is_number(saved) else ""), np.shape(template)
    # The shape first, for a hostile count may be long. Past 64 bits Python's integers are objects.
    if count.shape != shape or not (count.dtype.kind in "iu" or all(type(x) is int for x in count.flat)):
        expected = f"integers of shape {list(shape)}" if shape else "an integer"
        raise ValueError(f"{path}: expected {expected}, got {rules.describe(saved)}")
    if any(not 0 <= x <= rules.INT32_MAX for x in count.flat):
        raise ValueError(f"{path}: expected 0 to 2**31-1, got {saved}")
    return count.astype(np.int32)


def _check_keys(expected: dict[str, Any], saved: Any, path: str) -> None:
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: expected a dict of {list(expected)}, got {rules.describe(saved)}")
    if missing := [key for key in expected if key not in saved]:
        raise ValueError(f"{path}/{missing[0]}: missing; the state holds {list(saved)}")
    if unexpected := [key for key in saved if key not in expected]:
        raise ValueError(f"{path}/{unexpected[0]}: unexpected; the target holds {list(expected)}")


for _class in (EMATarget, PeriodicTarget):
    serialization.register_serialization_state(_class, _to_state_dict, _from_state_dict)
