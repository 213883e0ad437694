"""Where two trees differ, in the words of an error message."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
from flax.core import FrozenDict
from jax.tree_util import keystr, tree_flatten_with_path

from target_nets._src.leaves import KeyPath, PyTree, TreeDef, describe, is_leaf


class Names(NamedTuple):
    """The names of the new and the old tree in error messages, as the caller knows them."""

    new: str
    old: str


def find_prefix_difference(prefix: PyTree, tree: PyTree) -> tuple[str, str, str] | None:
    """Returns where a tree is no prefix of another one: the key path, and what both hold there."""
    found = next(_differences(prefix, tree, (), is_prefix=True), None)
    return None if found is None else (keystr(found[0]), *found[1:])


def named_children(tree: PyTree) -> dict[str, PyTree]:
    """Returns the children of a node by name."""
    return {keystr(key, simple=True): child for key, child in _children(tree)[0].items()}


def describe_differences(new: PyTree, old: PyTree, names: Names) -> str:
    """Returns the message about two trees that differ. It names up to three of the places."""
    # A None may be intended (see `copy_nones`), so any other difference is reported first.
    differences = sorted(_differences(new, old, ()), key=lambda difference: difference[1] == "None")
    texts = [mismatch(names, keystr(path), got, expected) for path, got, expected in differences[:1]]
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


def mismatch(names: Names, path: str, got: str, expected: str) -> str:
    """Returns the message about one place where the trees differ."""
    return f"{names.new}{path}: expected {expected} as in {names.old}, got {got}"
