"""Every way to keep a slow copy, timed beside the others in one run, and beside the memory's limit.

An update reads the online parameters and the slow copy, and writes the slow copy: 12 bytes a float32
parameter. The limit is that pass in C on all cores, over arrays of the same kind of memory. All cases of
a tree are interleaved; figures are medians. A peer that is not installed is named and skipped.

python tests/benchmarks/speed.py
pip install -e '.[bench]'  # the peers; for torch on a CPU see pytorch.org
"""

import argparse
import concurrent.futures
import ctypes
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from target_nets import EMATarget, PeriodicTarget, incremental_update

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads are not to spin beside the others

PICTURE = Path(__file__).parents[2] / "examples" / "figures" / "speed.png"
STEP_SIZE = 0.005
Case = Callable[[], Any]  # one update; what it returns is waited for
UPDATES = 100
IN_ONE_PROGRAM = f"one of {UPDATES} updates in a program"  # the only case with more than one update
OURS, PEERS, LIMIT = "#0072B2", "#777777", "#222222"
Tree = dict[str, jax.Array]


# The trees


def dqn() -> list[tuple[int, ...]]:
    """A Q-network: 6 arrays, 68 thousand parameters."""
    return [shape for n, m in itertools.pairwise([4, 256, 256, 2]) for shape in ((n, m), (m,))]


