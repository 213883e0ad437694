"""BYOL on real handwritten digits (Grill et al. 2020): features without labels, from a slow copy.

    python examples/byol.py                        # trains, probes, draws a picture
    python examples/byol.py --checkpoint DIR       # saves after each epoch; again: goes on from there
    python examples/byol.py --ablation             # what the target's speed changes (Table 5a)
    python examples/byol.py --posthoc              # one run, averages of any length out of it

Read `BYOL` and `train_step` first: one nnx module owns the student, its optimizer and the target, and
one jitted function trains all three. The student predicts, from one view of an image, what the target
makes of another view; the target is a moving average of the student. The images are scikit-learn's 1,797
digits of 8 x 8 pixels. The labels are used for the probes only.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from dqn import interruptible, within, write
from flax import nnx, serialization
from jax.scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from target_nets import EMATarget, posthoc, schedules

mpl.use("agg")  # needs no screen
import matplotlib.pyplot as plt

SIDE = 8
BATCH = 256
EPOCHS = 200
STEP_SIZE = 0.1  # of the target, at first: 1 - tau_base


# The networks


def block(inputs: int, outputs: int, rngs: nnx.Rngs) -> list[Any]:
    """A dense layer with BatchNorm and ReLU."""
    dense = nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)
    return [dense, nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs), nnx.relu]


def head(inputs: int, rngs: nnx.Rngs) -> nnx.Sequential:
    """The projector and the predictor: (..., inputs) to (..., 64)."""
    return nnx.Sequential(*block(inputs, 256, rngs), nnx.Linear(256, 64, rngs=rngs))


class Branch(nnx.Module):
    """Of student and target: images (..., 64) to features (..., 128) to projections (..., 64)."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        widths = [SIDE * SIDE, 256, 256, 128]
        blocks = [block(n, m, rngs) for n, m in itertools.pairwise(widths)]
        self.encoder = nnx.Sequential(*itertools.chain(*blocks))
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

    def __init__(self, steps: int, step_size: float, predictor: bool, seed: int) -> None:
        self.student = Student(predictor, nnx.Rngs(seed))
        self.optimizer = nnx.Optimizer(self.student, adam(steps), wrt=nnx.Param)
        # 0 is a frozen target, and 1 none: they stay so. Between, as in the paper, it slows down to 0.
        schedule = schedules.cosine(step_size, steps) if 0 < step_size < 1 else step_size
        self.target = EMATarget(nnx.state(self.student.branch), schedule)
        self.averages = nnx.List([])  # of the student, to look at only; see `sweep`

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
    for average in (byol.target, *byol.averages):
        average.update(nnx.state(byol.student.branch))
    return value


