"""The sharded example measures what it prints, and resumes bit for bit, wherever the slow copy is."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import sharded
from helpers.comparisons import assert_same
from helpers.processes import cpu_environment

PROGRAM = Path(__file__).parent.parent / "examples" / "sharded.py"
FOLDER = "checkpoints"
WHOLE = (2 * 64 * 64 + 2 * 4 * 64 * 256) * 4 / 2**20  # MiB of the parameters


@contextlib.contextmanager
def running(*args: Any) -> Iterator[subprocess.Popen[str]]:
    """Runs the program, and kills it and its processes at the end of the block."""
    command = [sys.executable, "-W", "error", str(PROGRAM), "--width", "64", *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=cpu_environment(), start_new_session=True
    ) as program:
        try:
            yield program
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)


def run(*args: Any) -> str:
    """Returns what the program prints."""
    with running(*args) as program:
        out, errors = program.communicate(timeout=100)
    assert program.returncode == 0, errors
    return out


def saved(out: Path, step: int) -> Any:
    """Returns a checkpoint as NumPy arrays."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        folder = out / FOLDER / str(step) / "default"
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            checkpointer.metadata(folder).item_metadata.tree,
        )
        return checkpointer.restore(folder, restore_args=as_numpy)


@pytest.fixture(scope="module", name="uninterrupted")
def _uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, run("--devices", 4, "--steps", 50, "--out", out)


def test_the_memory_and_communication_of_each_placement(uninterrupted: tuple[Path, str]) -> None:
    out, printed = uninterrupted
    assert (
        f"4 devices, on each {WHOLE / 4:.2f} MiB of params, {WHOLE / 2:.2f} MiB of opt_state" in printed
    )
    row = re.compile(r"^(\w+) +([\d.]+) MiB +([\d.]+) MiB +([\d.]+) MiB +[\d.]+ ms$", re.MULTILINE)
    rows = {name: tuple(map(float, cells)) for name, *cells in row.findall(printed)}
    assert rows == {
        "none": (0, 0, 0),
        "sharded": (round(WHOLE / 4, 2), 0, 0),
        "replicated": (round(WHOLE, 2), 0, round(WHOLE * 3 / 4, 2)),
        "host": (0, round(WHOLE / 4, 2), 0),
    }
    assert re.search(r"after 50 steps: online 0\.\d+, slow copy 0\.\d+", printed)
    assert (out / "sharded.png").stat().st_size > 10_000


def test_a_run_resumed_with_the_slow_copy_elsewhere_equals_an_uninterrupted_one(
    uninterrupted: tuple[Path, str], tmp_path: Path
) -> None:
    out, printed = uninterrupted
    shutil.copytree(out / FOLDER / "25", tmp_path / FOLDER / "25")
    settings = ("--slow", "host", "--resume", "--steps", 50, "--out", tmp_path)
    assert run("--devices", 4, *settings).splitlines()[-1] == printed.splitlines()[-1]
    assert_same(saved(tmp_path, 50), saved(out, 50))
    assert saved(out, 50)["target"]["step"] == 50


def test_two_processes_fall_back_to_an_intact_checkpoint_and_stop_together_at_ctrl_c(
    uninterrupted: tuple[Path, str], tmp_path: Path
) -> None:
    checkpoints = tmp_path / FOLDER
    shutil.copytree(uninterrupted[0] / FOLDER, checkpoints)
    largest = max((checkpoints / "50" / "default").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1  # which Orbax does not notice
    largest.write_bytes(content)
    settings = ("--processes", 2, "--devices", 1, "--resume", "--steps", 10**6, "--out", tmp_path)
    with running(*settings) as program:
        end = time.monotonic() + 90
        while not (checkpoints / "75" / "seal.json").exists() and program.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        os.killpg(program.pid, signal.SIGINT)
        out, errors = program.communicate(timeout=90)
        assert program.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"{checkpoints / '50'} is damaged; going on from step 25" in out
    last = int(re.findall(r"after (\d+) steps: online", out)[0])
    assert last >= 75
    assert saved(tmp_path, last)["target"]["step"] == last
    assert re.search(r"^stopped; to go on: .* --resume$", out, re.MULTILINE)


def test_bad_arguments(
    uninterrupted: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    out = str(uninterrupted[0])
    for args, message in {
        ("--devices", "3"): "--devices: invalid choice: 3",
        ("--slow", "disk"): "--slow: invalid choice: 'disk'",
        ("--width", "64", "--out", out): "holds a run; --resume it",
        ("--out", "nowhere", "--resume"): "--resume: there is no checkpoint",
    }.items():
        monkeypatch.setattr(sys, "argv", ["sharded.py", *args])
        with pytest.raises(SystemExit, match="2"):
            sharded.main()
        assert message in capfd.readouterr().err
    monkeypatch.setattr(sys, "argv", ["sharded.py", "--width", "32", "--out", out, "--resume"])
    with pytest.raises(SystemExit, match=r"50 is of another run, with width 64, not 32$"):
        sharded.main()
    (tmp_path / FOLDER / "25").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["sharded.py", "--out", str(tmp_path), "--resume"])
    with pytest.raises(SystemExit, match=f"^{tmp_path / FOLDER} holds no intact checkpoint$"):
        sharded.main()
