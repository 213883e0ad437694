"""What users pass as a tree, made into a tree of arrays, and back.

An nnx object (an `nnx.State`, an `nnx.Variable`, an `nnx.Module` or any other `nnx.Pytree`) becomes the
nested dict of its arrays. So nothing in nnx takes the slow copy for trainable parameters, and all nnx
objects with the same names and shapes fit each other. A Ref becomes the array that it holds.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypeAlias

import attrs
import jax
import numpy as np
from flax import nnx
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

from target_nets._src.leaves import KeyPath, Leaf, PyTree, Tree, TreeDef


def unwrap(tree: PyTree, *, read_refs: bool = True) -> PyTree:
    """Returns the tree with nnx objects as nested dicts, Refs as arrays, and NumPy arrays as copies.

    jax may still read a NumPy array after the call has returned, and may use its memory as its own.
    Without `read_refs` only the Refs inside nnx objects are read.
    """

    def unwrap_one(x: Any) -> Any:
        if is_nnx_object(x):
            return jax.tree.map(_read, _nested_arrays(x))
        return _read(x) if read_refs or not isinstance(x, jax.Ref) else x

    return jax.tree.map(unwrap_one, tree, is_leaf=is_nnx_object)


def unwrap_pair(new: PyTree, old: PyTree) -> tuple[PyTree, PyTree]:
    """Returns the new and the old tree of a rule, unwrapped if they do not already fit each other.

    Refs among the old leaves stay, and the rule will refuse them.
    """
    if fits_as_it_is(new, jax.tree.structure(old)) and fits_as_it_is(old, jax.tree.structure(new)):
        return new, old
    return unwrap(new), unwrap(old, read_refs=False)


def fits_as_it_is(tree: PyTree, treedef: TreeDef) -> bool:
    """Whether a tree has the treedef of the slow copy, and jax arrays for leaves, as it usually does.

    This is on the path of every eager update, and much faster than `unwrap`.
    """
    leaves, found = jax.tree.flatten(tree)
    return found == treedef and all(map(_is_jax_array_type, set(map(type, leaves))))


def _read(leaf: Leaf) -> Leaf:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    return leaf[...] if isinstance(leaf, jax.Ref) else leaf


def unwrap_mask(mask: PyTree, params: PyTree) -> PyTree:
    """Returns a tree of booleans for the parameters as a tree of booleans for their arrays."""
    nodes = {keystr(path): node for path, node in _nnx_objects(params)}

    def unwrap_one(path: KeyPath, x: Any) -> Any:
        node = nodes.get(keystr(path)) if is_nnx_object(x) else None
        if node is None or jax.tree.structure(x) != jax.tree.structure(node):
            return _nested_arrays(x)
        # Made by `jax.tree.map` from the parameters. nnx drops what is no array, and shared Variables
        # are no longer shared, so each boolean is found by its array.
        pairs = zip(jax.tree.leaves(node), jax.tree.leaves(x), strict=True)
        averaged = {id(leaf): average for leaf, average in pairs}
        return jax.tree.map(lambda leaf: averaged[id(leaf)], _nested_arrays(node))

    return tree_map_with_path(unwrap_one, mask, is_leaf=is_nnx_object)


@attrs.frozen
class NnxObject:
    """An nnx object in a tree, without its arrays.

    Attributes:
      path: Its key path, as a string, since jax's own key paths cannot be pickled.
      treedef: The treedef of its state, with the types and the metadata of its Variables.
      graphdef: What an `nnx.Module` or another `nnx.Pytree` is beside its state. None for a state.
      refs: Whether each of its leaves was a Ref.
    """

    path: str
    treedef: TreeDef
    graphdef: nnx.GraphDef[Any] | None
    refs: tuple[bool, ...]

    def restore(self, arrays: PyTree) -> Any:
        """Returns the nnx object with these arrays, a nested dict."""
        leaves = zip(jax.tree.leaves(arrays), self.refs, strict=True)
        state = self.treedef.unflatten([jax.new_ref(x) if ref else x for x, ref in leaves])
        state = _map_variables(_as_hijax, state)
        return state if self.graphdef is None else nnx.merge(self.graphdef, state)

    def __getstate__(self) -> tuple[Any, ...]:
        # jax pickles no treedef that has nodes of other libraries.
        template = self.treedef.unflatten(range(self.treedef.num_leaves))
        return self.path, template, self.graphdef, self.refs

    def __setstate__(self, fields: tuple[Any, ...]) -> None:
        path, template, graphdef, refs = fields
        self.__init__(path, jax.tree.structure(template), graphdef, refs)


NnxObjects: TypeAlias = tuple[NnxObject, ...]


def find_nnx_objects(tree: PyTree) -> NnxObjects:
    """Returns what `rewrap` needs to make nnx objects of nested dicts again."""

    def describe(path: KeyPath, x: Any) -> NnxObject:
        is_state = isinstance(x, nnx.State | nnx.Variable)
        graphdef, state = (None, x) if is_state else nnx.split(x)
        leaves, treedef = jax.tree.flatten(_map_variables(_as_plain, state))
        return NnxObject(
            keystr(path), treedef, graphdef, tuple(isinstance(leaf, jax.Ref) for leaf in leaves)
        )

    return tuple(describe(path, x) for path, x in _nnx_objects(tree))


def rewrap(tree: Tree, nnx_objects: NnxObjects) -> Tree:
    """Returns the tree with new containers, and with nnx objects again where the original had them."""
    by_path = {nnx_object.path: nnx_object for nnx_object in nnx_objects}
    if not by_path:
        return jax.tree.map(lambda x: x, tree)

    def restore(path: KeyPath, x: Any) -> Any:
        nnx_object = by_path.get(keystr(path))
        return x if nnx_object is None else nnx_object.restore(x)

    def is_leaf(path: KeyPath, _: Any) -> bool:
        return keystr(path) in by_path

    return tree_map_with_path(restore, tree, is_leaf=is_leaf, is_leaf_takes_path=True)


def is_nnx_object(x: Any) -> bool:
    """Whether this is one of nnx's containers or Variables, inside jit as well."""
    return isinstance(x, nnx.State | nnx.Pytree | nnx.Variable)


