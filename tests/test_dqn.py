"""The DQN example learns, stops, resumes bit for bit, and refuses what it cannot use."""

import functools
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import dqn
import numpy as np
import pytest
from flax import serialization
from helpers.faults import full_disk

PROGRAM = Path(__file__).parent.parent / "examples" / "dqn.py"
STEPS = 3 * dqn.BLOCK


def main(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["dqn.py", *map(str, args)])
    return dqn.main()


@pytest.fixture(scope="module", name="uninterrupted")
def _uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that gives the folder of an uninterrupted run with a kind of target."""

    @functools.cache
    def run(target: str) -> Path:
        out = tmp_path_factory.mktemp(target)
        settings = ("--target", target, "--steps", STEPS, "--seed", 3, "--out", out)
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert main(monkeypatch, *settings) == 0
        return out

    return run


@pytest.mark.parametrize("target", ["ema", "periodic", "none"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    target: str,
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = uninterrupted(target)
    settings = ("--target", target, "--seed", 3, "--out", tmp_path)
    main(monkeypatch, *settings, "--steps", 1)  # a whole block
    for steps in (2 * dqn.BLOCK, STEPS) if target == "ema" else (STEPS,):
        main(monkeypatch, *settings, "--resume", "--steps", steps)
    assert content(tmp_path) == content(expected)
    if target != "none":
        saved = serialization.msgpack_restore(content(tmp_path))
        assert saved["agent"]["target"]["step"] == 3 * dqn.GRADIENT_STEPS
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000


def content(out: Path) -> bytes:
    """Returns the checkpoint."""
    return (out / "checkpoint.msgpack").read_bytes()


def test_the_last_line_is_the_mean_return(
    uninterrupted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    out = uninterrupted("ema")
    before = content(out)
    settings = ("--seed", 3, "--steps", STEPS, "--out", out)
    assert main(monkeypatch, *settings, "--resume") == 0  # only the evaluation is left to do
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert re.fullmatch(r"mean return \d+\.\d over 20 episodes \(solved at 475\)", last)
    assert content(out) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "polyak"], "--target: invalid choice: 'polyak'"),
        (["--steps", "0"], "--steps: 0 is not within 1 to 51200"),
        (["--steps", "1e4"], "--steps: invalid int value: '1e4'"),
        (["--seed", "-1"], "--seed: -1 is not within"),
        (["--step", "10"], "unrecognized arguments: --step 10"),
        (["--resume", "--out", "nowhere"], "--resume: there is no checkpoint "),
        (["--out", __file__], "is no folder"),
    ],
)
def test_bad_arguments(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, *args)
    assert message in capfd.readouterr().err


def test_a_run_is_never_overwritten(
    uninterrupted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, "--out", uninterrupted("ema"))
    assert "holds a run; --resume it, or choose another folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "foreign", "another shape", "flipped bit", "text"]
)
def test_a_checkpoint_that_cannot_be_used(
    how: str, uninterrupted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, path = content(uninterrupted("ema")), tmp_path / "checkpoint.msgpack"
    saved = serialization.msgpack_restore(good)
    settings, agent = saved.pop("settings"), saved["agent"]
    agent = {
        **agent,
        "params": {"params": {**agent["params"]["params"], "Dense_0": {"bias": np.ones(3)}}},
    }
    if how == "another shape":
        common.save(path, settings, **{**saved, "agent": agent})
    else:
        bad = {
            "truncated": good[: len(good) // 2],
            "empty": b"",
            "foreign": serialization.to_bytes({"params": {"w": np.ones(3)}}),
            "flipped bit": good[:5000] + bytes([good[5000] ^ 1]) + good[5001:],
            "text": b"no checkpoint",
        }[how]
        path.write_bytes(bad)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=f"^{path} is damaged, or no checkpoint of this program: .*$"):
        main(monkeypatch, "--resume", "--seed", 3, "--out", tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_settings_of_another_run(
    uninterrupted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"is of another run, with seed 3, not 4$"):
        main(monkeypatch, "--resume", "--out", uninterrupted("ema"), "--seed", 4)


def test_ctrl_c_saves_a_checkpoint_and_the_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made when it starts"
    settings = ("--seed", 1, "--target", "none")  # which is never solved
    command = [sys.executable, str(PROGRAM), *map(str, settings), "--out", str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        while not folder.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.3)  # it compiles
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    found = re.search(r"^stopped; to go on: (.*)$", out, re.MULTILINE)
    assert found
    assert shlex.split(found[1]) == [*command, "--resume"]
    saved = serialization.msgpack_restore(content(folder))
    assert not list(folder.glob("*.tmp"))
    steps = len(saved["replay"]["reward"]) + dqn.BLOCK
    main(monkeypatch, *settings, "--resume", "--steps", steps, "--out", folder)
    main(monkeypatch, *settings, "--steps", steps, "--out", tmp_path / "uninterrupted")
    assert content(folder) == content(tmp_path / "uninterrupted")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.msgpack"
    main(monkeypatch, "--steps", dqn.BLOCK, "--out", tmp_path)
    before = path.read_bytes()
    resumed = ("--resume", "--steps", 2 * dqn.BLOCK, "--out", tmp_path)
    with (
        full_disk(len(before) // 2),
        pytest.raises(SystemExit, match=f"^cannot save {path}: .*too large"),
    ):
        main(monkeypatch, *resumed)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    main(monkeypatch, *resumed)
    assert len(serialization.msgpack_restore(path.read_bytes())["replay"]["reward"]) == 2 * dqn.BLOCK
