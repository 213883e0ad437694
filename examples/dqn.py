"""Deep Q-learning on CartPole-v1 (Mnih et al. 2015), with a target network that is one object.

    python examples/dqn.py                      # the target is a moving average
    python examples/dqn.py --target periodic    # ... a copy, taken every 128 gradient steps
    python examples/dqn.py --target none        # ... the online network itself: Q runs away
    python examples/dqn.py --resume             # goes on where Ctrl-C or --steps stopped it

Read `DQNAgent` first: it owns its target and carries it through the jitted train step. The rest is what
any such program has: a replay buffer, an environment, a progress bar and a checkpoint.
"""

import argparse
import functools
import hashlib
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import serialization
from tqdm import tqdm

from target_nets import EMATarget, PeriodicTarget, apply_updates

mpl.use("agg")  # needs no screen
import matplotlib.pyplot as plt

ENVIRONMENT = "CartPole-v1"
SOLVED = 475  # by gymnasium's definition; the longest episode returns 500
DISCOUNT = 0.99
BATCH = 64
BLOCK = 256  # environment steps between two rounds of learning
GRADIENT_STEPS = 128  # in a round
MAX_STEPS = 50_000  # where the learning rate reaches 0
EXPLORATION = optax.linear_schedule(1.0, 0.04, 4_000)  # epsilon, over environment steps
FORMAT = "target_nets/examples/dqn 1"


# The agent


class QNetwork(nn.Module):
    """Observations (..., 4) to the values of the two actions (..., 2)."""

    @nn.compact
    def __call__(self, observations: jax.Array) -> jax.Array:
        dense = functools.partial(
            nn.Dense, kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        )
        x = observations / jnp.array([2.4, 3.0, 0.21, 3.0])  # the ranges that matter, to about +-1
        x = nn.relu(dense(256)(x))
        x = nn.relu(dense(256)(x))
        return dense(2)(x)


class DQNAgent:
    """A Q-network, its optimizer and its target network."""

    def __init__(self, target: str, seed: int) -> None:
        self.params = QNetwork().init(jax.random.key(seed), jnp.zeros(4))
        learning_rate = optax.linear_schedule(1e-3, 0.0, MAX_STEPS // BLOCK * GRADIENT_STEPS)
        self.target: EMATarget[Any] | PeriodicTarget[Any] | None = None
        epsilon = 1e-8
        if target == "ema":
            self.target, epsilon = EMATarget(self.params, step_size=0.01), 1e-4
        elif target == "periodic":
            self.target = PeriodicTarget(self.params, update_period=128)
        optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(learning_rate, eps=epsilon))
        self.opt_state = optimizer.init(self.params)
        self._train = jax.jit(functools.partial(train, optimizer), donate_argnums=(0, 1, 2))

    def act(self, observations: np.ndarray) -> np.ndarray:
        """The greedy actions (...) at observations (..., 4)."""
        return np.asarray(greedy(self.params, observations))

    def learn(self, batches: dict[str, np.ndarray]) -> float:
        """One gradient step for each of the batches; returns the mean value that they predict."""
        learned = self._train(self.params, self.opt_state, self.target, batches)
        self.params, self.opt_state, self.target, values = learned
        return float(jnp.mean(values))

    def distance(self) -> float:
        """How far the target lags behind."""
        return 0.0 if self.target is None else float(self.target.distance(self.params))


@jax.jit
def greedy(params: Any, observations: jax.Array) -> jax.Array:
    """The actions of highest value."""
    return jnp.argmax(QNetwork().apply(params, observations), axis=-1)