def _nnx_objects(tree: PyTree) -> Iterator[tuple[KeyPath, Any]]:
    nodes, _ = tree_flatten_with_path(tree, is_leaf=is_nnx_object)
    return ((path, node) for path, node in nodes if is_nnx_object(node))


def _nested_arrays(x: Any) -> Any:
    """Returns the nested dict of an nnx object, with what its Variables hold. Anything else stays."""
    if isinstance(x, nnx.State):
        return {name: _nested_arrays(child) for name, child in x.items()}
    if isinstance(x, nnx.Variable):
        return x.get_raw_value()
    return _nested_arrays(nnx.state(x)) if is_nnx_object(x) else x


# Hijax Variables are leaves to jax, so a treedef does not show their types and metadata.


def _map_variables(convert: Any, state: Any) -> Any:
    if isinstance(state, nnx.Variable):
        return convert(state)
    return nnx.map_state(lambda _, x: convert(x) if isinstance(x, nnx.Variable) else x, state)


def _as_plain(variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
    metadata = variable.get_metadata()
    if not metadata.get("hijax"):
        return variable
    metadata = {**metadata, "hijax": False, "was_hijax": True}
    return variable.var_type.from_metadata(variable.get_raw_value(), metadata)


def _as_hijax(variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
    metadata = variable.get_metadata()
    if not metadata.pop("was_hijax", False):
        return variable
    return variable.var_type.from_metadata(variable.get_raw_value(), {**metadata, "hijax": True})


@lru_cache(maxsize=1000)
def _is_jax_array_type(leaf_type: type) -> bool:
    return issubclass(leaf_type, jax.Array)
