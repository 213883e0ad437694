"""What users pass as a tree, made into a tree of arrays, and back.

An nnx object (a `nnx.State`, a `nnx.Variable`, a `nnx.Module` or any other `nnx.Pytree`) becomes the
nested dict of its arrays. So nothing in nnx takes the slow copy for trainable parameters, and all nnx
objects with the same names and shapes fit each other. A Ref becomes the array that it holds.
"""

from functools import lru_cache
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx
from jax.tree_util import keystr, tree_map_with_path

from target_nets._src.trees import KeyPath, Leaf, PyTree, Tree, TreeDef

# The key path of each nnx object in a tree, and what it is but for its arrays. A GraphDef holds types,
# metadata and static attributes. The paths are strings, since jax's own key paths cannot be pickled.
NnxObjects: TypeAlias = tuple[tuple[str, nnx.GraphDef[Any]], ...]


def unwrap(tree: PyTree, *, read_refs: bool = True) -> PyTree:
    """Returns the tree with nnx objects as nested dicts, Refs as arrays, and NumPy arrays as copies.

    jax may still read a NumPy array after the call has returned, and may use its memory as its own.
    """
    # Every eager update comes here. To search the tree for nnx objects would cost as much as the update
    # of a small network, so this remembers which treedefs hold none.
    leaves, treedef = jax.tree.flatten(tree)
    if treedef in _PLAIN_TREEDEFS and all(map(_is_jax_array, set(map(type, leaves)))):
        return tree

    def read(leaf: Leaf) -> Leaf:
        if isinstance(leaf, np.ndarray):
            return leaf.copy()
        return leaf[...] if read_refs and isinstance(leaf, jax.Ref) else leaf

    if not any(map(is_nnx_object, jax.tree.leaves(tree, is_leaf=is_nnx_object))):
        if len(_PLAIN_TREEDEFS) > 1000:
            _PLAIN_TREEDEFS.clear()
        _PLAIN_TREEDEFS.add(treedef)
        return jax.tree.map(read, tree)
    return jax.tree.map(read, unwrap_nnx_objects(tree))


_PLAIN_TREEDEFS: set[TreeDef] = set()


@lru_cache(maxsize=1000)
def _is_jax_array(leaf_type: type) -> bool:
    return issubclass(leaf_type, jax.Array)


def unwrap_nnx_objects(tree: PyTree) -> PyTree:
    """Returns the tree with nnx objects as nested dicts of what their Variables hold."""

    def unwrap_one(x: Any) -> Any:
        if isinstance(x, nnx.Variable):
            return x.get_value()
        if not is_nnx_object(x):
            return x
        return nnx.to_pure_dict(x if isinstance(x, nnx.State) else nnx.state(x))

    return jax.tree.map(unwrap_one, tree, is_leaf=is_nnx_object)


def find_nnx_objects(tree: PyTree) -> NnxObjects:
    """Returns what `rewrap` needs to make nnx objects of nested dicts again."""

    def find(path: KeyPath, x: Any) -> None:
        if is_nnx_object(x):
            found.append((keystr(path), _graphdef(x)))

    found: list[tuple[str, nnx.GraphDef[Any]]] = []
    tree_map_with_path(find, tree, is_leaf=is_nnx_object)
    return tuple(found)


def rewrap(tree: Tree, nnx_objects: NnxObjects) -> Tree:
    """Returns the tree with new containers, and with nnx objects again where the original had them."""
    graphdefs = dict(nnx_objects)

    def rewrap_one(path: KeyPath, x: Any) -> Any:
        graphdef = graphdefs.get(keystr(path)) if graphdefs else None
        return x if graphdef is None else nnx.merge(graphdef, x)

    def is_nnx_object(path: KeyPath, _: Any) -> bool:
        return keystr(path) in graphdefs

    if not graphdefs:
        return jax.tree.map(lambda x: x, tree)
    return tree_map_with_path(rewrap_one, tree, is_leaf=is_nnx_object, is_leaf_takes_path=True)


def is_nnx_object(x: Any) -> bool:
    """Whether this is one of nnx's containers or Variables."""
    return _is_nnx_type(type(x))


def _graphdef(x: Any) -> nnx.GraphDef[Any]:
    if isinstance(x, nnx.State):  # its numbers would become part of the GraphDef, but not its arrays
        x = nnx.map_state(lambda _, leaf: leaf if is_nnx_object(leaf) else np.empty(()), x)
    return nnx.graphdef(x)


@lru_cache(maxsize=1000)
def _is_nnx_type(node_type: type) -> bool:
    return issubclass(node_type, nnx.State | nnx.Pytree | nnx.Variable)
