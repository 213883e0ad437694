"""Where arrays live: on which devices, with which sharding, in which kind of memory.

The slow copy stays where it was put when the target was made. So an update brings the online parameters
to the slow copy, and puts the result back where the slow copy was. The types of arrays tell their memory
and, on Explicit axes of a mesh, their sharding. They do not tell the sharding on Auto axes: eager Python
asks the arrays for it (`place_as`), and inside a user's jit XLA decides it (`link_shardings`).
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

# In eager Python, where arrays are concrete


def sharding_of(x: Leaf) -> Sharding | None:
    """Returns where an array was put, or is to be put; None where jax chooses, as while tracing."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    is_concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return x.sharding if is_concrete and x.committed else None


def copy_to_own_buffers(tree: Tree) -> Tree:
    """Returns the tree with copies of all arrays in new memory, each where its original was put."""
    tree = jit_argument(tree)
    # jax must be told the sharding of arrays whose parts are in several processes.
    return jax.device_put(tree, jax.tree.map(sharding_of, tree), may_alias=False)


def place_as(online: Tree, slow: PyTree) -> Tree:
    """Returns the online tree in the shardings of the slow copy, in device memory.

    Inside a transformation, and on one device, there is nothing to do.
    """
    if not trace.is_eager() or jax.device_count() == 1:
        return online
    if jax.tree.structure(online) != jax.tree.structure(slow):
        return online  # `zip_leaves` will say where they differ
    return jax.tree.map(_place_leaf, online, slow)


def _place_leaf(x: Leaf, slow: jax.Array) -> Leaf:
    sharding = sharding_of(slow)
    if sharding is None or sharding_of(x) == sharding or find_misfit(x, slow) is not None:
        return x
    return jax.device_put(x, sharding.with_memory_kind("device"))


# Inside compiled functions


def shard_as(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns the online leaf with the sharding that the type of the slow one tells."""
    sharding = jax.typeof(old).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types or jax.typeof(new).sharding == sharding:
        return new
    return jax.sharding.reshard(new, sharding)


def to_device_memory(arrays: Arrays) -> Arrays:
    """Returns the arrays of a slow leaf in device memory, where jax computes."""
    device = jax.memory.Space.Device
    return jax.tree.map(lambda x: jax.device_put(x, device) if in_host_memory(x) else x, arrays)


def to_memory_of(old: jax.Array, arrays: Arrays) -> Arrays:
    """Returns the new arrays of a slow leaf in the kind of memory that the old leaf is in."""
    return jax.device_put(arrays, jax.memory.Space.Host) if in_host_memory(old) else arrays


def in_host_memory(x: jax.Array) -> bool:
    """Whether the type of an array says that it is in host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


# While tracing a user's function, outside of the package's own compiled functions


def link_shardings(new: Tree, old: Tree) -> Tree:
    """Returns the new arrays, each linked to the old one so that XLA shards both alike on Auto axes.

    In eager Python, and on one device, there is nothing to do.
    The links must not be made inside the package's own compiled functions: all calls of such a function
    share one lowering, and the links would tie the arrays of all calls together.
    """
    if trace.is_eager() or jax.device_count() == 1:
        return new
    return jax.tree.map(_link, new, old)


@jax.custom_jvp
def _link(new: jax.Array, old: jax.Array) -> jax.Array:
    axis_types = jax.typeof(old).sharding.mesh.axis_types
    if axis_types and (AxisType.Auto not in axis_types or AxisType.Manual in axis_types):
        return new
    if not in_host_memory(old):
        # A copied leaf is the online array itself, which a link would move. This makes it another array.
        new = lax.select(lax.optimization_barrier(jnp.bool_(False)), old, new)
    return shard_alike(new, old)


_link.defjvp(lambda primals, tangents: (_link(*primals), tangents[0]))
