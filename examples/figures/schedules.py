"""Draws examples/figures/schedules.png: the weight that each schedule gives to past iterates.

python examples/figures/schedules.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from target_nets import schedules

TOTAL = 1000
SCHEDULES = {
    "0.005, constant": lambda n: jnp.full(jnp.shape(n), 0.005),
    "cosine(0.02, 1000)": schedules.cosine(0.02, TOTAL),
    "inverse_power()": schedules.inverse_power(),
    "ramp(0.01)": schedules.ramp(0.01),
    "uniform()": schedules.uniform(),
    "bias_corrected(0.005)": schedules.bias_corrected(0.005),
    "power_function(sigma_rel=0.1)": schedules.power_function(sigma_rel=0.1),
}


def weights(step_sizes: np.ndarray) -> np.ndarray:
    """What the start and each iterate count for in the average after the last: they sum to 1."""
    own = np.append(1.0, step_sizes)
    since = np.append(np.cumprod((1 - step_sizes)[::-1])[::-1], 1.0)
    return own * since


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    n = np.arange(TOTAL)
    for (name, schedule), style in zip(SCHEDULES.items(), ["-", "--"] * 4, strict=False):
        step_sizes = np.asarray(jax.vmap(schedule)(jnp.arange(TOTAL)), np.float64)
        left.loglog(n + 1, np.maximum(step_sizes, 1e-12), style, label=name)
        weight = weights(step_sizes)
        np.testing.assert_allclose(weight.sum(), 1, rtol=1e-5)
        right.plot(n + 1, 1000 * weight[1:], style, label=name)
    left.set(xlabel="averaging, n + 1", ylabel="step size", ylim=(1e-4, 1.3), title="step size")
    right.set(
        xlabel="iterate",
        ylabel="weight, in thousandths",
        ylim=(0, 10),
        title="weight of each iterate in the average after 1,000",
    )
    right.legend(fontsize="x-small")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
