"""Two processes train a sharded model and are killed; one resumes bit for bit on half the devices."""

import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import processes_worker as worker
import pytest
from helpers.comparisons import assert_same
from helpers.processes import cpu_environment

SAVED, LAST = 3, 6  # steps
SECONDS = 60  # whatever still runs then is killed


@contextmanager
def running(folder: Path, *commands: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs workers at once, each with a log, and kills them at the end of the block."""
    program = [sys.executable, "-W", "error", worker.__file__, "--folder", str(folder)]
    workers = []
    try:
        for number, command in enumerate(commands):
            with (folder / f"{number}.log").open("wb") as log:
                workers.append(
                    subprocess.Popen(
                        [*program, *command.split()], stdout=log, stderr=log, env=cpu_environment()
                    )
                )
        yield workers
    finally:
        for process in workers:
            process.kill()
            process.wait()


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


def train_in_two_processes(folder: Path) -> None:
    """Trains until both processes have saved; then both are killed."""
    for _ in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pair = f"--steps {SAVED} --devices 4 --save --processes 2 --port {port} --process "
        with running(folder, pair + "0", pair + "1") as workers:
            end = time.monotonic() + SECONDS
            while all(process.poll() is None for process in workers) and time.monotonic() < end:
                if all((folder / f"saved by {process}").exists() for process in range(2)):
                    return
                time.sleep(0.05)
        if "Failed to add port" not in logs(folder):  # another program took the port: try another one
            break
    pytest.fail(logs(folder))


@pytest.fixture(scope="module", name="held")
def _held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the arrays of each process after a step, by "step, process of processes, devices"."""
    folder = tmp_path_factory.mktemp("processes")
    train_in_two_processes(folder)
    whole, resumed = (
        f"--steps {SAVED} {LAST} --devices 8",
        f"--steps {LAST} --devices 4 --resume {SAVED}",
    )
    with running(folder, whole, resumed) as workers:
        for process in workers:
            assert process.wait(SECONDS) == 0, logs(folder)
    return {path.stem: pickle.loads(path.read_bytes()) for path in folder.glob("*.pickle")}


def test_each_shard_equals_that_of_a_single_process(held: dict[str, Any]) -> None:
    one, first, second = (held[f"{SAVED}, {name}"] for name in ("0 of 1, 8", "0 of 2, 4", "1 of 2, 4"))
    assert first["counts"] == second["counts"] == one["counts"] == (SAVED, SAVED + 1, 1)
    split = [key for key in one["shards"] if one["shards"][key].ndim]
    assert len(split) == 8 * len({path for path, _ in split}) == 8 * 10
    assert not set(split) & set(first["shards"]) & set(second["shards"])
    assert_same(first["shards"] | second["shards"], one["shards"])


def test_a_run_resumed_on_other_devices_equals_an_uninterrupted_one(held: dict[str, Any]) -> None:
    one, resumed = held[f"{LAST}, 0 of 1, 8"], held[f"{LAST}, 0 of 1, 4"]
    assert resumed["counts"] == one["counts"] == (LAST, LAST + 1, 1)
    assert all(x.shape[0] in (4, 8) for x in resumed["shards"].values() if x.ndim)  # a quarter of 16, 32
    assert_same(joined(resumed["shards"]), joined(one["shards"]))


@pytest.mark.parametrize("step", [SAVED, LAST])
def test_the_values_are_those_of_numpy(held: dict[str, Any], step: int) -> None:
    arrays = joined(held[f"{step}, 0 of 1, 8"]["shards"])
    for name, (online, slow, copied) in reference(step).items():
        for path, expected in {
            f"[0]['params']['{name}']": online,
            f"[0]['targets'][0].params['{name}']": slow,
            f"[0]['targets'][1].params['{name}']": copied,
            f"[1].params['{name}']": slow,
        }.items():
            np.testing.assert_array_equal(arrays[path], expected, path)


def reference(steps: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Computes the online parameters, their average and their periodic copy in float64."""
    params = {name: np.float64(x) for name, x in worker.start().items()}
    momentum = {name: np.zeros_like(x) for name, x in params.items()}
    slow = copied = params
    for step in range(1, steps + 1):
        inputs, goals = (np.float64(x) for x in worker.batch(step))
        hidden = np.maximum(inputs @ params["inner"], 0)
        signs = np.sign(hidden @ params["outer"] - goals)
        grads = {
            "inner": inputs.T @ (signs @ params["outer"].T * (hidden > 0)),
            "outer": hidden.T @ signs,
        }
        momentum = {name: momentum[name] + grads[name] for name in params}
        params = {name: params[name] - worker.GRID * np.sign(momentum[name]) for name in params}
        slow = {name: slow[name] + worker.STEP_SIZE * (params[name] - slow[name]) for name in params}
        copied = params if step % worker.PERIOD == 0 else copied
    return {name: (params[name], slow[name], copied[name]) for name in params}


def joined(shards: dict[tuple[str, int], np.ndarray]) -> dict[str, np.ndarray]:
    """Joins the shards of arrays that are split along their first axis."""
    paths = {path for path, _ in shards}
    return {
        path: np.concatenate([np.atleast_1d(shards[key]) for key in sorted(shards) if key[0] == path])
        for path in paths
    }
