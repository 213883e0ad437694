"""The diffusion example averages, resumes bit for bit, and refuses what it cannot use."""

import re
import sys
from pathlib import Path
from typing import Any

import diffusion
import jax
import numpy as np
import pytest
from flax import serialization
from helpers.comparisons import assert_same


@pytest.fixture(autouse=True, name="small")
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "BLOCK", 20)
    monkeypatch.setattr(diffusion, "WIDTH", 32)
    monkeypatch.setattr(diffusion, "SAMPLES", 100)
    monkeypatch.setattr(diffusion, "LENGTHS", (0.01, 0.05, 0.1))  # the first is refused


def main(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["diffusion.py", *map(str, args)])
    return diffusion.main()


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(monkeypatch, "--steps", 80, "--out", whole) == 0
    printed = capfd.readouterr().out
    pattern = r"^Fréchet distance to the digits: online \d+\.\d+, averaged \d+\.\d+ \(sigma_rel 0.\d+\)$"
    assert re.fullmatch(pattern, printed.splitlines()[-1])
    assert (whole / "diffusion.png").stat().st_size > 10_000
    main(monkeypatch, "--steps", 21, "--out", parts)  # whole blocks
    capfd.readouterr()
    assert main(monkeypatch, "--steps", 80, "--out", parts, "--resume") == 0
    assert capfd.readouterr().out == printed.replace(str(whole), str(parts))
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.msgpack"))
    assert len(files) == 1 + 2 * 4
    for file in files:
        assert (parts / file).read_bytes() == (whole / file).read_bytes()

    # The stored averages are those of the schedules, and one of their lengths is made of them exactly.
    saved = serialization.msgpack_restore((whole / "checkpoint.msgpack").read_bytes())["state"]
    run = diffusion.Run(0, whole)
    run.restore()
    for length, average in zip((0.05, 0.1), run.state["averages"], strict=True):
        assert average.step == 80
        assert float(average.distance(run.average(length))) < 1e-4 * float(
            average.distance(run.state["params"])
        )
    assert_same(jax.tree.leaves(saved["params"]), jax.tree.leaves(run.state["params"]))

    snapshot, checkpoint = next((whole / "snapshots").iterdir()), whole / "checkpoint.msgpack"
    for path in (snapshot, checkpoint):
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(SystemExit, match=f"^{path} is damaged"):
            main(monkeypatch, "--steps", 80, "--out", whole, "--resume")


def test_the_distance_is_zero_for_the_digits_and_grows_with_noise() -> None:
    judge = diffusion.Judge()
    noise = np.random.default_rng(0).normal(size=judge.images.shape)
    distances = [judge.distance(judge.images + scale * noise) for scale in (0, 0.1, 0.3)]
    assert abs(distances[0]) < 1e-6
    assert 0.001 < distances[1] < distances[2] / 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0"], "--steps: 0 is not within 1 to 1000000"),
        (["--steps", "1e4"], "--steps: invalid int value: '1e4'"),
        (["--seed", "-1"], "--seed: -1 is not within"),
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
