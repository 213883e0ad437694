"""Draws the pictures that compare runs, or need none, into examples/figures/.

    python examples/pictures.py schedules
    python examples/pictures.py dqn RUNS      # RUNS/dqn-{ema,periodic,none}-{0..9}
    python examples/pictures.py byol RUNS     # RUNS/byol-DECAY[-no-predictor]-{0..2}

The README beside this file says which commands make the runs.
"""

import argparse
from pathlib import Path
from typing import Any

import byol
import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from dqn import NAMES
from flax import serialization

from target_nets import schedules

FIGURES = Path(__file__).parent / "figures"


def draw_dqn(runs: Path) -> None:
    """Returns and predicted values of ten seeds with each target: median and quartiles."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(common.WIDTH, 4))
    steps = np.arange(256, 20_001, 256)
    for target, color in zip(NAMES, (common.OURS, common.COPY, common.ONLINE), strict=True):
        histories = []
        for seed in range(10):
            path = runs / f"dqn-{target}-{seed}" / "checkpoint.msgpack"
            histories.append(serialization.msgpack_restore(path.read_bytes())["history"])
        for axis, name in ((left, "scores"), (right, "values")):
            # A run that was solved stopped there, and keeps its last policy.
            curves = [np.interp(steps, *history[name].T) for history in histories]
            low, median, high = np.quantile(curves, (0.25, 0.5, 0.75), axis=0)
            axis.plot(steps, median, color=color, label=NAMES[target])
            axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    left.axhline(475, color=common.LIMIT, linestyle="--")
    left.annotate("solved: 475", (20_000, 470), ha="right", va="top")
    left.set(xlabel="environment steps", ylabel="return of the greedy policy", ylim=(0, 515))
    left.set_title("It learns only with a target network")
    right.axhline(100, color=common.LIMIT, linestyle="--")
    right.annotate("the largest there can be: 100", (20_000, 120), ha="right", va="bottom")
    right.set(xlabel="environment steps", ylabel="mean predicted value", yscale="log")
    right.set_title("Without one, its values run away")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("DQN on CartPole: median and quartiles of 10 seeds")
    figure.savefig(FIGURES / "dqn.png")


# Top-1 accuracy on ImageNet by the target's base decay, Grill et al. 2020, Table 5a.
TABLE_5A = {"1": 18.8, "0.999": 69.8, "0.99": 72.5, "0.9": 68.4, "0": 0.3}


def probe(folder: Path, seed: int, decay: str, predictor: bool) -> tuple[float, float]:
    """Accuracy of the target's features, 10 labels a class, and the spread of the projections."""
    run = byol.Run(seed, 200, float(decay), predictor)
    run.restore(folder / "checkpoint.msgpack")
    projections = byol.features(run.byol.student.branch, run.images["test"])[1]
    return byol.probe(run.features(run.byol.slow()), run.labels)[0], byol.spread(projections)


def draw_byol(runs: Path) -> None:
    """What the speed of the target changes: each of three seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(common.WIDTH, 3.4), sharey=True)
    print("| base decay of the target | BYOL | spread | without the predictor | spread | paper |")
    rows: dict[str, list[str]] = {decay: [] for decay in TABLE_5A}
    for axis, predictor in zip(axes, (True, False), strict=True):
        for place, decay in enumerate(TABLE_5A):
            name = f"byol-{decay}{'' if predictor else '-no-predictor'}"
            few, spread = np.transpose(
                [probe(runs / f"{name}-{seed}", seed, decay, predictor) for seed in range(3)]
            )
            axis.plot([place] * 3, few, "o", color=common.ONLINE if decay == "0" else common.OURS)
            rows[decay].append(f"{few.mean():.1f} % ({few.min():.1f} to {few.max():.1f})")
            rows[decay].append(f"{spread.min():.2f} to {spread.max():.2f}")
        axis.set_xticks(range(5), ["1\nfrozen", "0.999", "0.99", "0.9", "0\nno target"])
        axis.set(xlabel="base decay of the target", ylim=(80, 100))
    for decay, cells in rows.items():
        print(f"| {decay} | {' | '.join(cells)} | {TABLE_5A[decay]} % |")
    axes[0].set(ylabel="accuracy of a probe with\n10 labels a class, %", title="With the predictor")
    axes[1].set(title="Without it, a fast target collapses")
    figure.suptitle("BYOL: a faster target is better, if there is a predictor (3 seeds)")
    figure.savefig(FIGURES / "byol-ablation.png")


TOTAL = 1000
SCHEDULES: dict[str, Any] = {
    "0.005, constant": lambda n: jnp.full(jnp.shape(n), 0.005),
    "cosine(0.02, 1000)": schedules.cosine(0.02, TOTAL),
    "inverse_power()": schedules.inverse_power(),
    "ramp(0.01)": schedules.ramp(0.01),
    "uniform()": schedules.uniform(),
    "bias_corrected(0.005)": schedules.bias_corrected(0.005),
    "power_function(sigma_rel=0.1)": schedules.power_function(sigma_rel=0.1),
}


def draw_schedules(_: Path) -> None:
    """Step sizes, and the weight that each schedule gives to past iterates."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(common.WIDTH, 4.2))
    n = np.arange(TOTAL)
    for (name, schedule), style in zip(SCHEDULES.items(), ["-", "--"] * 4, strict=False):
        step_sizes = np.asarray(jax.vmap(schedule)(jnp.arange(TOTAL)), np.float64)
        left.loglog(n + 1, np.maximum(step_sizes, 1e-12), style, label=name)
        # What an iterate counts for is its own step size, times what all later ones leave of it.
        own, since = np.append(1.0, step_sizes), np.cumprod((1 - step_sizes)[::-1])[::-1]
        weight = own * np.append(since, 1.0)
        np.testing.assert_allclose(weight.sum(), 1, rtol=1e-5)
        right.plot(n + 1, 1000 * weight[1:], style)
    left.set(xlabel="averaging, n + 1", ylabel="step size", ylim=(1e-4, 1.3))
    left.set_title("How far an averaging moves the average")
    right.set(xlabel="iterate", ylabel="weight, in thousandths", ylim=(0, 10))
    right.set_title("What the average after 1,000 consists of")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(FIGURES / "schedules.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pictures = {"schedules": draw_schedules, "dqn": draw_dqn, "byol": draw_byol}
    parser.add_argument("picture", choices=pictures)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="folder of the runs")
    args = parser.parse_args()
    pictures[args.picture](args.runs)


if __name__ == "__main__":
    main()
