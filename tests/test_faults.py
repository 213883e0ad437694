"""Whatever fails, at whatever moment, a target is that of one update, and the run goes on from there."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparisons import arrays
from helpers.faults import run_with_action_at

from target_nets import EMATarget, PeriodicTarget

START = {"w": np.zeros(3, np.float32), "h": np.zeros(2, jnp.bfloat16), "n": np.int32(0)}


def online(k: int) -> dict[str, Any]:
    return {
        "w": np.float32(k) + np.arange(3, dtype=np.float32),
        "h": np.full(2, 0.3 * k, jnp.bfloat16),
        "n": np.int32(k),
    }


def half(n: jax.Array) -> jax.Array:
    return 0.5 + 0 * n


EVERYTHING = {"accumulator_dtype": jnp.bfloat16, "compensated": True, "skip_nonfinite": True}
MAKERS: dict[str, Callable[[], Any]] = {
    "ema": lambda: EMATarget(START, 0.3),
    "ema, schedule": lambda: EMATarget(START, half),
    "ema, period": lambda: EMATarget(START, 0.3, update_period=4),
    "ema, everything": lambda: EMATarget(START, jnp.float32(0.3), **EVERYTHING),
    "periodic": lambda: PeriodicTarget(START, 1),
    "periodic, between": lambda: PeriodicTarget(START, 4),
}


def bits(target: Any) -> tuple[bytes, ...]:
    """All that an update changes: parameters, step, skipped and compensation."""
    return tuple(x.tobytes() for x in arrays(target))


# Ctrl-C


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(call: Callable[[], Any], moment: int) -> bool:
    """Calls, with a Ctrl-C before that line of the package; whether there are so many lines."""
    try:
        return run_with_action_at(call, interrupt, moment, "line")[1]
    except KeyboardInterrupt:
        return True


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("method", ["update", "sync"])
def test_ctrl_c_at_any_line_leaves_the_state_of_one_update(kind: str, method: str) -> None:
    def begun() -> Any:
        return MAKERS[kind]().update(online(1)).update(online(2))

    before, after = begun(), getattr(begun(), method)(online(3))
    states = {bits(target): bits(target.update(online(4))) for target in (before, after)}
    seen = set()
    for moment in itertools.count():
        target = begun()
        if not interrupted(partial(getattr(target, method), online(3)), moment):
            break
        seen.add(bits(target))
        assert states[bits(target)] == bits(target.update(online(4)))
    assert seen == states.keys()


TRACED_ANEW: dict[str, Callable[[Any], Any]] = {
    "ema, of another shape": lambda params: EMATarget(params, 0.3),
    "periodic, of another shape": lambda params: PeriodicTarget(params, 1),
    "ema, another schedule": lambda params: EMATarget(START, lambda n: 0.3, **EVERYTHING),
}


@pytest.mark.parametrize("kind", TRACED_ANEW)
def test_ctrl_c_at_any_line_of_the_tracing_changes_nothing(kind: str) -> None:
    for moment in itertools.count():
        params = {"w": np.zeros(7 + moment, np.float32)} if "shape" in kind else START
        target = TRACED_ANEW[kind](params)
        before = bits(target)
        if not interrupted(partial(target.update, params), moment):
            break
        step = int(target.step)
        assert step == 1 or bits(target) == before
        if moment % 50 == 0:
            assert target.update(params).step == step + 1
    assert moment > 50  # lines, many more than of an update that is compiled


# What raises inside of an update


def missing(n: jax.Array) -> jax.Array:
    return jax.ffi.ffi_call("no such kernel", jax.ShapeDtypeStruct((), jnp.float32))(n)


def failing(n: jax.Array) -> jax.Array:
    return n / 0 + [][1]


def exiting(n: jax.Array) -> jax.Array:
    raise SystemExit(f"at {n}")


SCHEDULES: dict[str, tuple[Any, type[BaseException]]] = {
    "an exception of a schedule": (failing, IndexError),
    "an exit": (exiting, SystemExit),
    "a compilation that fails": (missing, jax.errors.JaxRuntimeError),
}


@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.parametrize("donate", [False, True])
def test_whatever_the_compiled_update_raises(case: str, donate: bool) -> None:
    schedule, error = SCHEDULES[case]
    target = EMATarget(START, schedule, donate=donate, update_period=2, **EVERYTHING)
    target.update(online(1))
    before = bits(target)
    for update in (target.update, partial(jax.jit(lambda t, p: t.update(p)), target)):
        with pytest.raises(error):
            update(online(2))
        assert bits(target) == before
    assert bits(target.sync(online(2))) != before


@pytest.mark.parametrize("kind", MAKERS)
def test_an_update_that_raises_on_the_device(kind: str) -> None:
    target = MAKERS[kind]().update(online(1)).update(online(2)).update(online(3))
    before, bad = bits(target), {**online(4), "w": np.full(3, np.nan, np.float32)}
    skipping = kind == "ema, everything"  # nothing but the count moves, and nothing is nan
    with jax.debug_nans(True), nullcontext() if skipping else pytest.raises(FloatingPointError):
        target.update(bad)
    assert skipping or bits(target) == before
    assert target.update(online(4)).step == 4 + skipping


def test_a_transfer_that_is_disallowed() -> None:
    params = jax.tree.map(jnp.asarray, START)
    plain, scheduled = (MAKERS[kind]().update(params) for kind in ("ema", "ema, schedule"))
    before = bits(scheduled)
    with jax.transfer_guard("disallow"):
        assert plain.update(params).step == 2
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            scheduled.update(params)  # of n, as jit does with any number
        assert bits(scheduled) == before
    assert scheduled.update(params).step == 2


# Kill -9

TRAINING = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import serialization
from target_nets import EMATarget, PeriodicTarget

cls, kills, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def fresh():
    params = {"w": jnp.zeros(20_000), "h": jnp.zeros(100, jnp.bfloat16), "key": jax.random.PRNGKey(0)}
    if cls == "EMATarget":
        target = EMATarget(params, lambda n: 1 / (n + 2), compensated=True, skip_nonfinite=True)
    else:
        target = PeriodicTarget(params, 3)
    return {"params": params, "target": target}

@jax.jit
def trained(params):
    key, noise = jax.random.split(params["key"])
    w = 0.9 * params["w"] + jax.random.normal(noise, params["w"].shape)
    return {"w": w, "h": w[:100].astype(jnp.bfloat16), "key": key}

def train(path, steps, ready):
    state = serialization.from_bytes(fresh(), path.read_bytes()) if path.exists() else fresh()
    while state["target"].step < steps:
        params = trained(state["params"])
        state = {"params": params, "target": state["target"].update(params)}
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(serialization.to_bytes(state))
        temporary.replace(path)
        os.write(ready, b"1")
    os._exit(0)

def life(path, steps, patience):
    "Trains in a process of its own, until it is killed; returns whether it was."
    reading, ready = os.pipe()
    pid = os.fork()  # nothing has run on a device here, so that a copy of this process can
    if not pid:
        train(path, steps, ready)
    os.close(ready)
    if patience is not None:
        if random.random() < 0.8:
            os.read(reading, 1)  # the first save after coming back
            time.sleep(random.uniform(0, patience))
        else:
            time.sleep(random.uniform(0, 0.5))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    os.close(reading)
    return os.waitstatus_to_exitcode(status)

warnings.filterwarnings("ignore", "os.fork")
random.seed(0)
killed, whole = folder / "killed", folder / "whole"
for _ in range(kills):
    assert life(killed, 10**9, 0.1) == -signal.SIGKILL
steps = serialization.msgpack_restore(killed.read_bytes())["target"]["step"] + 3
assert life(killed, steps, None) == life(whole, steps, None) == 0
assert killed.read_bytes() == whole.read_bytes()
print(steps)
"""


def test_killed_at_any_moment_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    with ExitStack() as stack:
        processes = []
        for cls in (EMATarget, PeriodicTarget):  # side by side
            (folder := tmp_path / cls.__name__).mkdir()
            command = [sys.executable, "-c", TRAINING, cls.__name__, "13", str(folder)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
        for process in processes:
            printed, _ = process.communicate(timeout=200)
            assert process.returncode == 0
            assert int(printed) > 10  # steps: it came forward between the kills
