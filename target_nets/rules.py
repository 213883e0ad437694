"""The rules: pure functions on trees, with the names and arguments of optax's page "Apply Updates".

After `import target_nets as optax` a program that makes these three calls still gives the right result,
or fails with an error that names the problem. The main differences from optax: the result keeps the
dtypes of the tree that is updated, leaves that are not inexact are copied, shapes and structures must
match exactly, and no result shares memory with the new tensors. nnx objects stand for their arrays. Refs
among the new tensors are read.
"""

from jax.typing import ArrayLike

from target_nets._src import checks, tree_rules, trees
from target_nets._src.leaves import PyTree, Tree
from target_nets._src.state import AVERAGE_ALL, COPY_ALL

__all__ = ["apply_updates", "incremental_update", "periodic_update"]


def apply_updates(params: Tree, updates: PyTree) -> Tree:
    """Adds the updates of an optax gradient transformation, or any others, to the parameters.

    Sums of 8- and 16-bit floats are computed in float32 and rounded once.

    Args:
      params: A tree of arrays of any shapes and dtypes. Where it holds None, so does the result.
      updates: A tree with the structure and shapes of `params`. No leaf may be of a wider kind than its
        parameter (bool < int < float < complex).

    Returns:
      `params + updates`, with the structure, shapes and dtypes of `params`, in new buffers.

    Raises:
      ValueError: The structures or the shapes of two leaves differ.
      TypeError: A leaf is not an array or a number, is of a wider kind than its parameter, or is a PRNG
        key.

    Example:
      >>> import jax.numpy as jnp
      >>> import target_nets
      >>> target_nets.apply_updates({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.5, -0.5])})
      {'w': Array([1.5, 1.5], dtype=float32)}
    """
    return tree_rules.add(trees.copy_nones(updates, params), params)


def incremental_update(new_tensors: Tree, old_tensors: Tree, step_size: ArrayLike) -> Tree:
    """Moves a slow copy towards new tensors: Polyak averaging, an exponential moving average.

    The average is `old + step_size*(new - old)`. If the step size is above one half, it is computed from
    the other end, as `new - (1 - step_size)*(new - old)`. If both values are equal, the average is
    exactly that value, which `step_size*new + (1 - step_size)*old` does not guarantee. At step size 1
    the result is exactly new, and at 0 exactly old, even if the other value is inf or nan. 8- and 16-bit
    floats are averaged in float32 and rounded once.

    Args:
      new_tensors: The online tensors, a tree of arrays. Where it holds None, so does the result.
      old_tensors: The slow copy, a tree of the same structure and shapes. Its inexact leaves are
        averaged. Integers, booleans and PRNG keys (`jax.random.key`) take the new value.
      step_size: A real scalar in [0, 1]. It does not change the dtypes of the result. A `jax.Array`
        outside this range is clipped, and nan counts as 0.

    Returns:
      The averages, with the structure, shapes and dtypes of `old_tensors`, in new buffers.

    Raises:
      ValueError: The structures or the shapes of two leaves differ, an integer does not fit the dtype
        of the old leaf, or a Python or NumPy step size is not in [0, 1].
      TypeError: A leaf is not an array or a number, or is of a wider kind than the old one (bool < int <
        float < complex) or of an integer dtype that does not fit into it, or the step size is not real.

    References:
      Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; Lillicrap et
      al., "Continuous control with deep reinforcement learning", 2015 (target networks).

    Example:
      >>> import jax.numpy as jnp
      >>> import target_nets
      >>> online, slow = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.zeros(2)}
      >>> target_nets.incremental_update(online, slow, step_size=0.25)
      {'w': Array([0.25, 0.5 ], dtype=float32)}
    """
    step_size = checks.check_step_size(step_size)
    old_tensors = trees.copy_nones(old_tensors, new_tensors)
    return tree_rules.apply_plan_to_tensors(AVERAGE_ALL, new_tensors, old_tensors, step_size)


def periodic_update(
    new_tensors: Tree, old_tensors: Tree, steps: ArrayLike, update_period: ArrayLike
) -> Tree:
    """Returns copies of the new tensors every `update_period` steps, and otherwise the old tensors.

    If `steps` and `update_period` are both Python or NumPy integers, Python decides: between two copies
    the call returns `old_tensors` itself and starts nothing on the device. If one of them is a
    `jax.Array`, traced or not, the call is one `lax.cond`.

    Args:
      new_tensors: The online tensors, a tree of arrays.
      old_tensors: The slow copy, a tree of the same structure and shapes.
      steps: How many updates the online network has had, an integer scalar.
      update_period: The number of steps from one copy to the next, an integer scalar from 1 to 2**31-1.
        A `jax.Array` below 1 counts as 1.

    Returns:
      If `steps % update_period == 0`, copies of `new_tensors` in the dtypes of `old_tensors`. Otherwise
      `old_tensors`.

    Raises:
      ValueError: The structures or the shapes of two leaves differ, an integer does not fit the dtype
        of the old leaf, or a Python or NumPy period is out of range.
      TypeError: A leaf is not an array or a number, or is of a wider kind than the old one (bool < int <
        float < complex) or of an integer dtype that does not fit into it, or a count is not an integer.

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
    steps = checks.check_integer("steps", steps)
    update_period = checks.check_count("update_period", update_period)
    if not (isinstance(steps, int) and isinstance(update_period, int)):
        if isinstance(steps, int) and abs(steps) > checks.INT32_MAX:
            raise ValueError(f"steps: expected at most 2**31-1 beside a jax.Array, got {steps}")
        return tree_rules.copy_if_due(new_tensors, old_tensors, steps, update_period)
    if steps % update_period == 0:
        return tree_rules.apply_plan_to_tensors(COPY_ALL, new_tensors, old_tensors)
    tree_rules.check_tensors(new_tensors, old_tensors)
    return old_tensors
