"""Where arrays live: on which devices, with which sharding, in which kind of memory.

The slow copy keeps its placement. An update brings the online parameters there, computes, and leaves the
result there. An array's type (`jax.typeof`) shows its kind of memory and, on Explicit axes of a mesh,
its sharding. It does not show the sharding on Auto axes. In eager Python `match_shardings` reads that
from the array. Inside a user's jit XLA decides it, and `link_shardings` tells XLA what to keep alike.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Sharding

from target_nets._src import trace
from target_nets._src.shard_alike import shard_alike
from target_nets._src.trees import Leaf, PyTree, Tree, find_misfit, jit_argument

Arrays = TypeVar("Arrays")  # a tree of the arrays that belong to one slow leaf

# For use in eager Python, where arrays are concrete


def sharding_of(x: Leaf) -> Sharding | None:
    """Returns the sharding that an array is committed to. None: jax may choose one, or it is traced."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    is_concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return x.sharding if is_concrete and x.committed else None


def copy_to_own_buffers(tree: Tree) -> Tree:
    """Returns the tree with copies of all arrays in new memory, with the shardings of the originals."""
    tree = jit_argument(tree)
    # jax must be told the sharding of an array that spans several processes.
    return jax.device_put(tree, jax.tree.map(sharding_of, tree), may_alias=False)


def match_shardings(online: Tree, slow: PyTree) -> Tree:
    """Returns the online tree in the shardings of the slow copy, in device memory.

    Inside a transformation and on one device it returns the online tree unchanged.
    """
    if not trace.is_eager() or jax.device_count() == 1:
        return online
    if jax.tree.structure(online) != jax.tree.structure(slow):
        return online  # `zip_leaves` will say where they differ
    return jax.tree.map(_match_sharding, online, slow)


def _match_sharding(x: Leaf, slow: jax.Array) -> Leaf:
    sharding = sharding_of(slow)
    if sharding is None or sharding_of(x) == sharding or find_misfit(x, slow) is not None:
        return x
    return jax.device_put(x, sharding.with_memory_kind("device"))


# For use inside compiled functions


def match_explicit_sharding(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns the online leaf in the sharding that the type of the slow leaf shows, if it shows one."""
    sharding = jax.typeof(old).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types or jax.typeof(new).sharding == sharding:
        return new
    return jax.sharding.reshard(new, sharding)


def to_device_memory(arrays: Arrays) -> Arrays:
    """Returns the arrays of a slow leaf in device memory, where jax can compute with them."""
    device = jax.memory.Space.Device
    return jax.tree.map(lambda x: jax.device_put(x, device) if in_host_memory(x) else x, arrays)


def match_memory(arrays: Arrays, old: jax.Array) -> Arrays:
    """Returns the new arrays of a slow leaf in the kind of memory that the old leaf is in."""
    return jax.device_put(arrays, jax.memory.Space.Host) if in_host_memory(old) else arrays


def in_host_memory(x: jax.Array) -> bool:
    """Whether the type of an array says that it is in host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


# For use while a user's function is traced, but not inside the package's own compiled functions


def link_shardings(new: Tree, old: Tree) -> Tree:
    """Returns the new arrays, each linked to the old one so that XLA shards both alike on Auto axes.

    Inside the package's own compiled functions it must not be used. All calls of such a function share
    one lowering, so the links would join the arrays of all these calls. In eager Python and on one
    device it returns the new arrays unchanged.
    """
    if trace.is_eager() or jax.device_count() == 1:
        return new
    return jax.tree.map(_link, new, old)


@jax.custom_jvp
def _link(new: jax.Array, old: jax.Array) -> jax.Array:
    # Without an Auto axis XLA has nothing to decide, and on a Manual axis it knows no sharding groups.
    axis_types = jax.typeof(old).sharding.mesh.axis_types
    if axis_types and (AxisType.Auto not in axis_types or AxisType.Manual in axis_types):
        return new
    if not in_host_memory(old):
        # A copied leaf may be the online array itself, and a link would move that array. This select,
        # which XLA cannot see through, makes another one. In host memory the leaf is another one
        # already.
        new = lax.select(lax.optimization_barrier(jnp.bool_(False)), old, new)
    return shard_alike(new, old)


_link.defjvp(lambda primals, tangents: (_link(*primals), tangents[0]))  # a link changes no value
