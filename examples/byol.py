"""BYOL on real handwritten digits (Grill et al. 2020): features without labels, from a slow copy.

    python examples/byol.py                  # trains, probes, draws a picture
    python examples/byol.py --decay 0.99     # with a slower target
    python examples/byol.py --no-predictor   # without the student's predictor
    python examples/byol.py --resume         # goes on where Ctrl-C stopped it

Read `BYOL` and `train_step` first: one nnx module owns the student, its optimizer and the target, and
one jitted function trains all three. The student predicts, from one view of an image, what the target
makes of another view. The target is a moving average of the student. The images are scikit-learn's 1,797
digits of 8 x 8 pixels. The labels are used for the probes only.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from target_nets import EMATarget, schedules

SIDE, BATCH = 8, 256


def block(n: int, m: int, rngs: nnx.Rngs) -> list[Any]:
    """A dense layer with BatchNorm and ReLU."""
    dense = nnx.Linear(n, m, use_bias=False, rngs=rngs)
    return [dense, nnx.BatchNorm(m, momentum=0.9, rngs=rngs), nnx.relu]


def head(inputs: int, rngs: nnx.Rngs) -> nnx.Sequential:
    """The projector and the predictor: (..., inputs) to (..., 64)."""
    return nnx.Sequential(*block(inputs, 256, rngs), nnx.Linear(256, 64, rngs=rngs))


class Branch(nnx.Module):
    """Of student and target: images (..., 64) to features (..., 128) to projections (..., 64)."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        layers = *block(64, 256, rngs), *block(256, 256, rngs), *block(256, 128, rngs)
        self.encoder = nnx.Sequential(*layers)
        self.projector = head(128, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.projector(self.encoder(images))


class Student(nnx.Module):
    """The network that is trained: a branch, and a predictor of the target's projections."""

    def __init__(self, predictor: bool, rngs: nnx.Rngs) -> None:
        self.branch = Branch(rngs)
        self.predictor = head(64, rngs) if predictor else jax.nn.identity

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.predictor(self.branch(images))


class BYOL(nnx.Module):
    """All that training changes: student, optimizer and target. So it is also what is saved."""

    def __init__(self, steps: int, decay: float, predictor: bool, seed: int) -> None:
        self.student = Student(predictor, nnx.Rngs(seed))
        self.optimizer = nnx.Optimizer(self.student, adam(steps), wrt=nnx.Param)
        # A decay of 1 is a frozen target, and 0 none. Between, as in the paper, it rises to 1.
        step_size = schedules.cosine(1 - decay, steps) if 0 < decay < 1 else 1 - decay
        self.target = EMATarget(nnx.state(self.student.branch), step_size)

    def slow(self) -> Branch:
        """The target as a network, in train mode: with the statistics of each batch in BatchNorm.

        In eval mode, with running statistics, it taught worse (95.5 against 96.4 % at a step size of
        0.01, seeds 0 to 2), whether these were averaged or copied from the student.
        """
        return nnx.merge(nnx.graphdef(self.student.branch), self.target.params)


@functools.cache  # one object for all runs of a length, so that the train step compiles once
def adam(steps: int) -> optax.GradientTransformation:
    """The optimizer of the student, over so many steps."""
    learning_rate = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps)
    return optax.adamw(learning_rate, weight_decay=1e-4)


