"""From one device to many: parameters, optimizer and slow copy, each split over all devices (FSDP).

    python examples/sharded.py                              # one process, eight virtual CPU devices
    python examples/sharded.py --processes 2 --devices 4    # two processes, started from here
    python examples/sharded.py --slow host                  # where the slow copy lives
    python examples/sharded.py --resume --devices 4         # goes on, on other devices, too

Read `train_step` and `slow_copy` first: nothing in the step says how many devices or processes there
are, or where the slow copy lives. The program measures what each place of the slow copy costs, trains,
saves through Orbax and draws a picture. Where there are accelerators it takes those (with one process).

A resumed run starts from the saved state to the bit. On as many devices it goes on to the bit, too; on
others the sums over a batch are rounded in another order.
"""

import argparse
import functools
import multiprocessing
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.lax import with_sharding_constraint
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from target_nets import EMATarget

INPUTS, OUTPUTS, LAYERS, BATCH = 64, 64, 4, 256
BLOCK = 25  # steps between two checkpoints
OPTIMIZER = optax.adam(1e-3)
PLACES = ("sharded", "replicated", "host")  # for the slow copy
MIB = 2**20
WHOLE = PartitionSpec()
CHECKPOINTS = "checkpoints"


# What is trained, and where it lives


def split(tree: Any) -> Any:
    """The tree, each array split over all devices along its longest axis that they divide."""

    def one(x: jax.Array) -> jax.Array:
        axes = [axis for axis, n in enumerate(x.shape) if n % jax.device_count() == 0]
        longest = max(axes, key=lambda axis: x.shape[axis], default=None)
        names = ["data" if axis == longest else None for axis in range(x.ndim)]
        return with_sharding_constraint(x, PartitionSpec(*names))

    return jax.tree.map(one, tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(width: int, seed: int) -> dict[str, jax.Array]:
    """The parameters of a residual network, its layers stacked; no device ever holds all of them."""
    shapes = {"embed": (INPUTS, width), "up": (LAYERS, width, 4 * width)}
    shapes |= {"down": (LAYERS, 4 * width, width), "head": (width, OUTPUTS)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(seed), len(shapes)), strict=True))
    scales = {name: shape[-2] ** -0.5 for name, shape in shapes.items()}
    return split({name: scales[name] * jax.random.normal(keys[name], shapes[name]) for name in shapes})


def network(params: Any, x: jax.Array) -> jax.Array:
    """Inputs (..., INPUTS) to outputs (..., OUTPUTS). Weights are gathered where they are used."""

    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        up, down = with_sharding_constraint(weights, WHOLE)
        return x + jax.nn.relu(jax.nn.standardize(x) @ up) @ down / LAYERS, None

    embed, head = with_sharding_constraint((params["embed"], params["head"]), WHOLE)
    x, _ = jax.lax.scan(layer, x @ embed, (params["up"], params["down"]))
    return jax.nn.standardize(x) @ head


def loss(params: Any, key: jax.Array) -> jax.Array:
    """The mean squared error on noisy waves of a random projection; each device has a part of them."""
    inputs, noise = jax.random.split(key)
    x = with_sharding_constraint(jax.random.normal(inputs, (BATCH, INPUTS)), PartitionSpec("data"))
    goals = jnp.sin(x @ jax.random.normal(jax.random.key(1), (INPUTS, OUTPUTS)) / 4)
    goals += 0.3 * jax.random.normal(noise, goals.shape)
    return jnp.mean((network(params, x) - goals) ** 2)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: dict[str, Any], key: jax.Array) -> tuple[dict[str, Any], jax.Array]:
    """One step of gradient descent, and one of the slow copy after it; returns the loss."""
    value, grads = jax.value_and_grad(loss)(state["params"], key)
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"])
    params, opt_state = split((optax.apply_updates(state["params"], updates), opt_state))
    target = state["target"] if state["target"] is None else state["target"].update(params)
    return {"params": params, "opt_state": opt_state, "target": target}, value