def train(
    optimizer: optax.GradientTransformation, params: Any, opt_state: Any, target: Any, batches: Any
) -> tuple[Any, Any, Any, jax.Array]:
    """A scan over batches, with the target in the carry beside what it follows."""

    def loss(params: Any, slow: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        values = QNetwork().apply(params, batch["observation"])
        chosen = jnp.take_along_axis(values, batch["action"][:, None], axis=1)[:, 0]
        following = jnp.max(QNetwork().apply(slow, batch["following"]), axis=1)
        goal = batch["reward"] + DISCOUNT * jnp.where(batch["terminated"], 0.0, following)
        return jnp.mean(optax.huber_loss(chosen, jax.lax.stop_gradient(goal))), jnp.mean(values)

    def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, opt_state, target = carry
        slow = params if target is None else target.params
        (_, value), grads = jax.value_and_grad(loss, has_aux=True)(params, slow, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = apply_updates(params, updates)
        if target is not None:
            target = target.update(params)
        return (params, opt_state, target), value

    (params, opt_state, target), values = jax.lax.scan(step, (params, opt_state, target), batches)
    return params, opt_state, target, values


# Experience


class Replay:
    """Every transition so far, in arrays that a checkpoint takes as they are."""

    def __init__(self) -> None:
        self.size = 0
        self.arrays = {
            "observation": np.zeros((MAX_STEPS, 4), np.float32),
            "action": np.zeros(MAX_STEPS, np.int32),
            "reward": np.zeros(MAX_STEPS, np.float32),
            "following": np.zeros((MAX_STEPS, 4), np.float32),
            "terminated": np.zeros(MAX_STEPS, bool),
        }

    def add(self, **transition: Any) -> None:
        """Stores one transition."""
        for name, value in transition.items():
            self.arrays[name][self.size] = value
        self.size += 1

    def sample(self, rng: np.random.Generator, batches: int) -> dict[str, np.ndarray]:
        """Batches of transitions drawn uniformly, arrays of shape (batches, BATCH, ...)."""
        rows = rng.integers(self.size, size=(batches, BATCH))
        return {name: array[rows] for name, array in self.arrays.items()}


def evaluate(agent: DQNAgent, rng: np.random.Generator, episodes: int) -> np.ndarray:
    """The returns of the greedy policy over fresh episodes."""
    environments = gym.make_vec(ENVIRONMENT, episodes, vectorization_mode="vector_entry_point")
    observations, _ = environments.reset(seed=int(rng.integers(2**31)))
    returns, running = np.zeros(episodes), np.ones(episodes, bool)
    while running.any():
        observations, rewards, terminated, truncated, _ = environments.step(agent.act(observations))
        returns += rewards * running
        running &= ~(terminated | truncated)
    environments.close()
    return returns


# The run


class Run:
    """All that training changes; so it is also all that a checkpoint holds.

    The random numbers of a block come from the seed and the step it begins at, and the episode that is
    under way is played again from its seed and actions. So a resumed run is the same run.
    """

    def __init__(self, target: str, seed: int, steps: int) -> None:
        self.settings = {"target": target, "seed": seed, "steps": steps}
        self.agent = DQNAgent(target, seed)
        self.replay = Replay()
        self.environment = gym.make(ENVIRONMENT)
        self.solved = False
        self.actions: list[int] = []  # of the episode under way
        self.returns: list[tuple[int, float]] = []  # (step, return) of each episode
        self.values: list[tuple[int, float]] = []  # (step, mean value that the network predicts)
        self.distances: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float]] = []  # of the greedy policy
        self._reset()

    @property
    def step(self) -> int:
        """Environment steps so far."""
        return self.replay.size

    def block(self) -> None:
        """Acts for a block of steps, learns, and looks whether that will do."""
        rng = np.random.default_rng((self.settings["seed"], self.step))
        for _ in range(min(BLOCK, self.settings["steps"] - self.step)):
            explore = rng.random() < EXPLORATION(self.step)
            self._act(int(rng.integers(2)) if explore else int(self.agent.act(self.observation)))
        self.values.append((self.step, self.agent.learn(self.replay.sample(rng, GRADIENT_STEPS))))
        score = evaluate(self.agent, rng, 10).mean()
        self.distances.append((self.step, self.agent.distance()))
        self.scores.append((self.step, float(score)))
        # DQN on CartPole peaks and falls: stop at a peak that holds on other episodes, too.
        self.solved = bool(score >= 490 and evaluate(self.agent, rng, 40).mean() >= 490)

    def _act(self, action: int) -> None:
        following, reward, terminated, truncated, _ = self.environment.step(action)
        self.replay.add(
            observation=self.observation,
            action=action,
            reward=reward,
            following=following,
            terminated=terminated,  # an episode cut short at 500 steps still has a future
        )
        self.observation = following
        self.actions.append(action)
        if terminated or truncated:
            self.returns.append((self.step, float(len(self.actions))))
            self.actions = []
            self._reset()

    def _reset(self) -> None:
        episode = (self.settings["seed"], len(self.returns))
        seed = int(np.random.default_rng(episode).integers(2**31))
        self.observation, _ = self.environment.reset(seed=seed)

    def state(self) -> dict[str, Any]:
        """What is saved: plain containers and arrays."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "params": self.agent.params,
            "opt_state": self.agent.opt_state,
            "target": self.agent.target,
            "replay": {name: array[: self.step] for name, array in self.replay.arrays.items()},
            "solved": self.solved,
            "actions": np.array(self.actions, np.int32),
            "returns": np.array(self.returns).reshape(-1, 2),
            "values": np.array(self.values).reshape(-1, 2),
            "distances": np.array(self.distances).reshape(-1, 2),
            "scores": np.array(self.scores).reshape(-1, 2),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what was saved, into a run of the same settings."""
        # The replay buffer grows, so that its arrays have no shape to be held against.
        for name, array in saved["replay"].items():
            self.replay.arrays[name][: len(array)] = array
            self.replay.size = len(array)
        agent = {name: getattr(self.agent, name) for name in ("params", "opt_state", "target")}
        for name, value in serialization.from_state_dict(
            agent, {key: saved[key] for key in agent}
        ).items():
            setattr(self.agent, name, value)
        self.solved = saved["solved"]
        for name in ("returns", "values", "distances", "scores"):
            setattr(self, name, [(int(step), float(value)) for step, value in saved[name]])
        self._reset()
        self.actions = [int(action) for action in saved["actions"]]
        for action in self.actions:
            self.observation, *_ = self.environment.step(action)


