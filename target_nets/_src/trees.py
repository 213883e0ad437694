"""Trees and their leaves: how two trees are paired, and where they differ."""

import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from target_nets._src import dtypes

PyTree: TypeAlias = Any  # jax has no public type for a tree, a treedef or a key path
TreeDef: TypeAlias = Any
KeyPath: TypeAlias = tuple[Any, ...]
Leaf: TypeAlias = Any  # whatever the user passes, before it is checked
Tree = TypeVar("Tree")
Result = TypeVar("Result")

_TYPE_OF_ARRAYS: Any = type(jax.typeof(0.0))  # it has no documented name
_CONFIG: Any = jax.config  # jax's annotations do not list its settings


class Names(NamedTuple):
    """The names of the new and the old tree in error messages, as the caller knows them."""

    new: str
    old: str


def zip_leaves(new: PyTree, old: PyTree, names: Names) -> tuple[list[tuple[Leaf, Leaf]], TreeDef]:
    """Returns the pairs of leaves of two trees and their treedef, or raises where the trees differ.

    Inside jit this runs while tracing and costs nothing afterwards.
    """
    new_leaves, treedef = jax.tree.flatten(new)
    old_leaves, old_treedef = jax.tree.flatten(old)
    if treedef != old_treedef:
        raise ValueError(_describe_differences(new, old, names)) from None
    pairs = list(zip(new_leaves, old_leaves, strict=True))
    check_enabled(old, names.old)
    for index, (x, y) in enumerate(pairs):
        if (error := find_misfit(x, y)) is not None:
            check_arrays(old, names.old)
            raise error(_mismatch(names, leaf_path(new, index), describe(x), describe(y))) from None
    return pairs, treedef


def find_prefix_difference(prefix: PyTree, tree: PyTree) -> tuple[str, str, str] | None:
    """Returns where a tree is no prefix of another one: the key path, and what both hold there."""
    found = next(_differences(prefix, tree, (), is_prefix=True), None)
    return None if found is None else (keystr(found[0]), *found[1:])


def call_naming_leaves(call: Callable[[], Result], new: PyTree, old: PyTree, names: Names) -> Result:
    """Calls a compiled function of two trees. If jit refuses a leaf, the error names its key path.

    jit converts the leaves before it traces the function, so `zip_leaves` inside comes too late.
    """
    try:
        return call()
    except (TypeError, OverflowError):  # OverflowError: a Python integer that jax cannot represent
        zip_leaves(new, old, names)
        raise
    except (RuntimeError, ValueError):
        _check_not_deleted(new, names.new)
        _check_not_deleted(old, names.old)
        raise


def _check_not_deleted(tree: PyTree, name: str) -> None:
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted():
            raise RuntimeError(
                f"{name}{leaf_path(tree, index)}: this array has been deleted, since it was donated to "
                "a function; use what that function returned"
            ) from None


def jit_argument(tree: Tree) -> Tree:
    """Returns the tree as an argument for a compiled function.

    If jit is disabled, all leaves become jax arrays, as jit itself would make them.
    """
    return jax.tree.map(jnp.asarray, tree) if _CONFIG.jax_disable_jit else tree


def check_enabled(old: PyTree, name: str) -> None:
    """Raises if a leaf has a dtype that jax can use only with `jax_enable_x64`, which is now off."""
    for index, leaf in enumerate(jax.tree.leaves(old)):
        dtype = getattr(leaf, "dtype", None)
        if isinstance(leaf, jax.Array) and dtype is not None and not dtypes.is_enabled(dtype):
            raise ValueError(
                f"{name}{leaf_path(old, index)}: {dtype} was made with jax_enable_x64, which is off here"
            )


def fit_integers(new: Tree, old: PyTree, names: Names) -> Tree:
    """Returns the new tree with Python integers in the dtypes of the old leaves.

    A jax array shows in its dtype what it may hold. Of Python and NumPy integers jax would keep the
    lower bits, so here they are checked by their values.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        return new  # `zip_leaves` will say where they differ
    leaves, treedef = jax.tree.flatten(new)
    for index, (x, y) in enumerate(zip(leaves, jax.tree.leaves(old), strict=True)):
        is_number = isinstance(x, int) and not isinstance(x, bool)
        is_wide = (
            isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "iu" and x.dtype.itemsize == 8
        )
        known = array_type(y)
        if (
            known is None
            or dtypes.kind_of(known.dtype) != dtypes.Kind.INTEGER
            or not (is_number or is_wide)
        ):
            continue
        info = jnp.iinfo(known.dtype)
        if np.size(x) and not (info.min <= np.min(x) and np.max(x) <= info.max):
            raise ValueError(_mismatch(names, leaf_path(new, index), str(x), f"values of {known.dtype}"))
        if is_number:
            leaves[index] = np.asarray(x, known.dtype)
    return treedef.unflatten(leaves)


def copy_nones(tree: PyTree, reference: PyTree) -> PyTree:
    """Returns the tree with None wherever the reference holds None, as optax's functions do."""
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        is_none = partial(operator.is_, None)
        with suppress(ValueError):  # the trees also differ elsewhere, and `zip_leaves` will say where
            return jax.tree.map(lambda r, x: None if r is None else x, reference, tree, is_leaf=is_none)
    return tree