def resnet50() -> list[tuple[int, ...]]:
    """ResNet-50: 161 arrays, 25.6 million parameters."""
    convolutions, inputs = [(7, 7, 3, 64)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions += [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            if block == 0:
                convolutions.append((1, 1, inputs, 4 * width))
            inputs = 4 * width
    norms = [(shape[-1],) for shape in convolutions for _ in ("scale", "bias")]
    return [*convolutions, *norms, (2048, 1000), (1000,)]


def gpt2() -> list[tuple[int, ...]]:
    """GPT-2 small: 148 arrays, 124 million parameters."""
    d = 768
    layer = [(d,)] * 4 + [(d, 3 * d), (3 * d,), (d, d), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *layer * 12, (d,), (d,)]


def many() -> list[tuple[int, ...]]:
    """1,000 arrays of 256."""
    return [(256,)] * 1000


TREES = {"DQN": dqn, "1,000 arrays": many, "ResNet-50": resnet50, "GPT-2": gpt2}


FOR_THE_LARGEST_TREE = {
    "the limit: C, all cores",
    "NumPy (no C compiler)",
    "EMATarget.update",
    "EMATarget.update, donate",
    "... compensated, donate",
    "... skip_nonfinite, donate",
    "... 16-bit accumulator, donate",
    "PeriodicTarget.update between syncs",
    "in a jitted train step",
    "by hand in a jitted train step",
    "optax.incremental_update, eager",
    "optax.incremental_update, jit, donated",
    "optax.periodic_update, eager",
    "flax.nnx.EMA in nnx.jit",
    "torch AveragedModel",
    "ema-pytorch",
    "timm ModelEmaV3",
    "diffusers EMAModel",
}


def tree_of(shapes: list[tuple[int, ...]], value: float) -> Tree:
    """Parameters of these shapes."""
    return {f"{i:04d}": jnp.full(shape, value, jnp.float32) for i, shape in enumerate(shapes)}


# The cases


def target_nets_cases(online: Tree, start: Tree) -> Iterator[tuple[str, Case]]:
    """Ours, and the same arithmetic without us."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), online)

    def updating(target: Any, online: Any = online) -> Case:
        return lambda: target.update(online)

    yield "EMATarget.update", updating(EMATarget(start, STEP_SIZE))
    yield "EMATarget.update, donate", updating(EMATarget(start, STEP_SIZE, donate=True))
    schedule = optax.linear_schedule(STEP_SIZE, 0.0, 10**6)
    yield "... with a schedule, donate", updating(EMATarget(start, schedule, donate=True))
    yield "... compensated", updating(EMATarget(start, STEP_SIZE, compensated=True))
    donated = functools.partial(EMATarget, start, STEP_SIZE, donate=True)
    yield "... compensated, donate", updating(donated(compensated=True))
    yield "... skip_nonfinite, donate", updating(donated(skip_nonfinite=True))
    yield "... 16-bit accumulator, donate", updating(donated(accumulator_dtype=jnp.bfloat16))
    held = EMATarget(half, STEP_SIZE, donate=True)
    yield "... bfloat16 online, donate", updating(held, half)
    yield "... its params, cast on reading", lambda: held.params
    periodic = PeriodicTarget(start, 10**9, donate=True)
    yield "PeriodicTarget.sync, donate", lambda: periodic.sync(online)
    waiting = PeriodicTarget(start, 10**9)
    yield "PeriodicTarget.update between syncs", lambda: waiting.update(online).step

    bare = jax.jit(incremental_update)
    yield "the bare jitted rule", carried(lambda slow: bare(online, slow, STEP_SIZE), start)

    optimizer = optax.sgd(1e-6)

    def trained(params: Any, gradients: Any) -> Any:
        updates, _ = optimizer.update(gradients, optimizer.init(params))
        return optax.apply_updates(params, updates)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def with_target(params: Any, target: Any, gradients: Any) -> Any:
        params = trained(params, gradients)
        return params, target.update(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def by_hand(params: Any, slow: Any, gradients: Any) -> Any:
        params = trained(params, gradients)
        return params, jax.tree.map(lambda p, q: q + STEP_SIZE * (p - q), params, slow)

    for name, compensated in (("in a jitted train step", False), ("... compensated", True)):
        target = EMATarget(start, STEP_SIZE, compensated=compensated)
        state = jax.tree.map(jnp.copy, online), target
        yield (
            name.replace("...", "in a jitted train step,"),
            carried(lambda state: with_target(*state, online), state),
        )
    state = jax.tree.map(jnp.copy, (online, start))
    yield "by hand in a jitted train step", carried(lambda state: by_hand(*state, online), state)

    @functools.partial(jax.jit, donate_argnums=0)
    def many_updates(target: Any, online: Any) -> Any:
        return jax.lax.fori_loop(0, UPDATES, lambda _, target: target.update(online), target)

    target = EMATarget(start, STEP_SIZE)
    yield IN_ONE_PROGRAM, carried(lambda target: many_updates(target, online), target)


def carried(step: Callable[[Any], Any], state: Any) -> Case:
    """A step whose result is the next one's argument."""

    def case() -> Any:
        nonlocal state
        state = step(state)
        return state

    return case


def jax_cases(online: Tree, start: Tree) -> Iterator[tuple[str, Case]]:
    """optax and flax."""

    def incremental(function: Any) -> Case:
        slow = jax.tree.map(jnp.copy, start)
        return carried(lambda slow: function(online, slow, STEP_SIZE), slow)

    yield "optax.incremental_update, eager", incremental(optax.incremental_update)
    yield "optax.incremental_update, jit", incremental(jax.jit(optax.incremental_update))
    donated = jax.jit(optax.incremental_update, donate_argnums=1)
    yield "optax.incremental_update, jit, donated", incremental(donated)

    def periodic(function: Any) -> Case:
        return carried(lambda slow: function(online, slow, 1, 100), start)

    yield "optax.periodic_update, eager", periodic(optax.periodic_update)
    yield "optax.periodic_update, jit", periodic(jax.jit(optax.periodic_update))

    variables, slow = (
        nnx.State({name: nnx.Param(x) for name, x in tree.items()}) for tree in (online, start)
    )
    ema = nnx.EMA(slow, decay=1 - STEP_SIZE)

    def nnx_eager() -> Any:
        ema.update(variables)
        return jax.tree.leaves(ema.params)

    update = nnx.jit(lambda ema, variables: ema.update(variables))

    def nnx_jit() -> Any:
        update(ema, variables)
        return jax.tree.leaves(ema.params)

    yield "flax.nnx.EMA, eager", nnx_eager
    yield "flax.nnx.EMA in nnx.jit", nnx_jit


def torch_cases(shapes: list[tuple[int, ...]]) -> Iterator[tuple[str, Case]]:
    """torch and what is built on it, each with its fused loop over all arrays."""
    if not importlib.util.find_spec("torch"):
        return
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    online = torch.nn.ParameterList(torch.nn.Parameter(torch.full(shape, 0.5)) for shape in shapes)
    averaged = AveragedModel(online, multi_avg_fn=get_ema_multi_avg_fn(1 - STEP_SIZE))
    yield "torch AveragedModel", lambda: averaged.update_parameters(online)
    if importlib.util.find_spec("ema_pytorch"):
        from ema_pytorch import EMA

        beta = 1 - STEP_SIZE
        ema = EMA(
            online, beta=beta, min_value=beta, update_after_step=0, update_every=1, use_foreach=True
        )
        yield "ema-pytorch", ema.update
    if timm := importlib.util.find_spec("timm"):
        # Its file by itself: the package would need torchvision, which averaging does not.
        path = Path(timm.submodule_search_locations[0]) / "utils" / "model_ema.py"
        spec = importlib.util.spec_from_file_location("timm_model_ema", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        version3 = module.ModelEmaV3(online, decay=1 - STEP_SIZE)
        yield "timm ModelEmaV3", lambda: version3.update(online)
    if importlib.util.find_spec("diffusers"):
        from diffusers.training_utils import EMAModel

        ema_model = EMAModel(
            online.parameters(), decay=1 - STEP_SIZE, min_decay=1 - STEP_SIZE, foreach=True
        )
        parameters = list(online.parameters())
        yield "diffusers EMAModel", lambda: ema_model.step(parameters)


C = """
void update(float** slow, float** online, long* sizes, int count, float s) {
    #pragma omp parallel if (sizes[0] > 100000)
    for (int k = 0; k < count; k++) {
        float *x = slow[k], *y = online[k];
        #pragma omp for simd nowait
        for (long i = 0; i < sizes[k]; i++) x[i] += s * (y[i] - x[i]);
    }
}
"""


def limit_cases(tree: Tree, start: Tree, folder: Path) -> Iterator[tuple[str, Case]]:
    """The pass in C on all cores; without a compiler the same in NumPy, on one."""
    online, slow = list(tree.values()), [jnp.copy(x) for x in start.values()]
    compiler = shutil.which("cc")
    if compiler is None:
        pairs = [(np.array(x), np.asarray(y)) for x, y in zip(slow, online, strict=True)]

        def in_numpy() -> None:
            for x, y in pairs:
                x += np.float32(STEP_SIZE) * (y - x)

        yield "NumPy (no C compiler)", in_numpy
        return
    (folder / "limit.c").write_text(C)
    options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "limit.c", "-o", "limit.so"], cwd=folder, check=True)
    update = ctypes.CDLL(str(folder / "limit.so")).update
    pointers = ctypes.c_void_p * len(slow)
    arguments = (
        pointers(*[x.unsafe_buffer_pointer() for x in slow]),
        pointers(*[x.unsafe_buffer_pointer() for x in online]),
        (ctypes.c_long * len(slow))(*[x.size for x in slow]),
        ctypes.c_int(len(slow)),
        ctypes.c_float(STEP_SIZE),
    )
    yield "the limit: C, all cores", lambda arrays=(slow, online): update(*arguments)


# Timing


class Compilations(logging.Handler):
    """Counts what jax compiles."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Counts a log record that says so."""
        self.count += record.getMessage().startswith("Compiling")


def first_calls(cases: dict[str, Case]) -> dict[str, dict[str, float]]:
    """Of the first call of each case: its seconds, the compilations, and the memory it peaked at."""
    logger, found = logging.getLogger("jax"), {}
    for name, case in cases.items():
        handler = Compilations()
        logger.addHandler(handler)
        logger.propagate = False
        with jax.log_compiles(True):
            start = time.perf_counter()
            jax.block_until_ready(case())
            seconds = time.perf_counter() - start
        logger.removeHandler(handler)
        found[name] = {"first": seconds, "compilations": handler.count}
        before = memory("VmRSS")
        if before is not None:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
            jax.block_until_ready(case())
            found[name]["peak"] = memory("VmHWM") - before
    return found


def memory(key: str) -> float | None:
    """Bytes of memory of this process, where Linux tells."""
    status = Path("/proc/self/status")
    if not status.exists() or not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    lines = (line.split() for line in status.read_text().splitlines())
    return next(1024.0 * float(line[1]) for line in lines if line[0] == f"{key}:")


def medians(cases: dict[str, Case], rounds: int, name: str) -> dict[str, float]:
    """Seconds of a call of each case, all of them in turn, in another order each round."""
    calls = {case: 1 + int(0.02 / timed(call, 9)) for case, call in cases.items()}
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for _ in tqdm(range(rounds), name, leave=False):
        for case in random.sample(list(cases), len(cases)):
            seconds[case].append(timed(cases[case], calls[case]))
    updates = {IN_ONE_PROGRAM: UPDATES}
    return {case: statistics.median(each) / updates.get(case, 1) for case, each in seconds.items()}


def timed(call: Case, calls: int) -> float:
    """Seconds of one of so many calls."""
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def table(tree: str, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Prints what each case costs on a tree."""
    shapes = TREES[tree]()
    count = sum(int(np.prod(shape)) for shape in shapes)
    online, start = tree_of(shapes, 1.0), tree_of(shapes, 0.5)
    all_cases = itertools.chain(
        limit_cases(online, start, folder),
        target_nets_cases(online, start),
        jax_cases(online, start),
        torch_cases(shapes),
    )
    # Each case holds a slow copy or more. All those of the largest tree would need 24 GB.
    cases = {name: case for name, case in all_cases if count < 1e8 or name in FOR_THE_LARGEST_TREE}
    found = first_calls(cases)
    for name, seconds in medians(cases, rounds, tree).items():
        found[name]["seconds"] = seconds
    unit = found["EMATarget.update"]["seconds"]
    print(f"\n{tree}: {len(shapes)} arrays, {count / 1e6:.3g} million parameters")
    print(f"{'':40s}{'us a call':>12s}{'x':>8s}{'GB/s':>8s}{'peak MB':>9s}{'first s':>9s}  compilations")
    for name, each in found.items():
        speed = f"{12 * count / each['seconds'] / 1e9:.1f}"
        print(
            f"{name:40s}{each['seconds'] * 1e6:12.1f}{each['seconds'] / unit:8.2f}{speed:>8s}"
            f"{each.get('peak', np.nan) / 1e6:9.0f}{each['first']:9.2f}{each['compilations']:6.0f}"
        )
    return found


def growth(rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of an update by the number of arrays of 256, called from Python and inside a program."""
    found: dict[str, dict[int, float]] = {"called from Python": {}, "inside a program": {}}
    for count in (1, 3, 10, 30, 100, 300, 1000):
        online, start = (tree_of([(256,)] * count, value) for value in (1.0, 0.5))
        all_cases = dict(target_nets_cases(online, start))
        names = "EMATarget.update, donate", IN_ONE_PROGRAM
        cases = {name: all_cases[name] for name in names}
        for case in cases.values():
            case()
        seconds = medians(cases, rounds, f"{count} arrays")
        for line, name in zip(found, names, strict=True):
            found[line][count] = seconds[name]
    return found


BARS = {
    "the limit: C, all cores": "the pass in C",
    "EMATarget.update, donate": "EMATarget, donate",
    "... 16-bit accumulator, donate": "..., 16-bit accumulator",
    "... compensated, donate": "..., compensated",
    "EMATarget.update": "EMATarget",
    "optax.incremental_update, jit, donated": "optax, jit, donated",
    "flax.nnx.EMA in nnx.jit": "flax.nnx.EMA in nnx.jit",
    "torch AveragedModel": "torch AveragedModel",
    "timm ModelEmaV3": "timm ModelEmaV3",
    "ema-pytorch": "ema-pytorch",
    "diffusers EMAModel": "diffusers EMAModel",
}


def draw(cases: dict[str, dict[str, float]], grown: dict[str, dict[int, float]]) -> None:
    """Draws an update of a large tree beside the limit, and how the cost grows with the arrays."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    shown = {name: label for name, label in reversed(BARS.items()) if name in cases}
    limit = cases["the limit: C, all cores"]["seconds"]
    ratios = [cases[name]["seconds"] / limit for name in shown]
    colors = [LIMIT if "C," in n else OURS if n.startswith(("EMA", "...")) else PEERS for n in shown]
    bars = left.barh(list(shown.values()), ratios, color=colors)
    left.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=6)
    left.axvline(1, color=LIMIT, linestyle="--", linewidth=1, zorder=0)
    left.set(title="124 million parameters: the memory is the limit", xlabel="time, in passes of C")
    left.margins(x=0.12)
    for (name, line), style in zip(grown.items(), ("o-", "o--"), strict=True):
        right.loglog(line.keys(), [1e6 * seconds for seconds in line.values()], style, color=OURS)
        count, seconds = list(line.items())[-1]
        right.annotate(name, (count, 1e6 * seconds), (-8, -4), textcoords="offset points", ha="right")
    right.set(title="Many small arrays cost a call, not an update", xlabel="arrays of 256 parameters")
    right.set_ylabel("microseconds an update")
    right.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES), help="which (all)")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    args = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    for name in ("torch", "ema_pytorch", "timm", "diffusers"):
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
        else:
            print(f"skipped: {name} (not installed)")
    machine = f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(machine, ", ".join(f"{name} {version}" for name, version in versions.items()), sep="\n")
    spawn = multiprocessing.get_context("spawn")  # a process for each tree, with all of the memory
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool,
    ):
        tables = {
            tree: pool.submit(table, tree, 40 if tree == "DQN" else 15, Path(folder)).result()
            for tree in args.trees
        }
    found: dict[str, Any] = {"machine": machine, "versions": versions, "tables": tables}
    if args.trees == list(TREES):
        found["growth"] = growth(7)
        draw(tables["GPT-2"], found["growth"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
