"""The rules: pure functions from the online and the slow tensors to the new slow tensors.

They take the names and arguments of the page "Apply Updates" of optax's reference, so that
`import target_nets as optax` in front of those three calls leaves a program right, or refuses it by
name. What differs is written in each docstring: dtypes are kept, shapes and structures must match
exactly, and no result shares memory with the online tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import ArrayLike

Tree = TypeVar("Tree")
Path: TypeAlias = tuple[Any, ...]  # of jax's keys
Names: TypeAlias = tuple[str, str]  # what the caller calls the new and the old tree

INT32_MAX = 2**31 - 1
_TENSORS: Names = ("new_tensors", "old_tensors")
_UPDATES: Names = ("updates", "params")
_CONFIG: Any = jax.config  # jax's annotations know none of its settings
_BOOL, _INTEGER, _FLOAT, _COMPLEX, _KEY = range(5)  # kinds of leaves, narrow to wide


def apply_updates(params: Tree, updates: Any) -> Tree:
    """Adds updates to parameters, such as those of an optax gradient transformation.

    Sums of 8- and 16-bit floats are computed in float32 and rounded once.

    Args:
      params: A tree of arrays of any shapes and dtypes. Where it holds None, so does the result.
      updates: A tree of the structure and shapes of `params`, with no leaf of a wider kind (bool < int
        < float < complex).

    Returns:
      `params + updates`, with the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: A structure or shape differs.
      TypeError: A leaf is no number, or of a wider kind than its parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> import target_nets
      >>> target_nets.apply_updates({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.5, -0.5])})
      {'w': Array([1.5, 1.5], dtype=float32)}
    """
    return named(_add_trees, _prune(updates, params), own_numpy(params), names=_UPDATES)


def incremental_update(new_tensors: Tree, old_tensors: Tree, step_size: ArrayLike) -> Tree:
    """Moves a slow copy towards new tensors: Polyak averaging, an exponential moving average.

    The average is `old + step_size*(new - old)`, mirrored above one half. Unlike the textbook's
    `step_size*new + (1 - step_size)*old` it has a constant online value as its exact fixed point;
    that form is used only where `new - old` is not finite. 8- and 16-bit floats are averaged in
    float32 and rounded once; at step size 1 the result is exactly new, at 0 exactly old, even next
    to inf or nan.

    Args:
      new_tensors: The online tensors, a tree of arrays. Where it holds None, so does the result.
      old_tensors: The slow copy, a tree of the same structure and shapes. Its inexact leaves are
        averaged; integers, booleans and PRNG keys (`jax.random.key`) take the new value.
      step_size: A real scalar in [0, 1]; it never promotes the result. A traced or device one that
        lies outside is clipped, and nan counts as 0.

    Returns:
      The averages, with the structure, shapes and dtypes of `old_tensors`, in buffers of their own.

    Raises:
      ValueError: A structure or shape differs, or a Python or NumPy step size is not in [0, 1].
      TypeError: A leaf is no number or of a wider kind than the old one (bool < int < float <
        complex), or the step size is not real.

    References:
      Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.

    Example:
      >>> import jax.numpy as jnp
      >>> import target_nets
      >>> online, slow = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.zeros(2)}
      >>> target_nets.incremental_update(online, slow, step_size=0.25)
      {'w': Array([0.25, 0.5 ], dtype=float32)}
    """
    step_size = check_step_size(step_size)
    old_tensors = own_numpy(_prune(old_tensors, new_tensors))
    return named(_average_trees, new_tensors, old_tensors, step_size, names=_TENSORS)


def periodic_update(
    new_tensors: Tree, old_tensors: Tree, steps: ArrayLike, update_period: ArrayLike
) -> Tree:
    """Takes the new tensors every `update_period` steps, and keeps the old ones between.

    With plain Python or NumPy integers the choice is made in Python: off its period the call returns
    `old_tensors` itself and starts nothing on the device. With a `jax.Array`, traced or not, it is one
    `lax.cond`.

    Args:
      new_tensors: The online tensors, a tree of arrays.
      old_tensors: The slow copy, a tree of the same structure and shapes.
      steps: How many updates the online network has had, an integer scalar.
      update_period: Every how many steps to copy, an integer scalar from 1 to 2**31-1. A traced or
        device one below 1 counts as 1.

    Returns:
      Where `steps % update_period == 0` copies of `new_tensors` in the dtypes of `old_tensors`, else
      `old_tensors`.

    Raises:
      ValueError: A structure or shape differs, or a Python or NumPy period is out of range.
      TypeError: A leaf is no number or of a wider kind than the old one, or steps or period are not
        integers.

    References:
      Mnih et al., "Human-level control through deep reinforcement learning", 2015.

    Example:
      >>> import jax.numpy as jnp
      >>> import target_nets
      >>> online, slow = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
      >>> target_nets.periodic_update(online, slow, steps=199, update_period=100) is slow
      True
      >>> target_nets.periodic_update(online, slow, steps=200, update_period=100)
      {'w': Array([1., 1.], dtype=float32)}
    """
    steps = _check_integer("steps", steps)
    update_period = check_update_period(update_period)
    if isinstance(steps, int) and isinstance(update_period, int):
        if steps % update_period == 0:
            return named(_copy_trees, new_tensors, own_numpy(old_tensors), names=_TENSORS)
        match(new_tensors, old_tensors, _TENSORS)
        return old_tensors
    old_tensors = own_numpy(old_tensors)
    return named(_choose_trees, new_tensors, old_tensors, steps, update_period, names=_TENSORS)


# The arithmetic, leaf by leaf


def average(new: jax.Array, old: jax.Array, step_size: ArrayLike) -> jax.Array:
    """The average of one leaf, in the dtype of `old`; see `incremental_update`."""
    if not jnp.issubdtype(old.dtype, jnp.inexact):
        return copy(new, old)
    if jnp.issubdtype(old.dtype, jnp.complexfloating):
        parts = ((jnp.real(new), jnp.real(old)), (jnp.imag(new), jnp.imag(old)))
        return lax.complex(*(average(x, y, step_size) for x, y in parts))
    dtype = _arithmetic(new.dtype, old.dtype)
    near, far, weight = _ends(_cast(new, dtype), _cast(old, dtype), step_size, dtype)
    return _where(weight == 0, jnp.copy(near), _between(near, far, weight)).astype(old.dtype)


def compensated(
    new: jax.Array, old: jax.Array, error: jax.Array, step_size: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The average of one leaf and what rounding cut off, so that the next average can take it up.

    The slow value is `old + error`, an unevaluated sum of two numbers in the dtype of `old`.

    References:
      Kahan, "Pracniques: Further remarks on reducing truncation errors", 1965; Dekker, "A floating-point
      technique for extending the available precision", 1971 (the exact sums and products).
    """
    if jnp.issubdtype(old.dtype, jnp.complexfloating):
        reals, imaginaries = (
            compensated(part(new), part(old), part(error), step_size) for part in (jnp.real, jnp.imag)
        )
        return lax.complex(reals[0], imaginaries[0]), lax.complex(reals[1], imaginaries[1])
    dtype = _arithmetic(new.dtype, old.dtype)
    online = _cast(new, dtype), jnp.zeros_like(new, dtype)
    slow = _cast(old, dtype), _cast(error, dtype)
    near, far, weight = _ends(online, slow, step_size, dtype)
    ends = jax.tree.map(jnp.copy, near)  # that the result shares nothing even where nothing is compiled
    value, left = _where(weight == 0, ends, _exactly_between(near, far, weight, old.dtype))
    return value.astype(old.dtype), left.astype(old.dtype)