def unit(x: jax.Array) -> jax.Array:
    """Vectors (..., d) of length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@nnx.jit
def train_step(byol: BYOL, images: jax.Array, key: jax.Array) -> jax.Array:
    """One step of gradient descent, and one of the target after it; returns the loss."""
    one, other = (views(key, images) for key in jax.random.split(key))
    slow = byol.slow()
    goals = jax.lax.stop_gradient((slow(other), slow(one)))

    def loss(student: Student) -> jax.Array:
        pairs = zip((student(one), student(other)), goals, strict=True)
        return sum(jnp.mean(2 - 2 * jnp.sum(unit(p) * unit(goal), -1)) for p, goal in pairs)

    value, grads = nnx.value_and_grad(loss)(byol.student)
    byol.optimizer.update(byol.student, grads)
    byol.target.update(nnx.state(byol.student.branch))
    return value


def views(key: jax.Array, images: jax.Array) -> jax.Array:
    """Another view of each image (n, 64): turned, sheared, shifted, of other brightness, with noise."""

    def view(key: jax.Array, image: jax.Array) -> jax.Array:
        keys = iter(jax.random.split(key, 8))

        def between(low: float, high: float, shape: tuple[int, ...] = ()) -> jax.Array:
            return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

        angle, shear, scale = between(-0.26, 0.26), between(-0.2, 0.2), between(0.9, 1.1, (2,))
        turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        affine = turn @ jnp.array([[1.0, shear], [0.0, 1.0]]) * scale
        centre = (SIDE - 1) / 2
        grid = jnp.stack(jnp.meshgrid(*[jnp.arange(SIDE) - centre] * 2, indexing="ij"))
        places = jnp.einsum("ij,jkl->ikl", affine, grid) + centre + between(-0.5, 0.5, (2, 1, 1))
        image = map_coordinates(image.reshape(SIDE, SIDE), list(places), order=1)
        image = image ** jnp.exp(between(-0.3, 0.3)) * between(0.8, 1.2)
        return (image + 0.05 * jax.random.normal(next(keys), image.shape)).reshape(-1)

    return jax.vmap(view)(jax.random.split(key, len(images)), images)


# What the features are good for


@nnx.jit
def features(branch: Branch, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The features (n, 128) and the normalised projections (n, 64) of images (n, 64)."""
    branch = nnx.clone(branch)  # nnx.jit would carry the mode out to the caller's
    branch.eval()
    return branch.encoder(images), unit(branch(images))


def probe(
    x: dict[str, np.ndarray], labels: dict[str, np.ndarray], draws: int = 5
) -> tuple[float, float]:
    """Test accuracy (%) of logistic regression on x, with 10 labels a class (a mean) and with all."""

    def accuracy(rows: np.ndarray) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(x["train"][rows], labels["train"][rows])
        return 100 * model.score(x["test"], labels["test"])

    few = []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        classes = (np.flatnonzero(labels["train"] == digit) for digit in range(10))
        few.append(accuracy(np.concatenate([rng.choice(rows, 10, replace=False) for rows in classes])))
    return float(np.mean(few)), accuracy(np.arange(len(labels["train"])))


def spread(projections: jax.Array) -> float:
    """The standard deviation of unit vectors: 0 where all are one, which is a collapse; at most 1."""
    return float(jnp.sqrt(jnp.sum(jnp.var(projections, 0))))


# The run


