"""Draws examples/figures/dqn.png: three runs of examples/dqn.py that differ in their target network.

for target in ema periodic none; do python examples/dqn.py --target $target; done
python examples/figures/dqn.py
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from flax import serialization

NAMES = {"ema": "moving average", "periodic": "periodic copy", "none": "no target network"}


def main(runs: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for target, name in NAMES.items():
        checkpoint = runs / f"dqn-{target}-0" / "checkpoint.msgpack"
        saved = serialization.msgpack_restore(checkpoint.read_bytes())
        left.plot(*saved["scores"].T, label=name)
        right.plot(*saved["values"].T, label=name)
    left.set(xlabel="environment steps", ylabel="return of the greedy policy", xlim=(0, 10_000))
    right.set(xlabel="environment steps", ylabel="mean predicted value", xlim=(0, 10_000), yscale="log")
    right.axhline(100, color="0.5", linestyle="--", linewidth=1)
    right.text(
        9_900, 60, "the largest there can be", ha="right", va="top", fontsize="small", color="0.3"
    )
    left.legend()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["runs"]))