def _ends(new: Any, old: Any, step_size: ArrayLike, dtype: Any) -> tuple[Any, Any, Any]:
    """The end that the average is nearer to, the far one, and how far along it is, in [0, 1/2]."""
    if isinstance(step_size, float):
        s = dtype.type(step_size)
    else:  # a traced one cannot raise: it is clipped, and nan counts as 0
        s = jnp.asarray(step_size).astype(dtype)
        s = jnp.where(s > 0, jnp.minimum(s, 1), 0)
    low = s <= 0.5
    return _where(low, old, new), _where(low, new, old), _where(low, s, 1 - s)  # exact above one half


def _where(condition: Any, x: Tree, y: Tree) -> Tree:
    """Where the condition is known now, nothing of the choice is compiled."""
    if isinstance(condition, np.bool_):
        return x if condition else y
    return jax.tree.map(partial(jnp.where, condition), x, y)


@jax.custom_jvp
def _between(near: jax.Array, far: jax.Array, weight: jax.Array) -> jax.Array:
    """The point at `weight` on the way from near to far."""
    # Halves, so that their difference does not overflow; taken for 0, an infinite near one stays.
    gap = lax.select(lax.is_finite(near), near * 0.5, jnp.zeros_like(near)) - far * 0.5
    return near - 2 * weight * gap  # so written that a signed zero keeps its sign