def save(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint."""
    saved = serialization.to_state_dict(state)
    write(serialization.to_bytes({**saved, "checksum": checksum(saved)}), path)


def write(content: bytes, path: Path) -> None:
    """Writes a file so that, whatever happens, the path holds the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk, say: what there is of the new one only takes up room
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"cannot save {path}: {error}; what was saved before is as it was") from None


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; raises ValueError for what is none of this program."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}; train first, without --resume") from None
    try:
        saved = serialization.msgpack_restore(content)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is {saved['format']!r}")
        if saved.pop("checksum") != checksum(saved):
            raise ValueError("its checksum differs")
        Run(**saved["settings"]).restore(saved)
    except Exception as error:  # damaged bytes make decoders stumble in any way
        raise ValueError(f"{path} is damaged or no checkpoint of this program: {error}") from None
    return saved


def checksum(saved: dict[str, Any]) -> str:
    """Of what a checkpoint holds: msgpack itself does not notice a flipped bit."""
    return hashlib.sha256(serialization.msgpack_serialize(saved)).hexdigest()


def draw(run: Run, path: Path) -> None:
    """The learning curve: returns, and how far the target lags behind."""
    figure, (above, below) = plt.subplots(
        2, sharex=True, figsize=(7, 5), height_ratios=(2, 1), layout="constrained"
    )
    if run.returns:
        above.plot(*zip(*run.returns, strict=True), ".", color="0.7", label="training episodes")
    if run.scores:
        above.plot(*zip(*run.scores, strict=True), color="tab:blue", label="greedy policy, mean of 10")
    above.axhline(SOLVED, color="tab:green", linestyle="--", linewidth=1, label=f"solved at {SOLVED}")
    above.set(ylabel="return", ylim=(0, 515))
    above.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize="small")
    figure.suptitle(f"DQN on {ENVIRONMENT}, target: {run.settings['target']}")
    if run.distances:
        below.plot(*zip(*run.distances, strict=True), color="tab:orange")
    below.set(xlabel="environment steps", ylabel="|online - target|", ylim=(0, None))
    figure.savefig(path, dpi=120)
    plt.close(figure)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collects the first Ctrl-C, so that what is under way is finished; a second one is immediate."""
    signals: list[int] = []

    def remember(number: int, _: Any) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, previous)
        tqdm.write("interrupted: finishing what is under way, then saving; Ctrl-C again stops at once")

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, previous)


def learn(run: Run, out: Path, interrupted: list[int]) -> None:
    """Trains until solved, out of steps or interrupted, and saves."""
    steps = run.settings["steps"]
    checkpoint = out / "checkpoint.msgpack"
    with tqdm(total=steps, initial=run.step, unit="step", desc=f"dqn, {run.settings['target']}") as bar:
        for block in itertools.count(1):
            if run.step >= steps or run.solved or interrupted:
                break
            run.block()
            recent = np.mean([value for _, value in run.returns[-20:]] or [0])
            score, value = run.scores[-1][1], run.values[-1][1]
            bar.set_postfix({"return": f"{recent:.0f}", "greedy": f"{score:.0f}", "Q": f"{value:.3g}"})
            bar.update(run.step - bar.n)
            if block % 10 == 0:
                save(run.state(), checkpoint)
        save(run.state(), checkpoint)
    draw(run, out / "learning_curve.png")


def within(low: int, high: int) -> Any:
    """A type of the command line: integers from low to high."""

    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not within {low} to {high}")
        return value

    return integer


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description="Deep Q-learning on CartPole-v1.", allow_abbrev=False)
    parser.add_argument("--target", choices=("ema", "periodic", "none"), help="the target network (ema)")
    parser.add_argument(
        "--steps", type=within(1, MAX_STEPS), help=f"environment steps at most ({MAX_STEPS})"
    )
    parser.add_argument("--seed", type=within(0, 2**31 - 1), help="of everything random (0)")
    parser.add_argument(
        "--out", type=Path, help="folder of checkpoint and picture (runs/dqn-TARGET-SEED)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser, parser.parse_args()


def main() -> int:
    parser, args = arguments()
    settings = {"target": args.target or "ema", "seed": args.seed or 0, "steps": args.steps or MAX_STEPS}
    out = args.out or Path("runs") / f"dqn-{settings['target']}-{settings['seed']}"
    saved = None
    if args.resume:
        try:
            saved = load(out / "checkpoint.msgpack")
        except (OSError, ValueError) as error:
            parser.error(str(error))
        for name in ("target", "seed"):
            if getattr(args, name) not in (None, saved["settings"][name]):
                parser.error(
                    f"--{name}: the checkpoint in {out} has {saved['settings'][name]}; leave it out"
                )
        settings = saved["settings"] | ({"steps": args.steps} if args.steps else {})
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {out} is no folder, and cannot be made one: {error}")
    try:
        with interruptible() as interrupted:
            run = Run(**settings)
            if saved is not None:
                run.restore(saved)
            learn(run, out, interrupted)
    except KeyboardInterrupt:
        print(f"stopped at once; {out} holds what was saved last")
        return 130
    ended = "solved" if run.solved else "interrupted" if interrupted else "ended"
    print(f"{ended} after {run.step} steps; checkpoint and learning curve in {out}")
    if ended == "interrupted" and run.step < settings["steps"]:
        again = [sys.executable, sys.argv[0], "--out", str(out), "--resume"]
        print(f"to go on: {shlex.join(again)}")
        return 130
    returns = evaluate(run.agent, np.random.default_rng((settings["seed"], MAX_STEPS + 1)), 20)
    print(f"mean return {returns.mean():.1f} over {len(returns)} episodes (solved at {SOLVED})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
