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

import dqn
import jax
import numpy as np
import pytest
from flax import serialization
from helpers.comparisons import arrays, assert_same
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
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected = uninterrupted(target)
    done = dqn.BLOCK
    main(monkeypatch, "--target", target, "--steps", done, "--seed", 3, "--out", tmp_path)
    for steps in (2 * dqn.BLOCK, STEPS) if target == "ema" else (STEPS,):
        main(monkeypatch, "--resume", "--steps", steps, "--out", tmp_path)
        bar = capfd.readouterr().err
        assert f"{done}/{steps}" in bar  # the progress bar starts where the run stopped
        done = steps
    resumed, whole = (dqn.load(path / "checkpoint.msgpack") for path in (tmp_path, expected))
    assert_same(arrays(strip(resumed)), arrays(strip(whole)))
    if target != "none":
        assert resumed["target"]["step"] == 3 * dqn.GRADIENT_STEPS
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000


def strip(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays of a checkpoint."""
    return jax.tree.map(
        np.asarray, {k: v for k, v in saved.items() if k not in ("format", "settings", "solved")}
    )


def test_the_last_line_is_the_mean_return(
    uninterrupted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    out = uninterrupted("ema")
    before = dqn.load(out / "checkpoint.msgpack")
    assert main(monkeypatch, "--resume", "--out", out) == 0  # only the evaluation is left to do
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert re.fullmatch(r"mean return \d+\.\d over 20 episodes \(solved at 475\)", last)
    after = dqn.load(out / "checkpoint.msgpack")
    assert after["settings"] == before["settings"]
    assert_same(strip(after), strip(before))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "polyak"], "--target: invalid choice: 'polyak'"),
        (["--steps", "0"], "--steps: 0 is not within 1 to 50000"),
        (["--steps", "1e4"], "--steps: invalid integer value: '1e4'"),
        (["--seed", "-1"], "--seed: -1 is not within"),
        (["--step", "10"], "unrecognized arguments: --step 10"),
        (["--resume", "--out", "nowhere"], "there is no checkpoint nowhere"),
        (["--out", __file__], "is no folder"),
    ],
)
def test_bad_arguments(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, *args)
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "foreign", "another format", "another shape", "flipped bit", "text"]
)
def test_a_checkpoint_that_cannot_be_used(
    how: str,
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    content = (uninterrupted("ema") / "checkpoint.msgpack").read_bytes()
    saved = serialization.msgpack_restore(content)
    bad = {
        "truncated": lambda: content[: len(content) // 2],
        "empty": lambda: b"",
        "foreign": lambda: serialization.to_bytes({"params": {"w": np.ones(3)}}),
        "another format": lambda: serialization.to_bytes({**saved, "format": "dqn 0"}),
        "another shape": lambda: serialization.to_bytes(
            {**saved, "replay": {"reward": np.ones((3, 3))}}
        ),
        "flipped bit": lambda: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        "text": lambda: b"no checkpoint",
    }[how]()
    path = tmp_path / "checkpoint.msgpack"
    path.write_bytes(bad)
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, "--resume", "--out", tmp_path)
    assert "is damaged or no checkpoint of this program" in capfd.readouterr().err
    assert path.read_bytes() == bad
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_settings_of_another_run(
    uninterrupted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, "--resume", "--out", uninterrupted("ema"), "--seed", 4)
    assert "--seed: the checkpoint in" in capfd.readouterr().err


def test_ctrl_c_saves_a_checkpoint_and_the_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, str(PROGRAM), "--seed", "1", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(0.1)
        assert process.stderr is not None
        text = ""
        while "return=" not in text:  # the first block is done
            read = process.stderr.read(1)
            assert read, f"it ended early: {text}"
            text += read
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    found = re.search(r"interrupted after (\d+) steps; .*\nto go on: (.*)\n", out)
    assert found
    assert shlex.split(found[2]) == [*command[:2], "--out", str(tmp_path), "--resume"]
    saved = dqn.load(tmp_path / "checkpoint.msgpack")
    assert len(saved["replay"]["reward"]) == int(found[1]) >= dqn.BLOCK
    assert not list(tmp_path.glob("*.tmp"))
    steps = int(found[1]) + dqn.BLOCK
    main(monkeypatch, "--resume", "--steps", steps, "--out", tmp_path)
    main(monkeypatch, "--seed", 1, "--steps", steps, "--out", tmp_path / "uninterrupted")
    resumed, whole = (
        dqn.load(folder / "checkpoint.msgpack") for folder in (tmp_path, tmp_path / "uninterrupted")
    )
    assert_same(arrays(strip(resumed)), arrays(strip(whole)))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.msgpack"
    main(monkeypatch, "--steps", dqn.BLOCK, "--out", tmp_path)
    before = path.read_bytes()
    with (
        full_disk(len(before) // 2),
        pytest.raises(SystemExit, match=f"^cannot save {path}: .*too large"),
    ):
        main(monkeypatch, "--resume", "--steps", 2 * dqn.BLOCK, "--out", tmp_path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    main(monkeypatch, "--resume", "--steps", 2 * dqn.BLOCK, "--out", tmp_path)
    assert len(dqn.load(path)["replay"]["reward"]) == 2 * dqn.BLOCK
