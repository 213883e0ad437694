"""The state dict of a target, which `flax.serialization` saves and restores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax.core import Tracer

from target_nets._src.checks import INT32_MAX
from target_nets._src.differences import named_children
from target_nets._src.dtypes import Kind, holds, is_enabled, is_key, kind_of
from target_nets._src.leaves import Leaf, PyTree, describe, is_leaf
from target_nets._src.placement import copy_to_own_buffers, sharding_of
from target_nets._src.slow_copy import SlowCopy, abstract_apart, put_together, take_apart
from target_nets._src.state import State
from target_nets._src.target import AnyTarget, Target, make_target
from target_nets._src.unwrap import NnxObjects, rewrap, unwrap

# A step size is a setting, so an array step size is not saved either.
_SAVED = ("step", "params", "skipped", "compensation")
_COUNTERS = ("step", "skipped")


def to_state_dict(target: Target[Any]) -> dict[str, Any]:
    """Returns counters as integers, trees as nested dicts of arrays, and PRNG keys as their key data."""
    return {
        name: _save_count(child) if name in _COUNTERS else _nest(jax.tree.map(_key_data, child))
        for name, child in _saved_children(_take_apart(target.__getstate__())).items()
    }


def from_state_dict(target: AnyTarget, saved: Any) -> AnyTarget:
    """Returns a new target with a saved state, and with the settings, dtypes and shardings of a target.

    Args:
      target: The target to restore into. It may be abstract.
      saved: What `to_state_dict` returned, perhaps after a round trip through bytes.

    Raises:
      ValueError: The saved state does not fit the target.
    """
    state = target.__getstate__()
    pairs, template = state.settings.pairs, state
    if pairs:
        template = state.with_slow(abstract_apart(state.slow))
    path, children = serialization.current_path(), _saved_children(template)
    _check_keys(children, saved, path)
    if pairs:
        params, errors = saved["params"], saved["compensation"]
        params, errors = _take_saved_apart(params, errors, _nest(template.compensation))
        saved = {**saved, "params": params, "compensation": errors}
    for name, child in children.items():
        if name in _COUNTERS:
            children[name] = _restore_count(child, saved[name], f"{path}/{name}")
        else:
            nnx_objects = state.settings.nnx_objects if name == "params" else ()
            children[name] = _restore_tree(child, saved[name], f"{path}/{name}", nnx_objects)
    step_size = state.step_size
    if isinstance(step_size, jax.Array):
        step_size = copy_to_own_buffers(step_size)
    restored = State(state.settings, **children, step_size=step_size)
    if pairs:
        slow = put_together(SlowCopy(restored.params, restored.compensation), pairs)
        restored = restored.with_slow(jax.device_put(slow, jax.tree.map(sharding_of, state.slow)))
    return make_target(type(target), restored)


def _take_apart(state: State) -> State:
    """Returns the state with each value and its rounding error in arrays of their own."""
    if not state.settings.pairs:
        return state
    is_abstract = isinstance(state.step, jax.ShapeDtypeStruct)
    return state.with_slow((abstract_apart if is_abstract else take_apart)(state.slow))


def _take_saved_apart(params: Any, errors: Any, template: Any) -> tuple[Any, Any]:
    """Returns saved parameters and errors, apart. Orbax, without a template, restores pairs.

    Args:
      params: A saved tree, or a part of it.
      errors: The same part of the saved rounding errors.
      template: The same part of the rounding errors of the target, with None where there is none.
    """
    if isinstance(template, dict):
        params, errors = _as_dict(params), _as_dict(errors)
        if isinstance(params, dict) and isinstance(errors, dict):
            both = {
                key: _take_saved_apart(params[key], errors.get(key), template.get(key)) for key in params
            }
            apart = ({key: parts[i] for key, parts in both.items()} for i in range(2))
            return next(apart), errors | next(apart)
    elif (
        template is not None and errors is None and getattr(params, "dtype", np.dtype(bool)).kind == "c"
    ):
        return params.real, params.imag
    return params, errors


def _as_dict(saved: Any) -> Any:
    """Returns a list as flax.serialization saves it. Orbax keeps lists."""
    is_list = isinstance(saved, list)
    return {str(index): child for index, child in enumerate(saved)} if is_list else saved


def _saved_children(state: State) -> dict[str, PyTree]:
    return {name: getattr(state, name) for name in _SAVED if name in state.settings.child_names}


def _save_count(count: Any) -> Any:
    """Returns an integer, but a traced, abstract or batched counter unchanged."""
    if isinstance(count, Tracer | jax.ShapeDtypeStruct) or np.ndim(count):
        return count
    return int(count)


def _key_data(leaf: Any) -> Any:
    """Returns the key data of a PRNG key, and any other leaf unchanged."""
    if not is_key(leaf.dtype):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def _nest(tree: PyTree) -> PyTree:
    """Returns a tree as nested dicts with string keys.

    The names are those of flax.serialization for the nodes that it knows, and the key paths of jax for
    all other nodes.
    """
    if tree is None or is_leaf(tree):
        return tree
    named = serialization.to_state_dict(tree)
    if named is tree:
        named = named_children(tree)
    return {key: _nest(child) for key, child in named.items()}


def _restore_tree(template: PyTree, saved: Any, path: str, nnx_objects: NnxObjects) -> PyTree:
    leaves, treedef = jax.tree.flatten(template)
    # The nested dict of the template, with the index of each leaf in its place.
    tree = treedef.unflatten([np.array(index) for index in range(len(leaves))])
    indices = _nest(tree)
    if nnx_objects:
        # Version 0.1 saved a Variable that is shared within a module under each of its names.
        unshared = _nest(unwrap(jax.tree.map(lambda x: x, rewrap(tree, nnx_objects))))
        if jax.tree.structure(saved) == jax.tree.structure(unshared):
            indices = unshared
    _restore_leaves(indices, leaves, saved, path)
    return treedef.unflatten(leaves)


def _restore_leaves(indices: PyTree, leaves: list[Any], saved: Any, path: str) -> None:
    """Replaces the leaves of the template by the saved ones."""
    if isinstance(indices, dict):
        saved = _as_dict(saved)
        _check_keys(indices, saved, path)
        for key, child in indices.items():
            _restore_leaves(child, leaves, saved[key], f"{path}/{key}")
    elif indices is not None:
        leaves[int(indices)] = _restore_leaf(leaves[int(indices)], saved, path)
    elif saved is not None:
        raise ValueError(f"{path}: expected None, got {describe(saved)}")


def _restore_leaf(leaf: Any, saved: Leaf, path: str) -> jax.Array:
    if isinstance(saved, jax.Array) and saved.dtype == leaf.dtype:
        saved = _key_data(saved)  # Orbax restores keys
    wanted = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf.dtype) else leaf
    if not is_enabled(wanted.dtype):
        raise ValueError(f"{path}: {wanted.dtype} needs jax_enable_x64, which is off here")
    got = saved if isinstance(saved, jax.Array) or not _is_number(saved) else np.asarray(saved)
    if type(saved) is int and kind_of(wanted.dtype) == Kind.INTEGER:
        info = jnp.iinfo(wanted.dtype)
        if info.min <= saved <= info.max:  # the count of a target that is part of the parameters
            got = np.asarray(saved, wanted.dtype)
    if not (
        _is_number(got)
        and got.shape == wanted.shape
        and kind_of(got.dtype) == kind_of(wanted.dtype)
        and holds(wanted.dtype, got.dtype)
    ):
        expected = f"{wanted.dtype}{list(wanted.shape)}, or a dtype that fits into it"
        raise ValueError(f"{path}: expected {expected}, got {describe(got)}")
    restored = jax.device_put(got.astype(wanted.dtype), sharding_of(leaf), may_alias=False)
    return jax.random.wrap_key_data(restored, impl=_key_impl(leaf)) if is_key(leaf.dtype) else restored


def _key_impl(key: Any) -> Any:
    """Returns the implementation of a PRNG key. jax tells that of an abstract key only while tracing."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


