"""Trees and their leaves: how two trees are paired, and where they differ."""

import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from target_nets._src import dtypes

PyTree: TypeAlias = Any  # jax's annotations have no type for a tree, a treedef or a key path
TreeDef: TypeAlias = Any
KeyPath: TypeAlias = tuple[Any, ...]
Leaf: TypeAlias = Any  # whatever a user passes, before it is checked
Tree = TypeVar("Tree")
Result = TypeVar("Result")

_CONFIG: Any = jax.config  # its settings are missing from jax's annotations


class Names(NamedTuple):
    """What the caller calls the new and the old tree, for messages."""

    new: str
    old: str


def zip_leaves(new: PyTree, old: PyTree, names: Names) -> tuple[list[tuple[Leaf, Leaf]], TreeDef]:
    """Returns the pairs of leaves of two trees and their treedef, or raises where the trees differ.

    Inside jit this runs while tracing and costs nothing afterwards.
    """
    new_leaves, treedef = jax.tree.flatten(new)
    old_leaves, old_treedef = jax.tree.flatten(old)
    if treedef != old_treedef:
        # A None may be meant (see `copy_nones`), so any other difference is reported first.
        first = min(_differences(new, old, ()), key=lambda difference: difference.new == "None")
        raise ValueError(_mismatch(names, keystr(first.path), first.new, first.old)) from None
    pairs = list(zip(new_leaves, old_leaves, strict=True))
    for index, (x, y) in enumerate(pairs):
        if (error := find_misfit(x, y)) is not None:
            raise error(_mismatch(names, leaf_path(new, index), describe(x), describe(y))) from None
    return pairs, treedef


def naming_leaves(call: Callable[[], Result], trees: tuple[PyTree, PyTree], names: Names) -> Result:
    """Calls a compiled function with two trees, and names the leaf where jit refuses an argument.

    jit converts its arguments before it traces the function, and its own errors give no key path.
    """
    try:
        return call()
    except (TypeError, OverflowError):  # OverflowError: a Python integer that jax cannot hold
        zip_leaves(*trees, names)
        raise


def jit_argument(tree: Tree) -> Tree:
    """Returns a tree that can be passed to a compiled function.

    NumPy arrays are copied, since jax may read them after the call has returned, or share their memory.
    With jit disabled all leaves become jax arrays, as jit itself would make them.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, np.ndarray):
            tree = jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, tree)
            break
    return jax.tree.map(jnp.asarray, tree) if _CONFIG.jax_disable_jit else tree


def copy_nones(tree: PyTree, reference: PyTree) -> PyTree:
    """Returns the tree with None wherever the reference holds None, as optax's functions do."""
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        is_none = partial(operator.is_, None)
        with suppress(ValueError):  # the trees differ elsewhere, too, and `zip_leaves` will say where
            return jax.tree.map(lambda r, x: None if r is None else x, reference, tree, is_leaf=is_none)
    return tree


def check_arrays(tree: PyTree, name: str) -> None:
    """Raises a TypeError if a leaf is no array."""
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
    """Whether jax takes an object for a leaf, not for a node. None is a node."""
    return jax.tree_util.all_leaves([x])


def array_type(x: Leaf) -> Any:
    """Returns what tells the shape and dtype of a leaf that jax computes with, or None for any other."""
    if isinstance(x, jax.Array):
        return x
    try:
        found: Any = None if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    except (TypeError, ValueError, OverflowError):  # an nnx.Variable, or an int past 64 bits
        return None
    return found if found is not None and dtypes.kind_of(found.dtype) is not None else None


def describe(x: Any) -> str:
    """Returns what a message calls a leaf or a node, such as `float32[3, 4]` or `dict`."""
    if x is None:
        return "None"
    known = x if isinstance(x, np.ndarray | np.generic) else array_type(x) if is_leaf(x) else None
    return type(x).__name__ if known is None else f"{known.dtype}{list(known.shape)}"


def find_misfit(new: Leaf, old: Leaf) -> type[Exception] | None:
    """Returns the error to raise where a new leaf cannot replace an old one, or None if it can."""
    new_type, old_type = (
        array_type(new),
        old if isinstance(old, jax.ShapeDtypeStruct) else array_type(old),
    )
    if new_type is None or old_type is None:
        return TypeError
    if dtypes.is_key(old_type.dtype) and new_type.dtype != old_type.dtype:
        return TypeError  # a number, or a key of another implementation
    new_kind, old_kind = dtypes.kind_of(new_type.dtype), dtypes.kind_of(old_type.dtype)
    if new_kind is None or old_kind is None or new_kind > old_kind:  # float0 has no kind
        return TypeError
    return None if new_type.shape == old_type.shape else ValueError


# Where two trees differ


class _Difference(NamedTuple):
    """A place where two trees differ, and what each of them holds there."""

    path: KeyPath
    new: str
    old: str


def _differences(new: PyTree, old: PyTree, path: KeyPath) -> Iterator[_Difference]:
    if is_leaf(new) and is_leaf(old):
        return
    (new_children, new_node), (old_children, old_node) = _children(new), _children(old)
    if type(new) is not type(old):
        yield _Difference(path, describe(new), describe(old))
    elif new_children.keys() != old_children.keys():
        for key in old_children | new_children:
            if (key in new_children) != (key in old_children):
                both = new_children, old_children
                got, expected = (describe(c[key]) if key in c else "nothing" for c in both)
                yield _Difference((*path, *key), got, expected)
    elif new_node != old_node:
        static = f"{describe(new)} with other static data (settings, or train or eval mode)"
        yield _Difference(path, static, describe(old))
    else:
        for key in old_children:
            yield from _differences(new_children[key], old_children[key], (*path, *key))


def _children(tree: PyTree) -> tuple[dict[KeyPath, PyTree], TreeDef]:
    """Returns the children of a node by key, and the treedef of that one level."""

    def is_child(x: PyTree) -> bool:
        return x is not tree

    children = dict(tree_flatten_with_path(tree, is_leaf=is_child)[0])
    return children, jax.tree.structure(tree, is_leaf=is_child)


def _mismatch(names: Names, path: str, got: str, expected: str) -> str:
    return f"{names.new}{path}: expected {expected} as in {names.old}, got {got}"