def unit(x: jax.Array) -> jax.Array:
    """Vectors (..., d) of length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


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


def probe(x: dict[str, Any], labels: dict[str, np.ndarray], draws: int = 5) -> tuple[float, float]:
    """Test accuracy (%) of logistic regression on x, with 10 labels a class (a mean) and with all."""

    def accuracy(rows: np.ndarray) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(np.asarray(x["train"])[rows], labels["train"][rows])
        return 100 * float(model.score(np.asarray(x["test"]), labels["test"]))

    few = []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        classes = (np.flatnonzero(labels["train"] == digit) for digit in range(10))
        few.append(accuracy(np.concatenate([rng.choice(rows, 10, replace=False) for rows in classes])))
    return float(np.mean(few)), accuracy(np.arange(len(labels["train"])))


def spread(projections: jax.Array) -> tuple[float, float]:
    """How far a collapse is: the spread of unit vectors (0 where all are one), and their rank.

    The rank is the exponential of the entropy of the singular values (Roy and Vetterli 2007).
    """
    centred = projections - jnp.mean(projections, 0)
    values = jnp.linalg.svd(centred, compute_uv=False)
    p = values / jnp.sum(values)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(p), 0))
    return float(jnp.sqrt(jnp.mean(jnp.sum(centred**2, -1)))), float(jnp.exp(entropy))


# The run


class Run:
    """A BYOL, its data, and how far it has come. All random numbers come from the seed and the epoch."""

    def __init__(
        self, seed: int, epochs: int, step_size: float = STEP_SIZE, predictor: bool = True
    ) -> None:
        self.settings = {"seed": seed, "epochs": epochs, "step_size": step_size, "predictor": predictor}
        digits = load_digits()
        train, test, train_labels, test_labels = train_test_split(
            digits.data.astype(np.float32) / 16,
            digits.target,
            test_size=450,
            stratify=digits.target,
            random_state=seed,
        )
        self.images = {"train": train, "test": test}
        self.labels = {"train": train_labels, "test": test_labels}
        self.byol = BYOL(epochs * (len(train) // BATCH), step_size, predictor, seed)
        self.losses: list[float] = []  # of each epoch

    def epoch(self) -> None:
        """Trains on every image once, in batches."""
        number = len(self.losses)
        images, seed = self.images["train"], self.settings["seed"]
        rows = np.random.default_rng((seed, number)).permutation(len(images))
        batches = rows[: len(rows) // BATCH * BATCH].reshape(-1, BATCH)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), len(batches))
        losses = [train_step(self.byol, images[b], key) for b, key in zip(batches, keys, strict=True)]
        self.losses.append(float(sum(losses) / len(losses)))

    def features(self, branch: Branch) -> dict[str, jax.Array]:
        """The features of all images."""
        return {name: features(branch, images)[0] for name, images in self.images.items()}

    def probes(self) -> dict[str, tuple[float, float]]:
        """The accuracies of everything that can be compared."""
        untrained = BYOL(1, 0.0, True, self.settings["seed"]).student.branch
        inputs = {
            "raw pixels": self.images,
            "untrained encoder": self.features(untrained),
            "online encoder": self.features(self.byol.student.branch),
            "target encoder": self.features(self.byol.slow()),
        }
        return {name: probe(x, self.labels) for name, x in inputs.items()}

    def spread(self) -> tuple[float, float]:
        """Spread and rank of the online network's projections of the test images."""
        return spread(features(self.byol.student.branch, self.images["test"])[1])

    def save(self, path: Path) -> None:
        """Writes model, optimizer and target together; the path holds the old state or the new one."""
        student = nnx.to_pure_dict(nnx.state((self.byol.student, self.byol.optimizer)))
        state = {
            "settings": self.settings,
            "losses": np.array(self.losses),
            "student": student,
            "target": self.byol.target,
        }
        write(serialization.to_bytes(state), path)

    def restore(self, path: Path) -> None:
        """Goes on from what was saved by a run of the same settings; a ValueError where it cannot."""
        graphdef, state = nnx.split((self.byol.student, self.byol.optimizer))
        student = nnx.to_pure_dict(state)
        try:
            saved = serialization.msgpack_restore(path.read_bytes())
            if saved["settings"] != self.settings:
                raise ValueError(f"a run with other settings: {saved['settings']}")
            target = serialization.from_state_dict(self.byol.target, saved["target"])
            restored = serialization.from_state_dict(student, saved["student"])
            shapes, expected = (jax.tree.map(jnp.shape, x) for x in (restored, student))
            if shapes != expected:  # of a plain dict flax itself checks none
                raise ValueError("arrays of other shapes")
            losses = [float(loss) for loss in saved["losses"]]
        except Exception as error:  # damaged bytes make decoders stumble in any way
            raise ValueError(f"{path} is no checkpoint of this run: {error}") from None
        nnx.replace_by_pure_dict(state, restored)
        self.byol.student, self.byol.optimizer = nnx.merge(graphdef, state)
        self.byol.target, self.losses = target, losses


