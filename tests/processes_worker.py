"""A worker of test_processes.py: it trains on the devices of all workers, and saves.

The weights stay on a grid, the loss is of first order, and a step follows the signs of summed gradients.
So no sum is rounded, whatever its order: the result has the same bits on any devices, and in NumPy.
"""

import argparse
import pickle
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from target_nets import EMATarget, PeriodicTarget

BATCH = 32
GRID = 2.0**-6
STEP_SIZE = 0.25
PERIOD = 2
POISONED = 2  # the step at which one online value is nan


def start() -> dict[str, np.ndarray]:
    """Returns the weights of two layers, 16 to 32 to 8."""
    rng = np.random.default_rng(0)
    shapes = {"inner": (16, 32), "outer": (32, 8)}
    return {name: rng.integers(-32, 33, shape) * np.float32(GRID) for name, shape in shapes.items()}


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs (BATCH, 16) and goals (BATCH, 8), which are small integers."""
    rng = np.random.default_rng((1, step))
    return tuple(rng.integers(-2, 3, (BATCH, width)).astype(np.float32) for width in (16, 8))


def loss(params: Any, inputs: jax.Array, goals: jax.Array) -> jax.Array:
    """Returns the sum of absolute errors."""
    return jnp.sum(jnp.abs(jax.nn.relu(inputs @ params["inner"]) @ params["outer"] - goals))


def train_step(state: Any, inputs: jax.Array, goals: jax.Array) -> Any:
    """Takes a step along the signs of the sum of all gradients so far, and updates the targets."""
    grads = jax.grad(loss)(state["params"], inputs, goals)
    momentum = jax.tree.map(jnp.add, state["momentum"], grads)
    params = jax.tree.map(lambda p, m: p - GRID * jnp.sign(m), state["params"], momentum)
    targets = tuple(target.update(params) for target in state["targets"])
    return {"params": params, "momentum": momentum, "targets": targets}


def placed(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Splits the first axis of an array over all devices of all processes."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fresh(mesh: Mesh) -> tuple[Any, EMATarget[Any]]:
    """Returns a state whose targets the train step updates, and a target for eager updates."""
    params = {name: placed(array, mesh) for name, array in start().items()}
    targets = EMATarget(params, STEP_SIZE), PeriodicTarget(params, PERIOD)
    state = {
        "params": params,
        "momentum": jax.tree.map(jnp.zeros_like, params),
        "targets": targets,
    }
    return state, EMATarget(params, STEP_SIZE, skip_nonfinite=True)


def poisoned(params: Any) -> Any:
    """Returns the same parameters with one nan, which is on one device."""
    return params | {"outer": params["outer"].at[-1, -1].set(jnp.nan)}


def shards(tree: Any) -> dict[tuple[str, int], np.ndarray]:
    """Returns the shards of this process by key path and first row."""
    return {
        (jax.tree_util.keystr(path), shard.index[0].start or 0 if leaf.ndim else 0): np.asarray(
            shard.data
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        for shard in getattr(leaf, "addressable_shards", [])
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)  # for its output
    parser.add_argument("--steps", type=int, nargs="+")  # after each of these it writes its shards
    parser.add_argument("--devices", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    parser.add_argument("--resume", type=int)  # from the checkpoint after this step
    parser.add_argument("--save", action="store_true")  # saves after the last step, and waits
    args = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = f"127.0.0.1:{args.port}"
        jax.distributed.initialize(
            address,
            args.processes,
            args.process,
            initialization_timeout=30,
            coordinator_bind_address=address,
        )
    assert jax.device_count() == args.devices * args.processes
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

    state, alone = fresh(mesh)
    if args.resume is not None:
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(args.folder / "state", state)
            alone = checkpointer.restore(args.folder / "alone", alone)
    compiled = jax.jit(train_step, donate_argnums=0)
    for step in range((args.resume or 0) + 1, args.steps[-1] + 1):
        state = compiled(state, *(placed(array, mesh) for array in batch(step)))
        if step == POISONED:
            alone.update(poisoned(state["params"]))
        alone.update(state["params"])
        if step in args.steps:
            counts = int(state["targets"][0].step), int(alone.step), int(alone.skipped)
            held = {"shards": shards((state, alone)), "counts": counts}
            path = args.folder / f"{step}, {args.process} of {args.processes}, {args.devices}.pickle"
            path.write_bytes(pickle.dumps(held))

    if args.save:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(args.folder / "state", state)
            checkpointer.save(args.folder / "alone", alone)
        (args.folder / f"saved by {args.process}").touch()
        time.sleep(60)


if __name__ == "__main__":
    main()
