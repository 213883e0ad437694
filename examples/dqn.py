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
from pathlib import Path
from typing import Any

import common
import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from target_nets import EMATarget, PeriodicTarget, apply_updates

ENVIRONMENT = "CartPole-v1"
SOLVED = 475  # by gymnasium's definition
DISCOUNT = 0.99
BATCH = 64
BLOCK = 256  # environment steps between two rounds of learning
GRADIENT_STEPS = 128  # in a round
MAX_STEPS = 200 * BLOCK  # where the learning rate reaches 0
EXPLORATION = optax.linear_schedule(1.0, 0.04, 4_000)  # epsilon, over environment steps
ENOUGH = 495  # the mean return at which training stops; the longest episode returns 500
NAMES = {"ema": "a moving average", "periodic": "a periodic copy", "none": "no target network"}


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
    """A Q-network, its optimizer and its target network, in one state that training changes."""

    def __init__(self, target: str, seed: int) -> None:
        params = QNetwork().init(jax.random.key(seed), jnp.zeros(4))
        slow, epsilon = None, 1e-8
        if target == "ema":
            slow, epsilon = EMATarget(params, step_size=0.01), 1e-4
        elif target == "periodic":
            slow = PeriodicTarget(params, update_period=128)
        learning_rate = optax.linear_schedule(1e-3, 0.0, MAX_STEPS // BLOCK * GRADIENT_STEPS)
        optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(learning_rate, eps=epsilon))
        self.state = {"params": params, "opt_state": optimizer.init(params), "target": slow}
        self._train = jax.jit(functools.partial(train, optimizer), donate_argnums=0)

    def learn(self, batches: dict[str, np.ndarray]) -> float:
        """One gradient step for each of the batches; returns the mean value that they predict."""
        self.state, values = self._train(self.state, batches)
        return float(jnp.mean(values))

    def distance(self) -> float:
        """How far the target lags behind."""
        target = self.state["target"]
        return 0.0 if target is None else float(target.distance(self.state["params"]))


