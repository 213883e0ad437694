"""A diffusion model of handwritten digits, and averages of its parameters of any length.

    python examples/diffusion.py             # trains, samples, draws a picture
    python examples/diffusion.py --resume    # goes on where Ctrl-C or --steps stopped it

Read `train_block` first: one jitted scan, whose carry holds two moving averages beside the parameters
that they follow. Snapshots of the two make an average of any other length (Karras et al. 2024, EDM2,
arXiv 2312.02696). The model, its loss and its sampler are those of EDM (Karras et al. 2022, arXiv
2206.00364), for scikit-learn's 1,797 digits of 8 x 8 pixels. Samples are compared with the digits by the
Fréchet distance (Heusel et al. 2017) over the hidden layer of a small classifier.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from target_nets import EMATarget, apply_updates, posthoc, schedules

BATCH = 128
BLOCK = 400  # steps between two checkpoints, and two snapshots of each average
WIDTH = 256  # of the network
OPTIMIZER = optax.adam(1e-3)
STORED = tuple(schedules.power_function(sigma_rel=s) for s in (0.05, 0.1))
LENGTHS = (0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25)  # sigma_rel
SAMPLES = 4_000


# The model


class Denoiser(nn.Module):
    """Noisy images (n, 64), and the standard deviations of their noise (n, 1), to images."""

    @nn.compact
    def __call__(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
        spread = 0.75  # of the pixels
        total = jnp.sqrt(sigma**2 + spread**2)
        angles = jnp.log(sigma) / 4 * 2.0 ** jnp.arange(8)
        noise_level = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        h = nn.Dense(WIDTH)(x / total) + nn.Dense(WIDTH)(noise_level)
        for _ in range(3):
            inner = nn.silu(nn.Dense(WIDTH)(nn.silu(nn.LayerNorm()(h))))
            h += nn.Dense(WIDTH, kernel_init=nn.initializers.zeros)(inner)
        return (spread / total) ** 2 * x + sigma * spread / total * nn.Dense(x.shape[-1])(nn.silu(h))


def loss(params: Any, key: jax.Array, images: jax.Array) -> jax.Array:
    """The squared error of denoised images, weighted so that all noise levels count alike."""
    rows, levels, noise = jax.random.split(key, 3)
    x = jax.random.choice(rows, images, (BATCH,))
    sigma = jnp.exp(1.2 * jax.random.normal(levels, (BATCH, 1)) - 1.2)
    denoised = Denoiser().apply(params, x + sigma * jax.random.normal(noise, x.shape), sigma)
    return jnp.mean((1 / sigma**2 + 1 / 0.75**2) * (denoised - x) ** 2)


@functools.partial(jax.jit, donate_argnums=0)
def train_block(state: dict[str, Any], key: jax.Array, images: jax.Array) -> tuple[Any, jax.Array]:
    """Some steps of gradient descent, each followed by one of both averages; returns the losses."""

    def step(state: dict[str, Any], key: jax.Array) -> tuple[dict[str, Any], jax.Array]:
        value, grads = jax.value_and_grad(loss)(state["params"], key, images)
        updates, opt_state = OPTIMIZER.update(grads, state["opt_state"])
        params = apply_updates(state["params"], updates)
        averages = [average.update(params) for average in state["averages"]]
        return {"params": params, "opt_state": opt_state, "averages": averages}, value

    return jax.lax.scan(step, state, jax.random.split(key, BLOCK))


def initial_state(seed: int) -> dict[str, Any]:
    """All that training changes; so it is also all that a checkpoint holds."""
    params = Denoiser().init(jax.random.key(seed), jnp.zeros((1, 64)), jnp.ones((1, 1)))
    averages = [EMATarget(params, length) for length in STORED]
    return {"params": params, "opt_state": OPTIMIZER.init(params), "averages": averages}


# Samples, and how good they are


@functools.partial(jax.jit, static_argnums=2)
def sample(params: Any, key: jax.Array, number: int) -> jax.Array:
    """Images drawn from the model, by Heun's method in 18 steps from pure noise (EDM, algorithm 1)."""
    ramp = jnp.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18) ** 7
    sigmas = jnp.append(ramp, 0)
    x = sigmas[0] * jax.random.normal(key, (number, 64))

    def slope(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return (x - Denoiser().apply(params, x, jnp.full((number, 1), sigma))) / sigma

    def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, following = pair
        first = slope(x, sigma)
        euler = x + (following - sigma) * first
        return x + (following - sigma) * (first + slope(euler, following)) / 2, None

    x, _ = jax.lax.scan(step, x, (sigmas[:-2], sigmas[1:-1]))
    return x - sigmas[-2] * slope(x, sigmas[-2])


class Judge:
    """The Fréchet distance between samples and the digits, over the features of a classifier."""

    @threadpool_limits.wrap(limits=1)  # the matrices are small: threads would wait for each other
    def __init__(self) -> None:
        digits = load_digits()
        self.images = np.float32(digits.data / 8 - 1)
        self.classifier = MLPClassifier(
            64, alpha=1, learning_rate_init=0.01, tol=1e-3, random_state=0
        ).fit(self.images, digits.target)
        self.real = self.statistics(self.images)

    def statistics(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and covariance of the features of images."""
        weights, biases = self.classifier.coefs_[0], self.classifier.intercepts_[0]
        features = np.maximum(np.float64(images) @ weights + biases, 0)
        return features.mean(0), np.cov(features.T)

    @threadpool_limits.wrap(limits=1)
    def distance(self, images: NDArray[np.float32]) -> float:
        """Between normal distributions of the same means and covariances; 0 is the best."""
        (mean, cov), (real_mean, real_cov) = self.statistics(images), self.real
        root = np.sqrt(np.linalg.eigvals(cov @ real_cov).real.clip(0)).sum()  # of the trace
        return float(((mean - real_mean) ** 2).sum() + np.trace(cov + real_cov) - 2 * root)

    def of_model(self, params: Any, key: jax.Array) -> float:
        """The distance of samples from a model."""
        return self.distance(np.asarray(sample(params, key, SAMPLES)))


# The run


class Run:
    """What has been trained, measured and stored so far. All random numbers come from seed and step."""

    def __init__(self, seed: int, out: Path) -> None:
        self.settings = {"program": "diffusion", "seed": seed}
        self.out = out
        self.key = jax.random.key(seed)
        self.noise = jax.random.fold_in(self.key, 2**31)  # the same for all samples
        self.state = initial_state(seed)
        self.judge = Judge()
        self.curve: list[list[float]] = []  # step, distance of the online model, of the longer average

    @property
    def step(self) -> int:
        """Gradient steps so far."""
        return int(self.state["averages"][0].step)

    def block(self) -> float:
        """Trains for a block of steps, stores both averages, and returns the mean loss."""
        key = jax.random.fold_in(self.key, self.step)
        self.state, losses = train_block(self.state, key, self.judge.images)
        for average, length in zip(self.state["averages"], STORED, strict=True):
            common.save(self.path(self.step, length.gamma), self.settings, params=average.params)
        if self.step % (2 * BLOCK) == 0:
            models = self.state["params"], self.state["averages"][1].params
            distances = (self.judge.of_model(params, self.noise) for params in models)
            self.curve.append([self.step, *distances])
        return float(losses.mean())

    def path(self, step: int, gamma: float) -> Path:
        """Of a snapshot."""
        return self.out / "snapshots" / f"{step}-{gamma:.2f}.msgpack"

    def load(self, step: int, gamma: float) -> Any:
        """The parameters of a snapshot."""
        with common.restoring(self.path(step, gamma), self.settings) as saved:
            return common.restore(self.state["params"], saved["params"])

    def average(self, sigma_rel: float) -> Any:
        """The average of a length, from the snapshots; a ValueError where they do not span it."""
        profiles = [(step, x.gamma) for step in range(BLOCK, self.step + 1, BLOCK) for x in STORED]
        snapshots = [(*profile, functools.partial(self.load, *profile)) for profile in profiles]
        return posthoc.reconstruct(snapshots, sigma_rel=sigma_rel)

    def save(self) -> None:
        """Writes the checkpoint."""
        path = self.out / "checkpoint.msgpack"
        common.save(path, self.settings, state=self.state, curve=np.array(self.curve).reshape(-1, 3))

    def restore(self) -> None:
        """Goes on from the checkpoint."""
        with common.restoring(self.out / "checkpoint.msgpack", self.settings) as saved:
            self.state = common.restore(self.state, saved["state"])
            self.curve = saved["curve"].tolist()


def draw(run: Run, distances: dict[float, float], online: float, path: Path) -> None:
    """Digits and samples; the distance against the length of the average, and while training."""
    best = min(distances, key=lambda length: distances[length])
    models = {"Online parameters": run.state["params"], "Averaged parameters": run.average(best)}
    grids = {"Digits of the data set": run.judge.images}
    grids |= {name: sample(params, run.noise, SAMPLES) for name, params in models.items()}
    figure = plt.figure(figsize=(common.WIDTH, 6.4))
    above, below = figure.subfigures(2, height_ratios=(1, 1.1))
    ratio = online / distances[best]
    above.suptitle(
        f"From the same noise, averaged parameters draw digits {ratio:.1f} times closer to real"
    )
    for axis, (title, images) in zip(above.subplots(1, 3), grids.items(), strict=True):
        digits = np.reshape(images[:30], (5, 6, 8, 8))
        grid = np.pad(digits, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1)
        axis.imshow(grid.transpose(0, 2, 1, 3).reshape(50, 60), cmap="gray_r", vmin=-1, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
    left, right = below.subplots(1, 2)
    left.axhline(online, color=common.ONLINE, label="online parameters")
    left.plot(*zip(*distances.items(), strict=True), "o-", color=common.OURS, label="averages")
    left.set(xlabel="length of the average, sigma_rel (part of the run)")
    left.set_title("By length, chosen after training")
    if run.curve:
        steps, *curves = zip(*run.curve, strict=True)
        right.plot(steps, curves[0], "o-", color=common.ONLINE, label="online parameters")
        right.plot(steps, curves[1], "o-", color=common.OURS, label="average, sigma_rel 0.1")
        right.legend()
    right.set(xlabel="gradient steps", title="While training")
    for axis in (left, right):
        axis.set(ylabel="Fréchet distance to the digits", ylim=(0, None))
    left.legend(loc="center right")
    figure.savefig(path)
    plt.close(figure)


def program(args: argparse.Namespace) -> None:
    """Trains, samples from averages of all lengths, and draws."""
    (args.out / "snapshots").mkdir(exist_ok=True)
    with common.interruptible() as interrupted:
        run = Run(args.seed, args.out)
        if args.resume:
            run.restore()
        with tqdm(total=args.steps, initial=run.step, unit="step", desc="train", disable=None) as bar:
            while run.step < args.steps and not interrupted:
                bar.set_postfix(loss=f"{run.block():.3f}")
                bar.update(BLOCK)
                run.save()
    online, distances = run.judge.of_model(run.state["params"], run.noise), {}
    for length in tqdm(LENGTHS, unit="length", desc="sample", disable=None):
        try:
            distances[length] = run.judge.of_model(run.average(length), run.noise)
        except ValueError:  # a short run has too few snapshots for this length
            continue
    draw(run, distances, online, args.out / "diffusion.png")
    print("sigma_rel" + "".join(f"{length:8g}" for length in distances))
    print("distance " + "".join(f"{distance:8.3f}" for distance in distances.values()))
    print(f"picture: {args.out / 'diffusion.png'}")
    best = min(distances, key=lambda length: distances[length])
    averaged = f"averaged {distances[best]:.3f} (sigma_rel {best:g})"
    print(f"Fréchet distance to the digits: online {online:.3f}, {averaged}")


def main() -> int:
    parser = common.parser(__doc__, out="runs/diffusion-{seed}")
    parser.add_argument(
        "--steps", type=common.within(1, 10**6), default=6_400, help="gradient steps, in blocks of 400"
    )
    return common.run(parser, program)


if __name__ == "__main__":
    raise SystemExit(main())