class Run:
    """A BYOL, its data, and how far it has come. All random numbers come from the seed and the epoch."""

    def __init__(self, seed: int, epochs: int, decay: float = 0.9, predictor: bool = True) -> None:
        self.settings = {"seed": seed, "epochs": epochs, "decay": decay, "predictor": predictor}
        images, labels = load_digits(return_X_y=True)
        train, test, train_labels, test_labels = train_test_split(
            np.float32(images / 16), labels, test_size=450, stratify=labels, random_state=seed
        )
        self.images = {"train": train, "test": test}
        self.labels = {"train": train_labels, "test": test_labels}
        self.byol = BYOL(epochs * (len(train) // BATCH), decay, predictor, seed)
        self.losses: list[float] = []  # of each epoch

    def epoch(self) -> None:
        """Trains on every image once, in batches."""
        images, seed, number = self.images["train"], self.settings["seed"], len(self.losses)
        rows = np.random.default_rng((seed, number)).permutation(len(images))
        batches = rows[: len(rows) // BATCH * BATCH].reshape(-1, BATCH)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), len(batches))
        losses = [train_step(self.byol, images[b], key) for b, key in zip(batches, keys, strict=True)]
        self.losses.append(float(sum(losses) / len(losses)))

    def features(self, branch: Branch) -> dict[str, np.ndarray]:
        """The features of all images."""
        return {name: np.asarray(features(branch, x)[0]) for name, x in self.images.items()}

    def probes(self) -> dict[str, tuple[float, float]]:
        """The accuracies of everything that can be compared."""
        untrained = Branch(nnx.Rngs(self.settings["seed"]))
        inputs = {
            "raw pixels": self.images,
            "untrained encoder": self.features(untrained),
            "online encoder": self.features(self.byol.student.branch),
            "target encoder": self.features(self.byol.slow()),
        }
        return {name: probe(x, self.labels) for name, x in inputs.items()}

    def save(self, path: Path) -> None:
        """Writes model, optimizer and target together."""
        student = nnx.to_pure_dict(nnx.state((self.byol.student, self.byol.optimizer)))
        state = {"student": student, "target": self.byol.target, "losses": np.array(self.losses)}
        common.save(path, self.settings, **state)

    def restore(self, path: Path) -> None:
        """Goes on from what was saved by a run of the same settings."""
        graphdef, state = nnx.split((self.byol.student, self.byol.optimizer))
        with common.restoring(path, self.settings) as saved:
            target = common.restore(self.byol.target, saved["target"])
            nnx.replace_by_pure_dict(state, common.restore(nnx.to_pure_dict(state), saved["student"]))
            losses = saved["losses"].tolist()
        self.byol.student, self.byol.optimizer = nnx.merge(graphdef, state)
        self.byol.target, self.losses = target, losses


@threadpool_limits.wrap(limits=1)
def draw(run: Run, probes: dict[str, tuple[float, float]], path: Path) -> None:
    """The loss, the probes, and the target's features of the test images in two dimensions."""
    figure, axes = plt.subplot_mosaic("lp;tt", figsize=(common.WIDTH, 6.4))
    axes["l"].plot(np.arange(1, len(run.losses) + 1), run.losses, color=common.ONLINE)
    axes["l"].set(xlabel="epoch", ylabel="loss", ylim=(0, None), title="The student learns to predict")
    colors = common.PEERS, common.PEERS, common.ONLINE, common.OURS
    for place, ((few, _), color) in enumerate(zip(probes.values(), colors, strict=True)):
        axes["p"].plot(few, place, "o", color=color)
        axes["p"].annotate(f"{few:.1f}", (few, place), (0, 6), textcoords="offset points", ha="center")
    axes["p"].set_yticks(range(4), list(probes))
    axes["p"].set(xlabel="test accuracy with 10 labels a class, %", xlim=(80, 100), ylim=(3.5, -0.7))
    axes["p"].set_title("... and its features become useful")
    plane = TSNE(init="pca", random_state=0).fit_transform(run.features(run.byol.slow())["test"])
    dots = axes["t"].scatter(*plane.T, c=run.labels["test"], cmap="tab10", s=10)
    axes["t"].legend(*dots.legend_elements(), title="digit", loc="center left", bbox_to_anchor=(1, 0.5))
    axes["t"].set(xticks=[], yticks=[])
    axes["t"].set_title(
        "The target's features keep the ten digits apart, learned without labels (t-SNE)"
    )
    figure.savefig(path)
    plt.close(figure)


def program(args: argparse.Namespace) -> None:
    """Trains, probes the features, and draws."""
    checkpoint = args.out / "checkpoint.msgpack"
    with common.interruptible() as interrupted:
        run = Run(args.seed, args.epochs, args.decay, not args.no_predictor)
        if args.resume:
            run.restore(checkpoint)
        with tqdm(total=args.epochs, unit="epoch", desc="byol", disable=None) as bar:
            bar.update(len(run.losses))
            while len(run.losses) < args.epochs and not interrupted:
                run.epoch()
                bar.set_postfix(loss=f"{run.losses[-1]:.3f}")
                bar.update()
                if len(run.losses) % 20 == 0:
                    run.save(checkpoint)
        run.save(checkpoint)
    probes = run.probes()
    draw(run, probes, args.out / "byol.png")
    print(f"{'test accuracy of a linear probe':34s}10 labels a class   all labels")
    for name, (few, everything) in probes.items():
        print(f"{name:34s}{few:15.1f} %{everything:11.1f} %")
    width = spread(features(run.byol.student.branch, run.images["test"])[1])
    print(f"spread of the projections: {width:.2f} (0 is a collapse, 1 the most)")
    print(f"picture: {args.out / 'byol.png'}")


def main() -> int:
    parser = common.parser(__doc__, out="runs/byol-{seed}")
    parser.add_argument("--epochs", type=common.within(1, 10**6), default=200, help="how long to train")
    parser.add_argument(
        "--decay", type=common.within(0.0, 1.0), default=0.9, help="of the target, at first"
    )
    parser.add_argument("--no-predictor", action="store_true", help="leave out the student's predictor")
    return common.run(parser, program)


if __name__ == "__main__":
    raise SystemExit(main())
