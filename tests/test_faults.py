"""Whatever fails at any moment, the target is as before or after the update, and the run goes on."""

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
from helpers.comparisons import bits
from helpers.faults import run_with_action_at
from helpers.targets import EVERYTHING, MAKERS, make_makers

from target_nets import EMATarget, PeriodicTarget

ZEROS = {"w": np.zeros(3, np.float32), "h": np.zeros(2, jnp.bfloat16), "n": np.int32(0)}
TARGETS: dict[str, Callable[[Any], Any]] = {
    **{kind: MAKERS[kind] for kind in ("ema", "ema, schedule", "ema, period", "ema, everything")},
    "periodic": make_makers(period=1)["periodic"],
    "periodic, between periods": make_makers(period=4)["periodic"],
}


def online(k: int) -> dict[str, Any]:
    return {
        "w": np.float32(k) + np.arange(3, dtype=np.float32),
        "h": np.full(2, 0.3 * k, jnp.bfloat16),
        "n": np.int32(k),
    }


# Ctrl-C


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupt_at(call: Callable[[], Any], moment: int) -> bool:
    """Presses Ctrl-C before a line of the package; returns whether the call has so many lines."""
    try:
        return run_with_action_at(call, interrupt, moment, "line")[1]
    except KeyboardInterrupt:
        return True


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("method", ["update", "sync"])
def test_ctrl_c_at_any_line_leaves_the_state_before_or_after_the_update(kind: str, method: str) -> None:
    def make_target() -> Any:
        return TARGETS[kind](ZEROS).update(online(1)).update(online(2))

    before, after = make_target(), getattr(make_target(), method)(online(3))
    states = {bits(target): bits(target.update(online(4))) for target in (before, after)}
    seen = set()
    for moment in itertools.count():
        target = make_target()
        if not interrupt_at(partial(getattr(target, method), online(3)), moment):
            break
        seen.add(bits(target))
        assert states[bits(target)] == bits(target.update(online(4)))
    assert seen == states.keys()


# Each is traced again at every moment: of another shape, or with another schedule.
TRACED_AGAIN: dict[str, Callable[[int], Any]] = {
    "ema": lambda moment: EMATarget(np.zeros(7 + moment, np.float32), 0.3),
    "ema, everything": lambda moment: EMATarget(ZEROS["h"], lambda n: 0.3, **EVERYTHING),
    "periodic": lambda moment: PeriodicTarget(np.zeros(7 + moment, np.float32), 1),
}


@pytest.mark.parametrize("kind", TRACED_AGAIN)
def test_ctrl_c_at_any_line_while_tracing_changes_nothing(kind: str) -> None:
    for moment in itertools.count():
        target = TRACED_AGAIN[kind](moment)
        params, before = np.asarray(target.params), bits(target)
        if not interrupt_at(partial(target.update, params), moment):
            break
        step = int(target.step)
        assert step == 1 or bits(target) == before
        if moment % 50 == 0:
            assert target.update(params).step == step + 1
    assert moment > 50  # an update that is compiled has far fewer lines


# Errors inside an update


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
def test_an_update_that_raises_leaves_the_target(case: str, donate: bool) -> None:
    schedule, error = SCHEDULES[case]
    target = EMATarget(ZEROS, schedule, donate=donate, update_period=2, **EVERYTHING)
    target.update(online(1))
    before = bits(target)
    for update in (target.update, partial(jax.jit(lambda t, p: t.update(p)), target)):
        with pytest.raises(error):
            update(online(2))
        assert bits(target) == before
    assert bits(target.sync(online(2))) != before


@pytest.mark.parametrize("kind", TARGETS)
def test_an_update_that_raises_on_the_device_leaves_the_target(kind: str) -> None:
    target = TARGETS[kind](ZEROS).update(online(1)).update(online(2)).update(online(3))
    before, bad = bits(target), {**online(4), "w": np.full(3, np.nan, np.float32)}
    skipping = kind == "ema, everything"  # it counts, and computes no nan
    with jax.debug_nans(True), nullcontext() if skipping else pytest.raises(FloatingPointError):
        target.update(bad)
    assert skipping or bits(target) == before
    assert target.update(online(4)).step == 4 + skipping


def test_a_transfer_that_is_disallowed_leaves_the_target() -> None:
    params = jax.tree.map(jnp.asarray, ZEROS)
    plain, scheduled = (TARGETS[kind](ZEROS).update(params) for kind in ("ema", "ema, schedule"))
    before = bits(scheduled)
    with jax.transfer_guard("disallow"):
        assert plain.update(params).step == 2
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            scheduled.update(params)  # jit transfers n, as any number
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
    "Trains in another process, which is killed unless patience is None; returns its exit code."
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


def test_a_run_that_is_killed_at_any_moment_resumes_bit_for_bit(tmp_path: Path) -> None:
    with ExitStack() as stack:
        processes = []
        for cls in (EMATarget, PeriodicTarget):  # both at once
            (folder := tmp_path / cls.__name__).mkdir()
            command = [sys.executable, "-c", TRAINING, cls.__name__, "6", str(folder)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
        for process in processes:
            printed, _ = process.communicate(timeout=200)
            assert process.returncode == 0
            assert int(printed) > 4  # the run progressed between the kills