def check_arrays(tree: PyTree, name: str) -> None:
    """Raises a TypeError if a leaf is not an array or a number."""
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        if array_type(leaf) is None:
            raise TypeError(f"{name}{leaf_path(tree, index)}: expected an array, got {describe(leaf)}")


def leaf_path(tree: PyTree, index: int) -> str:
    """Returns the key path of a leaf, such as `['layer']['kernel']`."""
    return keystr(tree_flatten_with_path(tree)[0][index][0])


def named_children(tree: PyTree) -> dict[str, PyTree]:
    """Returns the children of a node by name."""
    return {keystr(key, simple=True): child for key, child in _children(tree)[0].items()}


# Leaves


def is_leaf(x: Any) -> bool:
    """Whether jax treats an object as a leaf. None is a node."""
    return jax.tree_util.all_leaves([x])


def array_type(x: Leaf) -> Any:
    """Returns an object with the shape and dtype of a leaf, or None if jax cannot compute with it."""
    if isinstance(x, jax.Array):
        return x
    try:
        found: Any = None if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    except (TypeError, ValueError, OverflowError):  # an int past 64 bits
        return None
    is_array = isinstance(found, _TYPE_OF_ARRAYS)  # jax also gives types to Refs, for example
    return found if is_array and dtypes.kind_of(found.dtype) is not None else None


def describe(x: Any) -> str:
    """Returns how a message describes a leaf or a node, such as `float32[3, 4]` or `dict`."""
    if x is None or isinstance(x, jax.Ref):  # a traced Ref is of another class
        return "None" if x is None else "Ref"
    # A NumPy array is described as it is. jax would show the dtype that it converts it to.
    is_numpy = isinstance(x, np.ndarray | np.generic)
    known = x if is_numpy else array_type(x) if is_leaf(x) else None
    return type(x).__name__ if known is None else f"{known.dtype}{list(known.shape)}"


def find_misfit(new: Leaf, old: Leaf) -> type[Exception] | None:
    """Returns the error to raise if an old leaf cannot take the value of a new one, else None."""
    new_type, old_type = array_type(new), array_type(old)
    if new_type is None or old_type is None:
        return TypeError
    if dtypes.is_key(old_type.dtype) and new_type.dtype != old_type.dtype:
        return TypeError  # a number, or a key of another implementation
    new_kind, old_kind = dtypes.kind_of(new_type.dtype), dtypes.kind_of(old_type.dtype)
    if new_kind is None or old_kind is None or new_kind > old_kind:  # None: float0, a zero tangent
        return TypeError
    if new_kind == old_kind == dtypes.Kind.INTEGER and not dtypes.holds(old_type.dtype, new_type.dtype):
        return TypeError
    return None if new_type.shape == old_type.shape else ValueError


# Where two trees differ


def _describe_differences(new: PyTree, old: PyTree, names: Names) -> str:
    # A None may be intended (see `copy_nones`), so any other difference is reported first.
    differences = sorted(_differences(new, old, ()), key=lambda difference: difference[1] == "None")
    texts = [_mismatch(names, keystr(path), got, expected) for path, got, expected in differences[:1]]
    for path, got, expected in differences[1:3]:
        texts.append(f"{names.new}{keystr(path)}: expected {expected}, got {got}")
    more = [f"{len(differences)} differences in all"] if len(differences) > 3 else []
    return "; ".join(texts + more)


def _differences(
    new: PyTree, old: PyTree, path: KeyPath, is_prefix: bool = False
) -> Iterator[tuple[KeyPath, str, str]]:
    """Yields key paths, with a description of what the new and the old tree hold there.

    Args:
      new: The new tree.
      old: The old tree.
      path: The key path of both.
      is_prefix: Whether a leaf of the new tree may stand for a whole branch of the old one.
    """
    if is_leaf(new) and (is_leaf(old) or is_prefix):
        return
    (new_children, new_node), (old_children, old_node) = _children(new), _children(old)
    if type(new) is not type(old):
        mend = _MENDS.get((type(new), type(old)))
        yield path, describe(new) + (f" (call {mend} on it)" if mend else ""), describe(old)
    elif new_children.keys() != old_children.keys():
        for key in old_children | new_children:
            if (key in new_children) != (key in old_children):
                both = new_children, old_children
                got, expected = (describe(c[key]) if key in c else "nothing" for c in both)
                yield (*path, *key), got, expected
    elif new_node != old_node:
        static = f"{describe(new)} with other static data"
        yield path, static, describe(old)
    else:
        for key in old_children:
            children = new_children[key], old_children[key]
            yield from _differences(*children, (*path, *key), is_prefix=is_prefix)


_MENDS = {(FrozenDict, dict): "flax.core.unfreeze", (dict, FrozenDict): "flax.core.freeze"}


def _children(tree: PyTree) -> tuple[dict[KeyPath, PyTree], TreeDef]:
    """Returns the children of a node by key, and the treedef of that one level."""

    def is_child(x: PyTree) -> bool:
        return x is not tree

    children = dict(tree_flatten_with_path(tree, is_leaf=is_child)[0])
    return children, jax.tree.structure(tree, is_leaf=is_child)


def _mismatch(names: Names, path: str, got: str, expected: str) -> str:
    return f"{names.new}{path}: expected {expected} as in {names.old}, got {got}"
