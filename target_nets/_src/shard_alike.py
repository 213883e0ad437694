"""A jax primitive that makes XLA shard two arrays alike.

It puts both arrays into one sharding group of Shardy, XLA's partitioner. The function of that name in
`jax.experimental`, which jax 0.12 removed, gives all pairs of one shape and dtype the same group.

jax documents none of the names that this file imports from `jax.extend` and `jax.interpreters`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.interpreters import batching, mlir


def shard_alike(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns the new array, linked to the old one of the same shape."""
    return _shard_alike_p.bind(new, old)


def _evaluate(new: jax.Array, old: jax.Array) -> jax.Array:
    """Puts the new array where the old one is. Outside of jit that is known."""
    return jax.device_put(new, old.sharding) if old.committed else new


def _batch(
    arrays: tuple[jax.Array, jax.Array], axes: tuple[int | None, int | None]
) -> tuple[jax.Array, int | None]:
    (new, old), (new_axis, old_axis) = arrays, axes
    if new_axis is None or old_axis is None:  # arrays of different shapes cannot be sharded alike
        return new, new_axis
    return shard_alike(jnp.moveaxis(new, new_axis, old_axis), old), old_axis


def _lower(context: Any, new: Any, old: Any) -> list[Any]:
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return [new]  # GSPMD, the partitioner before Shardy, does not know these groups
    # The module itself counts its groups. So a program does not depend on what was traced before it, and
    # the compilation cache finds it.
    attributes = context.module_context.module.operation.attributes
    group = attributes[_NEXT_GROUP] if _NEXT_GROUP in attributes else _int64(_FIRST_GROUP)
    attributes[_NEXT_GROUP] = _int64(int(group) + 1)
    for value in (new, old):
        sdy.ShardingGroupOp(value, group)
    return [new]


def _int64(value: int) -> Any:
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), value)


_NEXT_GROUP = "target_nets.next_sharding_group"
_FIRST_GROUP = 2**32  # clear of other groups, which count from 0


_shard_alike_p = Primitive("shard_alike")
_shard_alike_p.def_impl(_evaluate)
_shard_alike_p.def_abstract_eval(lambda new, _: new)
batching.primitive_batchers[_shard_alike_p] = _batch
# A cached lowering would give every link of a program the same group.
mlir.register_lowering(_shard_alike_p, _lower, cacheable=False)
