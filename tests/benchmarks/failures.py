"""What quietly goes wrong in slow copies today, library by library: the table at the top of the README.

Each case is a few lines that people write. The program prints the result as it is, or the name of the
error. The column of optax is also that of the average written by hand, since
`optax.incremental_update` is that one line.

python tests/benchmarks/failures.py  # ten seconds
"""

import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx, serialization

import target_nets
from target_nets import EMATarget


class Library(NamedTuple):
    """How one library holds a slow copy of an array, moves it, and gives it back."""

    begin: Callable[[Any, Any], Any]
    update: Callable[[Any, Any, Any], Any]
    read: Callable[[Any], Any]
    periodic: Callable[..., Any] | None


def nnx_update(ema: nnx.EMA, online: Any, _: Any) -> nnx.EMA:
    ema.update(nnx.State({"w": nnx.Param(online)}))
    return ema


LIBRARIES = {
    "by hand, optax": Library(
        lambda online, _: {"w": online},
        lambda slow, online, step_size: optax.incremental_update({"w": online}, slow, step_size),
        lambda slow: slow["w"],
        optax.periodic_update,
    ),
    "flax.nnx.EMA": Library(
        lambda online, step_size: nnx.EMA(nnx.State({"w": nnx.Param(online)}), decay=1 - step_size),
        nnx_update,
        lambda ema: ema.params["w"][...],
        None,
    ),
    "target_nets": Library(
        lambda online, step_size: EMATarget({"w": online}, step_size),
        lambda target, online, _: target.update({"w": online}),
        lambda target: target.params["w"],
        target_nets.periodic_update,
    ),
}


def many(library: Library, old: Any, new: Any, step_size: float, updates: int) -> Any:
    """The slow copy after so many updates towards the same value, in one compiled loop."""
    graphdef, slow = nnx.split(library.begin(old, step_size))

    @jax.jit
    def run(slow: Any, new: Any) -> Any:
        def body(_: Any, slow: Any) -> Any:
            return nnx.split(library.update(nnx.merge(graphdef, slow), new, step_size))[1]

        return jax.lax.fori_loop(0, updates, body, slow)

    return library.read(nnx.merge(graphdef, run(slow, new)))


def once(library: Library, old: Any, new: Any, step_size: Any) -> Any:
    """The slow copy after one update."""
    return library.read(library.update(library.begin(old, step_size), new, step_size))


def bfloat16_steps(library: Library) -> str:
    old, new = jnp.array([1.0, 1.5], jnp.bfloat16)
    return f"{many(library, old, new, 0.005, 10_000):g}"


def float32_drift(library: Library) -> str:
    ends = jnp.float32(1), jnp.float32(1.5)
    told = f"{many(library, *ends, 1e-5, 10_000_000):.4f}"
    if library is not LIBRARIES["target_nets"]:
        return told
    exact = library._replace(
        begin=lambda online, step_size: EMATarget({"w": online}, step_size, compensated=True)
    )
    return f"{told}; with `compensated=True` {many(exact, *ends, 1e-5, 10_000_000):.4f}"


def promotion(library: Library) -> str:
    old, new = jnp.array([1.0, 1.5], jnp.bfloat16)
    return str(once(library, old, new, jnp.float32(0.5)).dtype)


def counter(library: Library) -> str:
    slow = once(library, jnp.array(10), jnp.array(15), 0.1)
    return f"{slow:g}, {slow.dtype}"


def key(library: Library) -> str:
    new = jax.random.key(1)
    return "the new key" if once(library, jax.random.key(0), new, 0.1) == new else "another key"


def broadcast(library: Library) -> str:
    return f"shape {once(library, jnp.zeros((3, 1)), jnp.zeros((1, 3)), 0.1).shape}"


def after_inf(library: Library) -> str:
    return f"{once(library, jnp.array(jnp.inf), jnp.array(1.0), 1.0):g}"


def donated(library: Library) -> str:
    online = jnp.zeros(3)
    slow = library.begin(online, 0.1)
    jax.jit(lambda x: x + 1, donate_argnums=0)(online)  # a train step
    return f"{library.read(slow)}"


def no_period(library: Library) -> str:
    if library.periodic is None:
        return "no such rule"
    slow = library.periodic(jnp.ones(()), jnp.zeros(()), steps=5, update_period=0)
    return "copies each time" if slow == 1 else "never copies"


def other_shapes(library: Library) -> str:
    saved = serialization.to_bytes(library.begin(jnp.zeros(3), 0.1))
    slow = serialization.from_bytes(library.begin(jnp.zeros(5), 0.1), saved)
    return f"shape {library.read(slow).shape}"


CASES = {
    "bfloat16, 10,000 updates at step size 0.005 from 1 to 1.5": bfloat16_steps,
    "float32, 10,000,000 updates at 1e-5 from 1 to 1.5": float32_drift,
    "bfloat16 with a float32 step size": promotion,
    "an integer counter, from 10 to 15": counter,
    "a PRNG key, as in a model with Dropout": key,
    "shapes (3, 1) and (1, 3)": broadcast,
    "a full copy (step size 1) over inf": after_inf,
    "online parameters donated, slow copy read": donated,
    "a period of 0": no_period,
    "a checkpoint of 3 numbers, restored into 5": other_shapes,
}


def outcome(case: Callable[[Library], str], library: Library) -> str:
    try:
        return case(library)
    except Exception as error:
        return type(error).__name__


def main() -> None:
    print(
        f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}", end=", "
    )
    print(f"optax {optax.__version__}, target_nets {target_nets.__version__}\n")
    print("|", " | ".join(["case", *LIBRARIES]), "|")
    print("|---" * (1 + len(LIBRARIES)), "|", sep="")
    for name, case in CASES.items():
        print("|", " | ".join([name, *(outcome(case, x) for x in LIBRARIES.values())]), "|", flush=True)


if __name__ == "__main__":
    main()