@_between.defjvp
def _(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    # That of the mathematics; differentiating the choices above would lose it where both are equal.
    (near, far, weight), (near_dot, far_dot, weight_dot) = primals, tangents
    moved_dot = (1 - weight) * near_dot + weight * far_dot + (far - near) * weight_dot
    return _between(near, far, weight), moved_dot


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _exactly_between(near: Any, far: Any, weight: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The same between values with errors: the point, rounded to `dtype`, and what that cut off."""
    (near, near_error), (far, far_error) = near, far
    gap, gap_error = _exact_sum(far, -near)
    gap_error += far_error - near_error
    moved, moved_error = _exact_product(weight, gap)
    value, value_error = _exact_sum(near, moved)
    rest = near_error + value_error + moved_error + weight * gap_error

    rounded = value + rest
    if dtype != near.dtype:  # without the barrier XLA is free to leave out the cast and its way back
        rounded = lax.optimization_barrier(rounded.astype(dtype)).astype(near.dtype)
    left = (value - rounded) + rest
    # Where nothing moves, or something is not finite, the plain rule is right.
    plain = ((gap == 0) & (gap_error == 0)) | ~jnp.isfinite(left)
    return jnp.where(plain, _between(near, far, weight), rounded), jnp.where(plain, 0, left)


@_exactly_between.defjvp
def _(dtype: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    # That of the mathematics; what is cut off has none.
    (near, far, weight), (near_dot, far_dot, weight_dot) = primals, tangents
    value_dot = (1 - weight) * sum(near_dot) + weight * sum(far_dot) + (far[0] - near[0]) * weight_dot
    return _exactly_between(near, far, weight, dtype), (value_dot, jnp.zeros_like(value_dot))


def _exact_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum and its rounding error (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _exact_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded product and its rounding error (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The upper half of the bits of a number, and the rest: products of halves are exact."""
    bits = jnp.finfo(x.dtype)
    high = lax.reduce_precision(x, bits.nexp, (bits.nmant - 1) // 2)
    return high, x - high


def once_a_shape(rule: Callable[..., Any], step_size: Any) -> Callable[..., Any]:
    """The rule for one leaf at a step size; a thousand leaves of one shape trace it once."""
    return jax.jit(partial(rule, step_size=step_size))


def copy(new: jax.Array, old: jax.Array) -> jax.Array:
    """The new value in the dtype of `old`, strongly typed: a copy, also where nothing is compiled."""
    same = new.dtype == old.dtype and not getattr(new, "weak_type", False)
    return jnp.copy(new) if same else lax.convert_element_type(_cast(new, old.dtype), old.dtype)


def difference(new: jax.Array, old: jax.Array, error: jax.Array | None = None) -> jax.Array:
    """How far one leaf is from `old`, or from `old + error`, in at least float32."""
    dtype = _arithmetic(new.dtype, old.dtype)
    gap = _cast(new, dtype) - _cast(old, dtype)
    return gap if error is None else gap - error.astype(dtype)


def total(value: jax.Array, error: jax.Array | None, dtype: Any) -> jax.Array:
    """One leaf in another dtype: what `compensated` has parted, summed before it is rounded."""
    if error is None:
        return value.astype(dtype)
    wide = _arithmetic(value.dtype, dtype)
    return (value.astype(wide) + error.astype(wide)).astype(dtype)


def all_finite(leaves: list[jax.Array]) -> jax.Array:
    """Whether no inexact leaf holds inf or nan."""
    inexact = [x.astype(widened(x.dtype)) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    # 0 times inf is nan. On CPUs a sum is faster than `all`, and `max` may lose a nan.
    bad = jnp.array([jnp.sum(x * 0) != 0 for x in inexact], jnp.float32)
    # A product, which XLA does not fuse: of small arrays it would put `all` into the loop of each.
    return jnp.dot(bad, bad) == 0


def zero_unless(finite: jax.Array, x: jax.Array) -> jax.Array:
    """Zeros for an inexact leaf that is not to be used, lest its inf and nan reach a derivative."""
    return jnp.where(finite, x, 0) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def add(update: jax.Array, param: jax.Array) -> jax.Array:
    """The sum of one leaf, in the dtype of `param`; see `apply_updates`."""
    dtype = _arithmetic(update.dtype, param.dtype)
    return (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    """A value in another dtype, as it was rounded: within one program XLA may leave that out."""
    if x.dtype == jnp.bfloat16 and jnp.issubdtype(dtype, jnp.inexact):
        x = lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def widened(dtype: Any) -> Any:
    """The dtype for arithmetic on `dtype`: float32 for floats below 32 bits, else itself."""
    small = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if small else dtype


def _arithmetic(new: Any, old: Any) -> Any:
    """The dtype to combine two leaves in: of the wider kind, and of that the larger one."""
    return max(widened(old), widened(new), key=lambda dtype: (kind(dtype), dtype.itemsize))


# Where the slow copy lives


def kept(rule: Callable[..., Any], new: Any, held: tuple[Any, Any], sharding: Any = None) -> Any:
    """Applies a rule to an online leaf and what is held of a slow one, where that is."""
    near, slow = beside(new, held, sharding)
    return put_back(rule(near, *slow), held)


def beside(new: Any, held: tuple[Any, Any], sharding: Any = None) -> tuple[Any, tuple[Any, Any]]:
    """An online leaf and what is held of a slow one on the device, both sharded as the slow one is.

    The types say in which memory an array is and, on Explicit axes of a mesh, how it is sharded. On
    Auto axes they do not: there it is said by whoever knows it, or see `alike`.
    """
    place = jax.typeof(held[0]).sharding
    if AxisType.Explicit in place.mesh.axis_types:
        new = new if jax.typeof(new).sharding == place else jax.sharding.reshard(new, place)
    if sharding is not None and AxisType.Auto in sharding.mesh.axis_types:
        new = lax.with_sharding_constraint(new, _on_auto_axes(sharding))
    return new, on_device(held)


def _on_auto_axes(sharding: NamedSharding) -> NamedSharding:
    """The sharding in device memory, without the Explicit axes of its mesh."""
    mesh = sharding.mesh
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = {name for name, axis_type in types if axis_type == AxisType.Auto}
    named = (entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec)
    spec = PartitionSpec(*(tuple(name for name in names if name in auto) for names in named))
    return NamedSharding(mesh, spec, memory_kind="device")


def on_device(held: tuple[Any, Any]) -> tuple[Any, Any]:
    """What is held of a slow leaf, out of host memory."""
    return jax.device_put(held, jax.memory.Space.Device) if _on_host(held[0]) else held


def put_back(results: Tree, held: tuple[Any, Any]) -> Tree:
    """The results in host memory, if what is held of a slow leaf is there."""
    return jax.device_put(results, jax.memory.Space.Host) if _on_host(held[0]) else results


def _on_host(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def alike(new: Tree, old: Tree) -> Tree:
    """The new arrays, each so linked to the old one that XLA shards both alike, on Auto axes.

    For use while tracing, outside of the package's own compiled functions: all calls of one of those
    share its links, and would be linked with each other.
    """
    return new if jax.device_count() == 1 else jax.tree.map(_linked, new, old)


@jax.custom_jvp
def _linked(new: jax.Array, old: jax.Array) -> jax.Array:
    axes = jax.typeof(old).sharding.mesh.axis_types
    if axes and (AxisType.Auto not in axes or AxisType.Manual in axes):
        return new
    if not _on_host(old):  # a copy is the online array itself, which may be elsewhere
        new = lax.select(lax.optimization_barrier(jnp.bool_(False)), old, new)
    return _alike.bind(new, old)


_linked.defjvp(lambda primals, tangents: (_linked(*primals), tangents[0]))


def _eager(new: Any, old: Any) -> Any:
    there = placement(old)
    return new if there is None else jax.device_put(new, there)


def _batched(args: Any, axes: Any) -> tuple[Any, Any]:
    (new, old), (here, there) = args, axes
    if None in axes:  # not a slow copy each
        return new, here
    return _alike.bind(jnp.moveaxis(new, here, there), old), there


def _lowered(context: Any, new: Any, old: Any) -> list[Any]:
    if not getattr(_CONFIG, "jax_use_shardy_partitioner", True):
        return [new]
    # Numbered in each module anew, so that a program is the same, and found in the compilation cache,
    # whatever was traced before.
    group = 2**32 + context.module_context.new_channel()  # others are counted from 0
    of_group = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), group)
    for value in (new, old):
        sdy.ShardingGroupOp(value, of_group)
    return [new]


# What jax.experimental.shard_alike was, which jax 0.12 no longer has.
_alike = Primitive("alike")
_alike.def_impl(_eager)
_alike.def_abstract_eval(lambda new, _: new)
batching.primitive_batchers[_alike] = _batched
mlir.register_lowering(_alike, _lowered, cacheable=False)


def placement(x: Any) -> Any:
    """Where an array was put, or is to be; None where jax chooses, as while tracing."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return x.sharding if concrete and x.committed else None


def shardings(tree: Any) -> tuple[Any, ...] | None:
    """How the arrays of a tree are sharded, leaf by leaf; None where none is."""
    of = (getattr(x, "sharding", None) for x in jax.tree.leaves(tree))
    named = tuple(x if isinstance(x, NamedSharding) else None for x in of)
    return named if any(named) else None


def _mixes(here: Any, there: Any) -> bool:
    """Whether jit takes arrays of both: of the same devices in one order, on no other Explicit axes."""
    if not (isinstance(here, NamedSharding) and isinstance(there, NamedSharding)):
        return here.device_set == there.device_set
    meshes: list[Any] = [here.mesh, there.mesh]
    one_order = [*meshes[0].devices.flat] == [*meshes[1].devices.flat]
    return meshes[0] == meshes[1] or (one_order and AxisType.Explicit not in meshes[0].axis_types)


def onto(new: Tree, old: Any) -> Tree:
    """The tree with those of its arrays moved that are on other devices, which jit would not mix."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        return new  # the rule says where

    def moved(x: Any, y: Any) -> Any:
        here, there = placement(x), placement(y)
        if here is None or there is None or _mixes(here, there):
            return x
        return jax.device_put(x, there.with_memory_kind("device"))

    return jax.tree.map(moved, new, old)


# The same over trees: one compiled call each


@partial(jax.jit, inline=True)
def _average_trees(new: Tree, old: Tree, step_size: ArrayLike) -> Tree:
    pairs, treedef = match(new, old, _TENSORS)
    leaf = once_a_shape(average, step_size)
    return treedef.unflatten([leaf(x, y) for x, y in pairs])


@partial(jax.jit, inline=True)
def _copy_trees(new: Tree, old: Tree) -> Tree:
    pairs, treedef = match(new, old, _TENSORS)
    return treedef.unflatten([copy(x, y) for x, y in pairs])


@partial(jax.jit, inline=True)
def _choose_trees(new: Tree, old: Tree, steps: jax.Array, update_period: jax.Array) -> Tree:
    due = steps % jnp.maximum(update_period, 1) == 0
    return lax.cond(due, _copy_trees, lambda _, slow: slow, new, old)


@partial(jax.jit, inline=True)
def _add_trees(updates: Any, params: Tree) -> Tree:
    pairs, treedef = match(updates, params, _UPDATES)
    for index, (_, param) in enumerate(pairs):
        if is_key(param):
            raise TypeError(f"updates{_path(updates, index)}: a PRNG key takes no update")
    return treedef.unflatten([add(u, p) for u, p in pairs])


def named(rule: Callable[..., Any], new: Any, old: Any, *args: Any, names: Names, **static: Any) -> Any:
    """Calls a compiled rule; where jit refuses an argument, says which leaf it was."""
    own = own_numpy(new)
    try:
        if _CONFIG.jax_disable_jit:  # what jit does: it makes jax's arrays of all leaves
            own, old = jax.tree.map(jnp.asarray, (own, old))
        return rule(own, old, *args, **static)
    except (TypeError, OverflowError):  # the latter of a Python integer past jax's
        match(new, old, names)
        raise


def own_numpy(tree: Tree) -> Tree:
    """The tree with copies of its NumPy arrays: jax may read them after the call, or share them."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, np.ndarray):
            return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, tree)
    return tree


def _prune(tree: Any, reference: Any) -> Any:
    """The tree, with None wherever the reference holds None, as in optax."""
    if jax.tree.structure(tree) == jax.tree.structure(reference):
        return tree
    is_none = partial(operator.is_, None)
    with suppress(ValueError):  # another difference: the rule names it
        return jax.tree.map(lambda r, t: None if r is None else t, reference, tree, is_leaf=is_none)
    return tree


# What may be averaged with what


def match(new: Any, old: Any, names: Names) -> tuple[list[tuple[Any, Any]], Any]:
    """Pairs the leaves of two trees, or says where they do not fit.

    Under jit this runs while tracing and costs nothing afterwards.
    """
    new_leaves, treedef = jax.tree.flatten(new)
    old_leaves, old_treedef = jax.tree.flatten(old)
    if treedef != old_treedef:
        differences = list(_differences(new, old, ()))
        # A None may be meant (see `_prune`), so whatever else differs is told first.
        path, got, expected = min(differences, key=lambda found: found[1] == "None")
        raise ValueError(_mismatch(names, keystr(path), got, expected)) from None
    pairs = list(zip(new_leaves, old_leaves, strict=True))
    for index, (x, y) in enumerate(pairs):
        error = _leaf_error(x, y)
        if error is not None:
            raise error(_mismatch(names, _path(new, index), describe(x), describe(y))) from None
    return pairs, treedef


def _leaf_error(new: Any, old: Any) -> type[Exception] | None:
    new, old = _array_type(new), _array_type(old)
    if new is None or old is None:
        return TypeError
    new_kind, old_kind = kind(new.dtype), kind(old.dtype)
    if new_kind is None or old_kind is None or new_kind > old_kind:
        return TypeError
    if old_kind == _KEY and new.dtype != old.dtype:  # a number, or a key of another implementation
        return TypeError
    return ValueError if new.shape != old.shape else None


def array_types(tree: Any, name: str) -> list[Any]:
    """The shapes and dtypes of a tree's leaves, or says which one is no array."""
    avals = [_array_type(x) for x in jax.tree.leaves(tree)]
    for index, aval in enumerate(avals):
        if aval is None or kind(aval.dtype) is None:
            leaf = jax.tree.leaves(tree)[index]
            raise TypeError(f"{name}{_path(tree, index)}: expected an array, got {describe(leaf)}")
    return avals


def _array_type(x: Any) -> Any:
    """What tells the shape and dtype of a leaf that jax computes with, else None."""
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return None
    try:
        return jax.typeof(x)
    except (TypeError, ValueError, OverflowError):  # an nnx.Variable, an int past 64 bits
        return None


def kind(dtype: Any) -> int | None:
    """How wide a kind of number is: bool < int < float < complex; keys stand apart."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating, jax.dtypes.prng_key)
    return next((i for i, k in enumerate(kinds) if jnp.issubdtype(dtype, k)), None)


def _differences(new: Any, old: Any, path: Path) -> Iterator[tuple[Path, str, str]]:
    """Where two trees part: key path, what `new` has there, what `old` has."""
    if is_leaf(new) and is_leaf(old):
        return
    new_children, new_node = _children(new)
    old_children, old_node = _children(old)
    if type(new) is not type(old):
        yield path, describe(new), describe(old)
    elif new_children.keys() != old_children.keys():
        for key in [key for key in old_children if key not in new_children]:
            yield (*path, *key), "nothing", describe(old_children[key])
        for key in [key for key in new_children if key not in old_children]:
            yield (*path, *key), describe(new_children[key]), "nothing"
    elif new_node != old_node:
        yield (
            path,
            f"{describe(new)} with other static data (settings, or train or eval mode)",
            describe(old),
        )
    else:
        for key in old_children:
            yield from _differences(new_children[key], old_children[key], (*path, *key))


def _children(tree: Any) -> tuple[dict[Path, Any], Any]:
    """One level of a tree: its children by key, and the node itself."""

    def is_child(x: Any) -> bool:
        return x is not tree

    children = dict(tree_flatten_with_path(tree, is_leaf=is_child)[0])
    return children, jax.tree.structure(tree, is_leaf=is_child)


def named_children(tree: Any) -> dict[str, Any]:
    """One level of a tree, named by key path."""
    return {keystr(key, simple=True): child for key, child in _children(tree)[0].items()}


def is_key(x: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return kind(x.dtype) == _KEY


def is_leaf(x: Any) -> bool:
    """Whether jax takes it for a leaf: no node, and not None."""
    return jax.tree_util.all_leaves([x])


def _mismatch(names: Names, path: str, got: str, expected: str) -> str:
    return f"{names[0]}{path}: expected {expected} as in {names[1]}, got {got}"


def _path(tree: Any, index: int) -> str:
    return keystr(tree_flatten_with_path(tree)[0][index][0])


def describe(x: Any) -> str:
    """What a leaf or a node is, for a message."""
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return f"{x.dtype}{list(x.shape)}"
    aval = _array_type(x) if is_leaf(x) else None
    if aval is None:
        return "None" if x is None else type(x).__name__
    return f"{aval.dtype}{list(aval.shape)}"


def check_step_size(step_size: Any) -> Any:
    """A step size that may be used: a device scalar, or a plain number within [0, 1] as a float."""
    plain = isinstance(step_size, (int, float)) and not isinstance(step_size, bool)
    if not plain and isinstance(real_scalar("step_size", step_size), jax.Array):
        return step_size
    if not 0 <= step_size <= 1:
        raise ValueError(f"step_size: expected a number in [0, 1], got {step_size}")
    return float(step_size)


def real_scalar(name: str, x: Any) -> Any:
    """Returns a scalar that is a real number."""
    aval = _array_type(x)
    if aval is None or kind(aval.dtype) not in (_INTEGER, _FLOAT):
        raise TypeError(f"{name}: expected a real scalar, got {describe(x)}")
    if aval.shape:
        raise ValueError(f"{name}: expected a scalar, got shape {list(aval.shape)}")
    return x


def check_update_period(update_period: Any) -> Any:
    """Returns an update period that may be used: an integer, and if it is known now, in range."""
    update_period = _check_integer("update_period", update_period)
    if isinstance(update_period, int) and not 1 <= update_period <= INT32_MAX:
        raise ValueError(f"update_period: expected 1 to 2**31-1, got {update_period}")
    return update_period


def _check_integer(name: str, x: Any) -> Any:
    """A plain integer as an int, a device one with at least 32 bits."""
    if isinstance(x, int) and not isinstance(x, bool):  # of any size
        return x
    aval = _array_type(x)
    if aval is None or kind(aval.dtype) != _INTEGER:
        raise TypeError(f"{name}: expected an integer, got {describe(x)}")
    if aval.shape:
        raise ValueError(f"{name}: expected a scalar, got shape {list(aval.shape)}")
    if not isinstance(x, jax.Array):
        return operator.index(x)
    return x.astype(jnp.int32) if aval.dtype.itemsize < 4 else x