def _restore_count(template: Any, saved: Any, path: str) -> Any:
    shape = np.shape(template)
    count = np.asarray(saved) if _is_number(saved) else np.empty(())
    # Integers past 64 bits are objects to NumPy. The shape comes first, so that a hostile state with
    # millions of them is refused at once.
    if count.shape != shape or not (count.dtype.kind in "iu" or all(type(x) is int for x in count.flat)):
        expected = f"integers of shape {list(shape)}" if shape else "an integer"
        raise ValueError(f"{path}: expected {expected}, got {describe(saved)}")
    if any(not 0 <= x <= INT32_MAX for x in count.flat):
        raise ValueError(f"{path}: expected 0 to 2**31-1, got {saved}")
    sharding, count = sharding_of(template), count.astype(np.int32)
    count.setflags(write=False)  # as `state.host_count` makes it
    return count if sharding is None else jax.device_put(count, sharding)


def _is_number(x: Any) -> bool:
    """Whether this is a number or an array, so that NumPy makes no array of strings or lists."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _check_keys(expected: dict[str, Any], saved: Any, path: str) -> None:
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: expected a dict of {list(expected)}, got {describe(saved)}")
    if missing := [key for key in expected if key not in saved]:
        raise ValueError(f"{path}/{missing[0]}: missing; the state holds {list(saved)}")
    if unexpected := [key for key in saved if key not in expected]:
        raise ValueError(f"{path}/{unexpected[0]}: unexpected; the target holds {list(expected)}")
