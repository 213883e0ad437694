"""How far averages of noisy parameters are from the truth, library by library.

Each averages 256 parameters, a normal mean plus fresh normal noise in every update, over 20/step_size
updates from another start. The truth is the same recursion in float64 NumPy; the error is in units in
the last place of the dtype. torch's libraries, where installed, take one Python call an update, and so
are left out where a run is longer than 250,000 updates.

python tests/benchmarks/precision.py
pip install torch ema-pytorch timm  # optional peers
"""

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from target_nets import EMATarget

PICTURE = Path(__file__).parents[2] / "examples" / "figures" / "precision.png"
PARAMETERS, CHUNK = 256, 5_000
STEP_SIZES = [float(np.float32(s)) for s in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)]  # as float32 holds them
CASES = [("float32", 1.0), ("bfloat16", 1.0), ("float16", 1.0), ("bfloat16", 0.0), ("float16", 0.0)]

# A peer takes the start and the step size, and gives a function that takes the online parameters of many
# updates, row by row, and returns the slow copy.
Run = Callable[[np.ndarray], Any]
Peer = Callable[[np.ndarray, float], Run]


def scanned(
    begin: Callable[[Any, float], Any], step: Callable[..., Any], read: Callable[..., Any]
) -> Peer:
    """A peer in JAX: a scan over the updates."""

    def peer(start: np.ndarray, step_size: float) -> Run:
        slow = begin(jnp.asarray(start), step_size)

        @jax.jit
        def many(slow: Any, onlines: jax.Array) -> Any:
            return jax.lax.scan(lambda slow, x: (step(slow, x, step_size), None), slow, onlines)[0]

        def run(onlines: np.ndarray) -> np.ndarray:
            nonlocal slow
            slow = many(slow, onlines)
            return np.asarray(read(slow))

        return run

    return peer


def target(narrow: bool = False, **settings: Any) -> Peer:
    """An `EMATarget`. A narrow one has an accumulator in the dtype of the parameters."""
    return scanned(
        lambda start, step_size: EMATarget(
            start, step_size, accumulator_dtype=start.dtype if narrow else None, **settings
        ),
        lambda slow, x, _: slow.update(x),
        lambda slow: slow.params,
    )


def nnx_ema() -> Peer:
    """`flax.nnx.EMA`, as its state within the scan."""
    graphdef = None

    def begin(start: jax.Array, step_size: float) -> Any:
        nonlocal graphdef
        graphdef, state = nnx.split(nnx.EMA(nnx.State({"w": nnx.Param(start)}), decay=1 - step_size))
        return state

    def step(state: Any, x: jax.Array, _: float) -> Any:
        ema = nnx.merge(graphdef, state)
        ema.update(nnx.State({"w": nnx.Param(x)}))
        return nnx.state(ema)

    return scanned(begin, step, lambda state: jax.tree.leaves(state)[0])