def slow_copy(params: Any, place: str) -> EMATarget[Any]:
    """A target whose slow copy lives where it is put, here and after every update."""

    def sharding(x: jax.Array) -> NamedSharding:
        if place == "replicated":
            return NamedSharding(x.sharding.mesh, WHOLE)
        return x.sharding.with_memory_kind("pinned_host") if place == "host" else x.sharding

    return EMATarget(jax.device_put(params, jax.tree.map(sharding, params)), step_size=0.02)


def fresh(width: int, seed: int, place: str) -> dict[str, Any]:
    """The state to start from: all that training changes, so also all that is saved."""
    params = init(width, seed)
    target = None if place == "none" else slow_copy(params, place)
    return {"params": params, "opt_state": OPTIMIZER.init(params), "target": target}


# What it costs


def memory(tree: Any, host: bool = False) -> float:
    """The MiB of a tree on the first device of this process, or in its host's memory for it."""
    device, total = jax.local_devices()[0], 0
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and (x.sharding.memory_kind == "pinned_host") == host:
            total += sum(shard.data.nbytes for shard in x.addressable_shards if shard.device == device)
    return total / MIB


def communicated(target: EMATarget[Any], params: Any) -> float:
    """The MiB that a device receives in one update, read from the compiled program.

    Counted are the results of its collectives, carried out as in a ring of n devices.
    """
    program = jax.jit(lambda target, params: target.update(params)).lower(target, params).compile()
    n, total = jax.device_count(), 0.0
    share = {"all-gather": 1 - 1 / n, "all-to-all": 1 - 1 / n, "all-reduce": 2 - 2 / n}
    share |= {"reduce-scatter": n - 1, "collective-permute": 1}
    for result, name in re.findall(rf"= (.*?) ({'|'.join(share)})(?:-done)?\(", program.as_text()):
        for bits, shape in re.findall(r"[a-z]+(\d+)\w*\[([\d,]*)\]", result):
            total += share[name] * int(bits) / 8 * np.prod([int(x) for x in shape.split(",") if x])
    return total / MIB


def measured(width: int, place: str) -> str:
    """A row of the table: how long a step takes, and after it where the slow copy is."""
    state, times = fresh(width, 0, place), []
    for _ in range(21):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, jax.random.key(0)))
        times.append(1000 * (time.perf_counter() - start))
    target = state["target"]
    received = 0.0 if target is None else communicated(target, state["params"])
    sizes = "".join(f"{x:14.2f} MiB" for x in (memory(target), memory(target, host=True), received))
    return f"{place:10s}{sizes}{np.median(times[1:]):12.1f} ms"  # the first one compiles


def draw(width: int, path: Path) -> None:
    """Where each part of each array lives: in the memory of which device, or of its host (h)."""
    trees = {"parameters and\neach Adam moment": init(width, 0)}
    trees |= {f"slow copy,\n{place}": slow_copy(init(width, 0), place).params for place in PLACES}
    if jax.process_index() > 0:
        return
    figure, axes = plt.subplots(4, len(trees), figsize=(common.WIDTH, 6))
    figure.suptitle("What each device holds (its number), or its host for it (h and its number)")
    colors = plt.get_cmap("viridis")(np.linspace(0.45, 1, jax.device_count()))
    for column, (title, tree) in zip(axes.T, trees.items(), strict=True):
        column[0].set_title(f"{title}\n{memory(tree):.2f} MiB a device")
        for axis, name in zip(column, ("embed", "up", "down", "head"), strict=True):
            x, size = tree[name], tree[name].shape[-2:]
            axis.set(xlim=(0, size[1]), ylim=(size[0], 0), xticks=[], yticks=[])
            axis.set_xlabel(f"{name} {list(x.shape)}", fontsize=9)
            host, alike = x.sharding.memory_kind == "pinned_host", x.sharding.is_fully_replicated
            parts = list(x.sharding.devices_indices_map(x.shape).values())
            for number, index in enumerate(parts[:1] if alike else parts):
                (top, bottom, _), (left, right, _) = map(slice.indices, index[-2:], size)
                box = plt.Rectangle((left, top), right - left, bottom - top, ec="w")
                box.set(fc="0.85" if alike else colors[number], alpha=0.35 if host else 1)
                text = "whole\non each device" if alike else f"{'h' * host}{number}"
                axis.add_patch(box)
                axis.annotate(text, box.get_center(), ha="center", va="center", fontsize=8)
    figure.savefig(path)
    plt.close(figure)