def train(optimizer: optax.GradientTransformation, state: Any, batches: Any) -> tuple[Any, jax.Array]:
    """A scan over batches, with the target in the carry beside what it follows."""

    def loss(params: Any, slow: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        values = QNetwork().apply(params, batch["observation"])
        chosen = jnp.take_along_axis(values, batch["action"][:, None], axis=1)[:, 0]
        following = jnp.max(QNetwork().apply(slow, batch["following"]), axis=1)
        goal = batch["reward"] + DISCOUNT * jnp.where(batch["terminated"], 0.0, following)
        return jnp.mean(optax.huber_loss(chosen, jax.lax.stop_gradient(goal))), jnp.mean(values)

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, target = state["params"], state["target"]
        slow = params if target is None else target.params
        (_, value), grads = jax.value_and_grad(loss, has_aux=True)(params, slow, batch)
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        params = apply_updates(params, updates)
        if target is not None:
            target = target.update(params)
        return {"params": params, "opt_state": opt_state, "target": target}, value

    return jax.lax.scan(step, state, batches)


@jax.jit
def greedy(params: Any, observations: jax.Array) -> jax.Array:
    """The actions (...) of highest value at observations (..., 4)."""
    return jnp.argmax(QNetwork().apply(params, observations), axis=-1)


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


def evaluate(params: Any, rng: np.random.Generator, episodes: int) -> np.ndarray:
    """The returns of the greedy policy in fresh episodes."""
    environments = gym.make_vec(ENVIRONMENT, episodes, vectorization_mode="vector_entry_point")
    observations, _ = environments.reset(seed=int(rng.integers(2**31)))
    returns, running = np.zeros(episodes), np.ones(episodes, bool)
    while running.any():
        actions = np.asarray(greedy(params, observations))
        observations, rewards, terminated, truncated, _ = environments.step(actions)
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

    def __init__(self, target: str, seed: int) -> None:
        self.seed = seed
        self.agent = DQNAgent(target, seed)
        self.replay = Replay()
        self.environment = gym.make(ENVIRONMENT)
        self.solved = False
        self.actions: list[int] = []  # of the episode under way
        # Pairs of a step and a number: the return of each episode and, after each block, the greedy
        # policy's mean return, the mean value that the network predicts, the lag of the target.
        self.history: dict[str, list[tuple[int, float]]] = {
            name: [] for name in ("returns", "scores", "values", "distances")
        }
        self._reset()

    step = property(lambda self: self.replay.size, doc="Environment steps so far.")

    def block(self) -> None:
        """Acts for a block of steps, learns, and looks whether that will do."""
        rng = np.random.default_rng((self.seed, self.step))
        for _ in range(BLOCK):
            explore = rng.random() < EXPLORATION(self.step)
            self._act(
                int(rng.integers(2))
                if explore
                else int(greedy(self.agent.state["params"], self.observation))
            )
        value = self.agent.learn(self.replay.sample(rng, GRADIENT_STEPS))
        score = float(evaluate(self.agent.state["params"], rng, 10).mean())
        for name, x in {"values": value, "scores": score, "distances": self.agent.distance()}.items():
            self.history[name].append((self.step, x))
        # DQN on CartPole peaks and falls. Stop at a peak that holds on many other episodes, too.
        self.solved = score >= ENOUGH and bool(
            evaluate(self.agent.state["params"], rng, 200).mean() >= ENOUGH
        )

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
            self.history["returns"].append((self.step, float(len(self.actions))))
            self.actions = []
            self._reset()

    def _reset(self) -> None:
        episode = (self.seed, len(self.history["returns"]))
        seed = int(np.random.default_rng(episode).integers(2**31))
        self.observation, _ = self.environment.reset(seed=seed)

    def state(self) -> dict[str, Any]:
        """What is saved: plain containers and arrays."""
        return {
            "agent": self.agent.state,
            "replay": {name: array[: self.step] for name, array in self.replay.arrays.items()},
            "solved": self.solved,
            "actions": np.array(self.actions, np.int32),
            "history": {name: np.array(x).reshape(-1, 2) for name, x in self.history.items()},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what was saved by a run of the same settings."""
        self.agent.state = common.restore(self.agent.state, saved["agent"])
        for name, array in saved["replay"].items():
            self.replay.arrays[name][: len(array)] = array
            self.replay.size = len(array)
        self.solved = saved["solved"]
        for name, pairs in saved["history"].items():
            self.history[name] = [(int(step), float(value)) for step, value in pairs]
        self._reset()
        self.actions = [int(action) for action in saved["actions"]]
        for action in self.actions:
            self.observation, *_ = self.environment.step(action)


def draw(run: Run, target: str, path: Path) -> None:
    """The learning curve: returns, and how far the target lags behind."""
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(common.WIDTH, 5))
    returns, scores, distances = (
        np.array(run.history[name]).reshape(-1, 2).T for name in ("returns", "scores", "distances")
    )
    color = {"ema": common.OURS, "periodic": common.COPY, "none": common.ONLINE}[target]
    above.plot(*returns, ".", color="0.6", label="training episodes")
    above.plot(*scores, color=color, label="greedy policy, mean of 10 episodes")
    above.axhline(SOLVED, color=common.LIMIT, linestyle="--", label=f"solved at {SOLVED}")
    above.set(ylabel="return", ylim=(0, 515))
    above.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    figure.suptitle(f"DQN on {ENVIRONMENT} with {NAMES[target]}")
    below.plot(*distances, color=color)
    below.set(xlabel="environment steps", ylabel="distance of the\ntarget (L2 norm)", ylim=(0, None))
    figure.savefig(path)
    plt.close(figure)


def program(args: argparse.Namespace) -> None:
    """Trains until solved, out of steps or interrupted; then evaluates."""
    settings = {"program": "dqn", "target": args.target, "seed": args.seed}
    checkpoint = args.out / "checkpoint.msgpack"
    with common.interruptible() as interrupted:
        run = Run(args.target, args.seed)
        if args.resume:
            with common.restoring(checkpoint, settings) as saved:
                run.restore(saved)
        with tqdm(total=args.steps, initial=run.step, unit="step", desc="dqn", disable=None) as bar:
            while run.step < args.steps and not run.solved and not interrupted:
                run.block()
                score, value = (run.history[name][-1][1] for name in ("scores", "values"))
                bar.set_postfix({"return": f"{score:.0f}", "Q": f"{value:.3g}"})
                bar.update(BLOCK)
                if run.step % (10 * BLOCK) == 0:
                    common.save(checkpoint, settings, **run.state())
        common.save(checkpoint, settings, **run.state())
    draw(run, args.target, args.out / "learning_curve.png")
    print(f"{'solved' if run.solved else 'ended'} after {run.step} steps; picture in {args.out}")
    returns = evaluate(run.agent.state["params"], np.random.default_rng((args.seed, MAX_STEPS + 1)), 20)
    print(f"mean return {returns.mean():.1f} over {len(returns)} episodes (solved at {SOLVED})")


def main() -> int:
    parser = common.parser(__doc__, out="runs/dqn-{target}-{seed}")
    parser.add_argument("--target", choices=NAMES, default="ema", help="the target network")
    parser.add_argument(
        "--steps", type=common.within(1, MAX_STEPS), default=MAX_STEPS, help="most environment steps"
    )
    return common.run(parser, program)


if __name__ == "__main__":
    raise SystemExit(main())