def torch_peers() -> Iterator[tuple[str, Peer]]:
    """torch's AveragedModel, and with torch ema-pytorch and timm."""
    if not importlib.util.find_spec("torch"):
        print("skipped: torch, ema-pytorch and timm (torch is not installed)")
        return
    import torch
    from torch.optim import swa_utils

    def peer(make: Callable[[Any, float], tuple[Callable[[], Any], Callable[[], Any]]]) -> Peer:
        def begin(start: np.ndarray, step_size: float) -> Run:
            dtype = getattr(torch, start.dtype.name)
            model = torch.nn.Linear(len(start), 1, bias=False, dtype=dtype)
            online = model.weight.data.view(-1)
            online.copy_(torch.tensor(start.astype(np.float32)))
            update, read = make(model, step_size)

            def run(onlines: np.ndarray) -> np.ndarray:
                for row in torch.tensor(onlines.astype(np.float32)).to(dtype):
                    online.copy_(row)
                    update()
                return read().detach().float().numpy().reshape(-1).astype(start.dtype)

            return run

        return begin

    def averaged_model(model: Any, step_size: float) -> Any:
        function = swa_utils.get_ema_multi_avg_fn(1 - step_size)
        slow = swa_utils.AveragedModel(model, multi_avg_fn=function)
        slow.update_parameters(model)  # the first call is a copy
        return lambda: slow.update_parameters(model), lambda: slow.module.weight

    yield "torch AveragedModel", peer(averaged_model)

    if importlib.util.find_spec("ema_pytorch"):
        from ema_pytorch import EMA

        def ema_pytorch(model: Any, step_size: float) -> Any:
            beta = 1 - step_size
            slow = EMA(model, beta=beta, min_value=beta, update_after_step=0, update_every=1)
            slow.update()  # the first call is a copy
            return slow.update, lambda: slow.ema_model.weight

        yield "ema-pytorch", peer(ema_pytorch)
    else:
        print("skipped: ema-pytorch (not installed)")

    if timm := importlib.util.find_spec("timm"):
        # Its file by itself: the package would need torchvision, which averaging does not.
        path = Path(timm.submodule_search_locations[0]) / "utils" / "model_ema.py"
        spec = importlib.util.spec_from_file_location("timm_model_ema", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        def model_ema(model: Any, step_size: float) -> Any:
            slow = module.ModelEmaV3(model, decay=1 - step_size)
            return lambda: slow.update(model), lambda: slow.module.weight

        yield "timm ModelEmaV3", peer(model_ema)
    else:
        print("skipped: timm (not installed)")


JAX_PEERS: dict[str, Peer] = {
    "target_nets": target(),
    "target_nets, compensated": target(compensated=True),
    "target_nets, 16 bits": target(narrow=True),
    "optax.incremental_update": scanned(
        lambda start, _: start,
        lambda slow, x, step_size: optax.incremental_update(x, slow, step_size),
        lambda slow: slow,
    ),
    "flax.nnx.EMA": nnx_ema(),
}


def errors(
    peers: dict[str, Peer], dtype: Any, noise: float, step_size: float, updates: int
) -> dict[str, np.ndarray]:
    """The error of each peer in units in the last place, parameter by parameter."""
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(PARAMETERS)
    start = rng.standard_normal(PARAMETERS).astype(dtype)
    exact = start.astype(np.float64)
    runs = {name: peer(start, step_size) for name, peer in peers.items()}
    slow: dict[str, Any] = {}
    for first in tqdm(range(0, updates, CHUNK), f"{dtype}, {step_size:.0e}", leave=False):
        count = min(CHUNK, updates - first)
        onlines = (mean + noise * rng.standard_normal((count, PARAMETERS))).astype(dtype)
        for row in onlines.astype(np.float64):
            exact += step_size * (row - exact)
        slow = {name: run(onlines) for name, run in runs.items()}
    # The unit in the last place of the exact value: what a dtype of so many bits could tell apart.
    info = ml_dtypes.finfo(dtype)
    unit = float(info.eps) * 2.0 ** np.floor(np.log2(np.maximum(np.abs(exact), float(info.tiny))))
    return {name: np.abs(x.astype(np.float64) - exact) / unit for name, x in slow.items()}


# Blue is ours, and grey are the others.
OURS, PEERS = "#0072B2", "#777777"
STYLES = {
    "target_nets": (OURS, "o-"),
    "target_nets, compensated": (OURS, "s--"),
    "target_nets, 16 bits": (OURS, "^:"),
    "optax.incremental_update": (PEERS, "v-"),
    "flax.nnx.EMA": (PEERS, "D--"),
    "torch AveragedModel": (PEERS, "P-"),
    "ema-pytorch": (PEERS, "X--"),
    "timm ModelEmaV3": (PEERS, "*:"),
}


def draw(medians: dict[str, dict[str, dict[float, float]]]) -> None:
    """Draws the medians against the step size, a panel a dtype."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(medians), figsize=(9, 4.6), sharey=True, layout="constrained")
    lines = {}
    for panel, (dtype, errors) in zip(panels, medians.items(), strict=True):
        for name, line in errors.items():
            color, style = STYLES[name]
            x, y = zip(*line.items(), strict=True)
            (lines[name],) = panel.loglog(x, y, style, color=color, label=name)
        panel.axhline(1, color="#222222", linestyle="--", linewidth=0.8)
        panel.set(title=f"{dtype} parameters", xlabel="step size")
        panel.invert_xaxis()
    panels[0].set_ylabel("error, in units in the last place")
    figure.suptitle("How far an average of noisy parameters is from the exact one")
    handles = [lines[name] for name in STYLES if name in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(PICTURE, dpi=120)


def cost(arrays: int, rounds: int = 11) -> None:
    """What settings cost beside the plain update: eager, 100 million float32 parameters, interleaved."""
    online = [jnp.ones(100_000_000 // arrays) for _ in range(arrays)]
    targets = {
        f"{name}{', donate' if donate else ''}": EMATarget(online, 1e-3, donate=donate, **settings)
        for donate in (False, True)
        for name, settings in (
            ("plain", {}),
            ("compensated", {"compensated": True}),
            ("skip_nonfinite", {"skip_nonfinite": True}),
        )
    }
    seconds: dict[str, list[float]] = {name: [] for name in targets}
    for _ in range(rounds + 2):
        for name, slow in targets.items():
            start = time.perf_counter()
            jax.block_until_ready(jax.tree.leaves(slow.update(online)))
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each[2:]) for name, each in seconds.items()}
    print(f"\n100 million float32 parameters in {arrays} arrays, eager update")
    for name, median in medians.items():
        plain = medians["plain, donate" if name.endswith("donate") else "plain"]
        print(f"{name:26s}{median * 1e3:8.1f} ms{median / plain:8.2f} x plain")


def main() -> None:
    """Prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the larger step sizes, and no picture")
    parser.add_argument("--cost", action="store_true", help="only what the settings cost in time")
    arguments = parser.parse_args()
    if arguments.cost:
        for arrays in (100, 1):
            cost(arrays)
        return
    step_sizes = STEP_SIZES[:2] if arguments.quick else STEP_SIZES
    peers = JAX_PEERS | dict(torch_peers())
    print(f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}")
    medians: dict[str, dict[str, dict[float, float]]] = {}
    for dtype, noise in CASES:
        print(f"\n{dtype}, {'with' if noise else 'without'} noise: median (largest) error in units")
        table: dict[str, dict[float, np.ndarray]] = {name: {} for name in peers}
        for step_size in step_sizes:
            updates = round(20 / step_size)
            if dtype != "float32" and updates > 250_000:
                continue
            taking_part = dict(peers if updates <= 250_000 else JAX_PEERS)
            if dtype == "float32":
                del taking_part["target_nets, 16 bits"]
            for name, error in errors(taking_part, dtype, noise, step_size, updates).items():
                table[name][step_size] = error
        print(f"{'':26s}" + "".join(f"{step_size:>20.0e}" for step_size in step_sizes))
        table = {name: row for name, row in table.items() if row}
        for name, row in table.items():
            cells = (f"{np.median(error):.3g} ({error.max():.3g})" for error in row.values())
            print(f"{name:26s}" + "".join(f"{cell:>20s}" for cell in cells))
        if noise and dtype != "float16":
            medians[dtype] = {
                name: {s: float(np.median(error)) for s, error in row.items()}
                for name, row in table.items()
            }
    if step_sizes == STEP_SIZES:
        draw(medians)


if __name__ == "__main__":
    main()