# The run


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a run that goes on must have as before."""
    return {"program": "sharded", "seed": args.seed, "width": args.width}


def train(args: argparse.Namespace, stopped: Callable[[], bool], number: int = 0, port: int = 0) -> None:
    """What each of the processes does."""
    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.processes > 1:
        jax.config.update("jax_platforms", "cpu")
        here = f"127.0.0.1:{port}"
        jax.distributed.initialize(here, args.processes, number, coordinator_bind_address=here)
    jax.set_mesh(jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)))
    say = print if number == 0 else lambda *_: None

    def all_stopped() -> bool:
        return bool(multihost_utils.broadcast_one_to_all(np.array(stopped())))

    state, step = fresh(args.width, args.seed, args.slow), 0
    sizes = ", ".join(f"{memory(state[name]):.2f} MiB of {name}" for name in ("params", "opt_state"))
    say(f"{args.processes} processes, {jax.device_count()} devices, on each {sizes}")
    if not args.resume:
        say("slow copy        on a device    on its host for it   received in an update    train step")
        for place in ("none", *PLACES):
            if not all_stopped():
                say(measured(args.width, place))
        draw(args.width, args.out / "sharded.png")

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    bar = tqdm(total=args.steps, unit="step", disable=number > 0 or None)
    with ocp.CheckpointManager(args.out / CHECKPOINTS, options=options) as manager, bar:
        if args.resume:
            step = manager.latest_step()
            state = manager.restore(step, args=ocp.args.StandardRestore(state))
        bar.update(step)
        while step < args.steps and not all_stopped():
            for _ in range(BLOCK):
                key = jax.random.fold_in(jax.random.key(args.seed + 2), step)
                state, value = train_step(state, key)
                step += 1
                bar.update()
            bar.set_postfix(loss=f"{value:.3f}")
            manager.save(step, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            if number == 0:
                common.seal(args.out / CHECKPOINTS / str(step), settings(args))
    params, slow = state["params"], state["target"].params
    slow = jax.device_put(slow, jax.tree.map(lambda x: x.sharding, params))  # to where it computes
    losses = [float(jax.jit(loss)(tree, jax.random.key(3))) for tree in (params, slow)]
    say(f"loss on fresh data after {step} steps: online {losses[0]:.4f}, slow copy {losses[1]:.4f}")
    if args.processes > 1:
        jax.distributed.shutdown()  # once all have come here


def program(args: argparse.Namespace) -> int | None:
    """Trains in this process, or starts several and waits for them; where one fails, all end."""
    with common.interruptible() as interrupted:
        if args.resume:
            common.drop_damaged(args.out / CHECKPOINTS, settings(args))
        if args.processes == 1:
            return train(args, lambda: bool(interrupted))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        stop = spawn.Event()
        arguments = [(args, stop.is_set, number, port) for number in range(args.processes)]
        started = [spawn.Process(target=train, args=each, daemon=True) for each in arguments]
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which the processes inherit
        for process in started:
            process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while any(process.is_alive() for process in started):
            if interrupted:
                stop.set()
            if code := next((process.exitcode for process in started if process.exitcode), 0):
                return code
            time.sleep(0.1)
    return 0


def main() -> int:
    parser = common.parser(__doc__, out="runs/sharded-{width}-{seed}")
    number = common.within(1, 10**6)
    parser.add_argument("--steps", type=number, default=200, help="train steps, in blocks of 25")
    parser.add_argument("--width", type=common.within(1, 2**14), default=256, help="of the network")
    parser.add_argument("--slow", choices=PLACES, default="sharded", help="where the slow copy lives")
    parser.add_argument("--processes", type=int, choices=(1, 2, 4, 8), default=1, help="how many")
    parser.add_argument(
        "--devices", type=int, choices=(1, 2, 4, 8, 16), default=8, help="virtual CPU devices of each"
    )
    return common.run(parser, program, CHECKPOINTS)


if __name__ == "__main__":
    raise SystemExit(main())
