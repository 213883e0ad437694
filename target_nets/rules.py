"""The rules: pure functions from the online and the slow tensors to the new slow tensors.

They have the names and arguments of optax's page "Apply Updates". After `import target_nets as optax` a
program that makes these three calls still gives the right result, or fails with an error that names the
problem. Each docstring says what differs from optax: dtypes are kept, shapes and structures must match
exactly, and no result shares memory with the online tensors.
"""

from jax.typing import ArrayLike

from target_nets._src import checks, trees
from target_nets._src.state import AVERAGE_ALL, COPY_ALL, SlowCopy
from target_nets._src.tree_rules import TENSORS, add, copy_if_due, move
from target_nets._src.trees import PyTree, Tree

__all__ = ["apply_updates", "incremental_update", "periodic_update"]


def apply_updates(params: Tree, updates: PyTree) -> Tree:
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
    return add(trees.copy_nones(updates, params), trees.jit_argument(params))


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
    step_size = checks.check_step_size(step_size)
    slow = SlowCopy(trees.jit_argument(trees.copy_nones(old_tensors, new_tensors)))
    return move(new_tensors, slow, AVERAGE_ALL, TENSORS, step_size=step_size)[0].params


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
    steps = checks.check_integer("steps", steps)
    update_period = checks.check_count("update_period", update_period)
    if not (isinstance(steps, int) and isinstance(update_period, int)):
        return copy_if_due(new_tensors, trees.jit_argument(old_tensors), steps, update_period)
    if steps % update_period == 0:
        return move(new_tensors, SlowCopy(trees.jit_argument(old_tensors)), COPY_ALL, TENSORS)[0].params
    trees.zip_leaves(new_tensors, old_tensors, TENSORS)
    return old_tensors
