"""What an eager update costs beside the bare rule, interleaved in one run; medians.

python tests/benchmarks/overhead.py
"""

import itertools
import platform
import statistics
import time
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from target_nets import EMATarget, PeriodicTarget, rules

ROUNDS, CALLS = 60, 50
WIDTHS = [4, 256, 256, 2]
DQN = {
    f"layer {i}": {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[1])}
    for i, shape in enumerate(itertools.pairwise(WIDTHS))
}
MANY = {str(i): jnp.ones(256) for i in range(1000)}
BFLOAT16 = [jnp.ones((64, 64), jnp.bfloat16) for _ in range(161)]


@jax.jit
def bare(online: object, slow: object, step_size: float) -> object:
    """The same rule as a bare jitted `tree.map`."""
    return jax.tree.map(lambda new, old: rules.average(new, old, step_size), online, slow)


def cases() -> dict[str, tuple[int, Callable[[], object]]]:
    """What is timed, with how many calls in a round."""
    slow = {"bare": DQN, "textbook": DQN}
    textbook = jax.jit(optax.incremental_update)

    def bare_update() -> object:
        slow["bare"] = bare(DQN, slow["bare"], 0.005)
        return slow["bare"]

    def textbook_update() -> object:
        slow["textbook"] = textbook(DQN, slow["textbook"], 0.005)
        return slow["textbook"]

    ema, donated = EMATarget(DQN, 0.005), EMATarget(DQN, 0.005, donate=True)
    scheduled = EMATarget(DQN, optax.linear_schedule(0.1, 0.0, 1000))
    periodic, periodic_many = PeriodicTarget(DQN, 10**9), PeriodicTarget(MANY, 10**9)
    held = EMATarget(BFLOAT16, 0.005)
    nnx_ema = nnx.EMA(nnx.state(_network()), decay=0.995)
    online = nnx.state(_network())
    return {
        "bare jitted rule": (CALLS, bare_update),
        "jitted optax.incremental_update": (CALLS, textbook_update),
        "EMATarget.update": (CALLS, lambda: ema.update(DQN)),
        "EMATarget.update, donate": (CALLS, lambda: donated.update(DQN)),
        "EMATarget.update, schedule": (CALLS, lambda: scheduled.update(DQN)),
        "PeriodicTarget.update between syncs": (CALLS, lambda: periodic.update(DQN).step),
        "... of 1,000 arrays": (CALLS, lambda: periodic_many.update(MANY).step),
        "target.params of 161 bfloat16 arrays": (5, lambda: held.params),
        "eager optax.incremental_update": (5, lambda: optax.incremental_update(DQN, DQN, 0.005)),
        "eager flax.nnx.EMA": (5, lambda: nnx_ema.update(online)),
        "eager optax.periodic_update": (2, lambda: optax.periodic_update(DQN, DQN, 1, 100)),
    }


def _network() -> nnx.Module:
    rngs = nnx.Rngs(0)
    return nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(WIDTHS)])


def main() -> None:
    """Prints the table."""
    timed = cases()
    for _, call in timed.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(ROUNDS):
        for name, (calls, call) in timed.items():
            start = time.perf_counter()
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / calls)
    print(f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}")
    unit = statistics.median(seconds["bare jitted rule"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:40s} {median * 1e6:10.1f} us {median / unit:8.2f} x the bare rule")


if __name__ == "__main__":
    main()