def train(run: Run, save: Callable[[], Any] | None = None, name: str = "byol") -> Run:
    """Trains to the end of the settings' epochs, or to a Ctrl-C, saving after each."""
    epochs, done = run.settings["epochs"], len(run.losses)
    with (
        interruptible() as interrupted,
        tqdm(total=epochs, initial=done, unit="epoch", desc=name) as bar,
    ):
        while len(run.losses) < epochs and not interrupted:
            run.epoch()
            if save is not None:
                save()
            bar.set_postfix(loss=f"{run.losses[-1]:.3f}")
            bar.update()
    return run


def draw(run: Run, probes: dict[str, tuple[float, float]], path: Path) -> None:
    """The loss, the probes, and the target's features of the test images in two dimensions."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    left.plot(np.arange(1, len(run.losses) + 1), run.losses)
    left.set(xlabel="epoch", ylabel="loss", title="what is minimised")
    places = np.arange(len(probes))
    for offset, column, label in ((-0.2, 0, "10 labels a class"), (0.2, 1, "all labels")):
        heights = [accuracy[column] for accuracy in probes.values()]
        bars = middle.bar(places + offset, heights, 0.4, label=label)
        middle.bar_label(bars, fmt="%.1f", fontsize=7)
    middle.set_xticks(places, [name.replace(" ", "\n") for name in probes], fontsize=8)
    middle.set(ylabel="test accuracy, %", ylim=(75, 104), title="linear probe")
    middle.legend(fontsize=7, loc="upper left", ncols=2)
    plane = TSNE(init="pca", random_state=0).fit_transform(
        np.asarray(features(run.byol.slow(), run.images["test"])[0])
    )
    dots = right.scatter(*plane.T, c=run.labels["test"], cmap="tab10", s=8)
    right.legend(
        *dots.legend_elements(), fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    right.set(xticks=[], yticks=[], title="the target's features (t-SNE)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# Top-1 accuracy on ImageNet by the target's base decay, Grill et al. 2020, Table 5a.
TABLE_5A = {1.0: 18.8, 0.999: 69.8, 0.99: 72.5, 0.9: 68.4, 0.0: 0.3}


def ablation(seed: int, epochs: int) -> None:
    """Trains with targets of other speeds, with the predictor and without, and prints what comes."""
    rows = []
    for decay in TABLE_5A:
        cells = []
        for predictor in (True, False):
            run = Run(seed, epochs, round(1 - decay, 6), predictor)
            name = f"base decay {decay:g}{'' if predictor else ', no predictor'}"
            train(run, name=name)
            if len(run.losses) < epochs:
                return
            few, _ = probe(run.features(run.byol.slow()), run.labels)
            cells.append((few, *run.spread()))
        rows.append((decay, cells))
    print("\n            |  BYOL                         |  without the predictor        |  paper")
    print("base decay  |  target  spread  rank         |  target  spread  rank         |  ImageNet")
    for decay, cells in rows:
        text = [f"{few:5.1f} %  {width:6.2f}  {rank:4.1f}        " for few, width, rank in cells]
        speed = {1.0: "frozen", 0.0: "absent"}.get(decay, "")
        print(f"{decay:<6g}{speed:6s}|  {text[0]} |  {text[1]} |  {TABLE_5A[decay]:4.1f} %")
    print("target: accuracy of a probe of its features, 10 labels a class")


STORED = [schedules.power_function(sigma_rel=sigma_rel) for sigma_rel in (0.05, 0.1)]
WIDTHS = (0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28)


def sweep(seed: int, epochs: int, out: Path) -> bool:
    """Trains once, storing two averages as it goes; then probes averages of other lengths."""
    run, stored = Run(seed, epochs), []
    start = nnx.state(run.byol.student.branch)
    run.byol.averages.extend(EMATarget(start, length) for length in STORED)
    (out / "snapshots").mkdir(exist_ok=True)

    def load(path: Path) -> Any:
        return serialization.from_bytes(run.byol.averages[0], path.read_bytes()).params

    def store() -> None:
        if (epochs - len(run.losses)) % max(1, epochs // 64):
            return
        for length, average in zip(STORED, run.byol.averages, strict=True):
            path = out / "snapshots" / f"{average.step}-{length.gamma:.2f}.msgpack"
            path.write_bytes(serialization.to_bytes(average))
            stored.append((int(average.step), length.gamma, functools.partial(load, path)))

    train(run, store)
    if len(run.losses) < epochs:
        print(f"stopped after {len(run.losses)} of {epochs} epochs")
        return False

    steps = sorted({step for step, _, _ in stored})
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    print("test accuracy of a linear probe, 10 labels a class, %")
    print(f"{'sigma_rel':16s}" + "".join(f"{width:7g}" for width in WIDTHS))
    for step in sorted({steps[len(steps) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)}):
        accuracy = {}
        for width in WIDTHS:
            try:
                params = posthoc.reconstruct(stored, sigma_rel=width, step=step)
            except ValueError:  # so few snapshots up to this step do not span it
                continue
            branch = nnx.merge(nnx.graphdef(run.byol.student.branch), params)
            accuracy[width], _ = probe(run.features(branch), run.labels, draws=10)
        cells = [f"{accuracy[width]:.1f}" if width in accuracy else "-" for width in WIDTHS]
        print(f"after step {step:5d}" + "".join(f"{cell:>7s}" for cell in cells))
        axes.plot(*zip(*accuracy.items(), strict=True), "o-", markersize=4, label=f"after step {step}")
    for length, name in zip(STORED, ("stored while training", None), strict=True):
        axes.axvline(schedules.sigma_rel_of(length.gamma), color="0.5", ls="--", lw=1, label=name)
    axes.set(xscale="log", xlabel="length of the average, sigma_rel", ylabel="test accuracy, %")
    axes.set_xticks(WIDTHS, [f"{width:g}" for width in WIDTHS], fontsize=8)
    axes.set_title("linear probe, 10 labels a class")
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.savefig(out / "posthoc.png", dpi=120)
    plt.close(figure)
    print(f"picture: {out / 'posthoc.png'}")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="BYOL on handwritten digits.", allow_abbrev=False)
    parser.add_argument(
        "--epochs", type=within(1, 10**6), default=EPOCHS, help=f"how long to train ({EPOCHS})"
    )
    parser.add_argument(
        "--seed", type=within(0, 2**31 - 1), default=0, help="of split, weights and views (0)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the picture (runs)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--checkpoint", type=Path, help="folder to save to, and to go on from")
    what.add_argument("--ablation", action="store_true", help="compare targets of other speeds")
    what.add_argument("--posthoc", action="store_true", help="compare averages of other lengths")
    args = parser.parse_args()
    if args.ablation:
        ablation(args.seed, args.epochs)
        return 0
    for name, folder in (("--out", args.out), ("--checkpoint", args.checkpoint)):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"{name}: {folder} is no folder, and cannot be made one: {error}")
    if args.posthoc:
        return 0 if sweep(args.seed, args.epochs, args.out) else 130
    run, checkpoint = Run(args.seed, args.epochs), None
    if args.checkpoint is not None:
        checkpoint = args.checkpoint / "byol.msgpack"
        if checkpoint.exists():
            try:
                run.restore(checkpoint)
            except ValueError as error:
                parser.error(f"--checkpoint: {error}")
    train(run, checkpoint and functools.partial(run.save, checkpoint))
    if len(run.losses) < args.epochs:
        again = "; the same command goes on from there" if checkpoint else ""
        print(f"stopped after {len(run.losses)} of {args.epochs} epochs{again}")
        return 130
    probes = run.probes()
    width, rank = run.spread()
    print(f"{'test accuracy of a linear probe':34s}10 labels a class   all labels")
    for name, (few, everything) in probes.items():
        print(f"{name:34s}{few:15.1f} %{everything:11.1f} %")
    print(
        f"projections: spread {width:.2f} (0 is collapse, 1 the most), effective rank {rank:.1f} of 64"
    )
    draw(run, probes, args.out / "byol.png")
    print(f"picture: {args.out / 'byol.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
