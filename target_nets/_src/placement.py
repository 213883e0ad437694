"""Where arrays live: on which devices, with which sharding, in which kind of memory.

The slow copy keeps its placement. An update moves the online parameters to the devices of the slow copy,
computes in device memory, and puts the result where the slow copy was. An array's type (`jax.typeof`)
shows its kind of memory and, on Explicit axes of a mesh, its sharding. It does not show the sharding on
Auto axes. In eager Python `match_devices` reads that from the arrays. Inside a user's jit XLA decides
it, and `link_shardings` tells XLA what to keep alike.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from target_nets._src import trace
from target_nets._src.leaves import Leaf, PyTree, Tree
from target_nets._src.trees import jit_argument
from target_nets._src.unwrap import unwrap

Shardings: TypeAlias = tuple[NamedSharding | None, ...] | None
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
    tree = jit_argument(unwrap(tree))
    # jax must be told the sharding of an array that spans several processes.
    return jax.device_put(tree, jax.tree.map(sharding_of, tree), may_alias=False)


def put_beside(scalar: Any, slow: PyTree) -> Any:
    """Returns a scalar, or None, where updates will leave it: beside the slow copy, if it is placed.

    If it started elsewhere, jit would return it there, and the second call would compile again.
    """
    shardings = map(sharding_of, jax.tree.leaves(slow))
    sharding = next((sharding for sharding in shardings if sharding is not None), None)
    if sharding is None or isinstance(scalar, Tracer):
        return scalar
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    else:
        sharding = sharding.with_memory_kind("device")
    if isinstance(scalar, np.ndarray):  # without a word between the processes that share a mesh
        return jax.make_array_from_callback(scalar.shape, sharding, lambda _: scalar)
    return jax.device_put(scalar, sharding)


def own_host_arrays(tree: Tree) -> Tree:
    """Returns the tree with read-only copies of those NumPy arrays that somebody could write to."""

    def own(x: Leaf) -> Leaf:
        # A read-only view may be one of an array that somebody can write to.
        if not isinstance(x, np.ndarray) or (x.base is None and not x.flags.writeable):
            return x
        x = x.copy()
        x.setflags(write=False)
        return x

    has_host_arrays = any(isinstance(x, np.ndarray) for x in jax.tree.leaves(tree))
    return jax.tree.map(own, tree) if has_host_arrays else tree


def match_devices(online: Tree, slow: PyTree, leaves: Sequence[jax.Array]) -> tuple[Tree, Shardings]:
    """Moves those online arrays that jit cannot combine with the slow ones.

    Args:
      online: The online tree.
      slow: The slow tree.
      leaves: The leaves of the slow tree.

    Returns:
      The online tree, and the shardings over meshes of the slow arrays: one for each leaf, or None if no
      leaf has one.
    """
    if not any(getattr(x, "committed", False) for x in leaves):
        return online, None
    if jax.tree.structure(online) == jax.tree.structure(slow):  # else `zip_leaves` will say it
        online = jax.tree.map(_match_devices, online, slow)
    shardings = map(sharding_of, leaves)
    named = tuple(s if isinstance(s, NamedSharding) else None for s in shardings)
    return online, named if any(named) else None


def copy_shared(online: Tree, slow: Sequence[jax.Array]) -> Tree:
    """Returns the online tree with copies of those arrays that are slow ones themselves."""
    shared = set(map(id, slow))
    if shared.isdisjoint(map(id, jax.tree.leaves(online))):
        return online
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in shared else x, online)


def _match_devices(x: Leaf, slow: jax.Array) -> Leaf:
    # Only where it must be: device_put between two shardings goes through the host, and waits for it.
    source, destination = sharding_of(x), sharding_of(slow)
    if source is None or destination is None or _can_combine(source, destination):
        return x
    return jax.device_put(x, destination.with_memory_kind("device"))


def _can_combine(x: Sharding, y: Sharding) -> bool:
    """Whether jit takes arrays of both: the same devices in one order, without other Explicit axes."""
    if not (isinstance(x, NamedSharding) and isinstance(y, NamedSharding)):
        return x.device_set == y.device_set
    meshes: list[Any] = [x.mesh, y.mesh]
    same_order = [*meshes[0].devices.flat] == [*meshes[1].devices.flat]
    return meshes[0] == meshes[1] or (same_order and AxisType.Explicit not in meshes[0].axis_types)


# For use inside compiled functions


def match_sharding(new: jax.Array, old: jax.Array, sharding: NamedSharding | None = None) -> jax.Array:
    """Returns the online leaf in the sharding of the slow leaf.

    Args:
      new: The online leaf.
      old: The slow leaf. On Explicit axes its type shows the sharding.
      sharding: The sharding of the slow leaf, if it is known. Only Auto axes need it.
    """
    explicit = jax.typeof(old).sharding
    if AxisType.Explicit in explicit.mesh.axis_types and jax.typeof(new).sharding != explicit:
        new = jax.sharding.reshard(new, explicit)
    if sharding is not None and AxisType.Auto in sharding.mesh.axis_types:
        new = lax.with_sharding_constraint(new, _on_auto_axes(sharding))
    return new


def group_alike(leaves: Sequence[jax.Array], shardings: Shardings) -> list[list[jax.Array]]:
    """Returns the leaves in groups of one shape and dtype that are known to be placed alike.

    To combine other arrays, devices would have to exchange them.

    Args:
      leaves: Arrays in a compiled function.
      shardings: Their shardings, if they are known.
    """
    groups: dict[Hashable, list[jax.Array]] = {}
    known = shardings or [None] * len(leaves)
    for index, (x, sharding) in enumerate(zip(leaves, known, strict=True)):
        axis_types = jax.typeof(x).sharding.mesh.axis_types
        is_unknown = not axis_types or AxisType.Auto in axis_types
        if is_unknown and sharding is None and jax.device_count() > 1:
            groups[index] = [x]
        else:
            groups.setdefault((x.shape, x.dtype, jax.typeof(x).sharding, sharding), []).append(x)
    most = 16  # arrays that one loop reads
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


def _on_auto_axes(sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding in device memory without the Explicit axes of its mesh."""
    mesh = sharding.mesh
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = {name for name, axis_type in types if axis_type == AxisType.Auto}
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec)
    spec = PartitionSpec(*(tuple(name for name in entry if name in auto) for entry in entries))
    return NamedSharding(mesh, spec, memory_kind="device")


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
    one lowering, so the links would join the arrays of all these calls. In eager Python, or if there is
    only one device, it returns the new arrays unchanged.
    """
    if trace.is_eager(new, old) or jax.device_count() == 1:
        return new
    return jax.tree.map(_link, new, old)


def pin_constants(slow: Tree) -> Tree:
    """Returns a slow copy that a transformation closes over, with arrays that XLA treats like arguments.

    As constants of the program they would lose their shardings, and XLA would reorder sums with them, so
    that the rounding errors of `compensated` would be lost.
    """
    return jax.tree.map(_pin_constant, slow)


def _pin_constant(x: Leaf) -> Leaf:
    if isinstance(x, Tracer):
        return x  # of an outer transformation
    pinned, sharding = lax.optimization_barrier(x), sharding_of(x)
    if isinstance(sharding, NamedSharding) and not in_host_memory(x):
        pinned = match_sharding(pinned, pinned, sharding)
    return pinned


@jax.custom_jvp
def _link(new: jax.Array, old: jax.Array) -> jax.Array:
    # Without an Auto axis XLA has nothing to decide, and sharding groups do not work on a Manual axis.
    axis_types = jax.typeof(old).sharding.mesh.axis_types
    if axis_types and (AxisType.Auto not in axis_types or AxisType.Manual in axis_types):
        return new
    if not in_host_memory(old):
        # XLA may drop the copy of a leaf, and then the link would also reshard the online array. XLA
        # cannot drop this select, so it makes a separate array. In host memory the leaf is separate
        # already.
        new = lax.select(lax.optimization_barrier(jnp.bool_(False)), old, new)
    return _get_shard_alike()(new, old)


@cache
def _get_shard_alike() -> Callable[[jax.Array, jax.Array], jax.Array]:
    try:
        from target_nets._src.shard_alike import shard_alike
    except ImportError:
        warnings.warn(
            "target_nets: this jax cannot link shardings, so inside jit XLA chooses where on the Auto "
            "axes of a mesh a slow copy is. Give the jit its out_shardings, or use Explicit axes.",
            RuntimeWarning,
            stacklevel=2,
        )
        return lambda new, _: new
    return shard_alike


_link.defjvp(lambda primals, tangents: (_link(*primals), tangents[0]))  # a link changes no value
