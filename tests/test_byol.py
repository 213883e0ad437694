"""The BYOL example learns features, resumes bit for bit after any epoch, and refuses other settings."""

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import byol
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from helpers.comparisons import arrays, assert_same
from helpers.faults import full_disk

from target_nets import EMATarget, posthoc, schedules

EPOCHS = 4


def trained_arrays(run: byol.Run) -> list[np.ndarray]:
    """Returns every array that training changes."""
    return [*arrays(nnx.to_pure_dict(nnx.state(run.byol))), np.array(run.losses)]


@pytest.fixture(scope="module", name="uninterrupted")
def _uninterrupted() -> byol.Run:
    return byol.train(byol.Run(seed=3, epochs=EPOCHS))


@pytest.mark.parametrize("stop", [0, 1, EPOCHS])
def test_a_run_resumes_bit_for_bit_after_any_epoch(
    stop: int, uninterrupted: byol.Run, tmp_path: Path
) -> None:
    first = byol.Run(seed=3, epochs=EPOCHS)
    for _ in range(stop):
        first.epoch()
    first.save(tmp_path / "byol.msgpack")
    second = byol.Run(seed=3, epochs=EPOCHS)
    second.restore(tmp_path / "byol.msgpack")
    byol.train(second)
    assert_same(trained_arrays(second), trained_arrays(uninterrupted))
    assert second.byol.target.step == EPOCHS * 5
    assert second.byol.target.distance(nnx.state(second.byol.student.branch)) > 0


def test_a_checkpoint_of_other_shapes_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = byol.Run(seed=3, epochs=EPOCHS)
    run.save(tmp_path / "byol.msgpack")
    saved = serialization.msgpack_restore((tmp_path / "byol.msgpack").read_bytes())
    before = trained_arrays(run)
    for part, path in (("target", ["params", "projector"]), ("student", [0])):
        node = saved[part]
        for key in path:
            node = node[key if key in node else str(key)]
        layer = node["layers"]["0"] if part == "target" else node["branch"]["projector"]["layers"]
        layer = layer if part == "target" else layer[next(iter(layer))]
        kernel, layer["kernel"] = layer["kernel"], np.ones((7, 7), np.float32)
        (tmp_path / "byol.msgpack").write_bytes(serialization.msgpack_serialize(saved))
        with pytest.raises(ValueError, match="no checkpoint of this run"):
            run.restore(tmp_path / "byol.msgpack")
        layer["kernel"] = kernel
    assert_same(trained_arrays(run), before)


def test_evaluation_changes_nothing() -> None:
    evaluated, other = (byol.Run(seed=3, epochs=EPOCHS) for _ in range(2))
    evaluated.spread()
    evaluated.features(evaluated.byol.slow())
    for run in (evaluated, other):
        run.epoch()
    assert_same(trained_arrays(evaluated), trained_arrays(other))


def test_ctrl_c_finishes_the_epoch_and_the_run_resumes_bit_for_bit(
    uninterrupted: byol.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (byol.Run(seed=3, epochs=EPOCHS) for _ in range(2))
    train_step, calls = byol.train_step, itertools.count()

    def interrupted(*args: Any) -> jax.Array:
        if next(calls) == 5 * 2 + 3:  # in the middle of the third epoch
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(byol, "train_step", interrupted)
        byol.train(first, lambda: first.save(tmp_path / "byol.msgpack"))
    assert len(first.losses) == 3
    second.restore(tmp_path / "byol.msgpack")
    byol.train(second)
    assert_same(trained_arrays(second), trained_arrays(uninterrupted))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run, path = byol.Run(seed=3, epochs=EPOCHS), tmp_path / "byol.msgpack"
    run.save(path)
    before = path.read_bytes()
    with (
        full_disk(len(before) // 2),
        pytest.raises(SystemExit, match=f"^cannot save {path}: .*too large"),
    ):
        byol.train(run, lambda: run.save(path))
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def main(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["byol.py", *map(str, args)])
    return byol.main()


def test_the_program(monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    settings = ("--epochs", 12, "--checkpoint", folder, "--out", tmp_path)
    assert main(monkeypatch, *settings) == 0
    printed, progress = capfd.readouterr()
    assert "loss=" in progress
    table = {line[:34].strip(): line[34:].split() for line in printed.splitlines() if " %" in line}
    accuracy = {name: float(cells[0]) for name, cells in table.items()}
    assert list(accuracy) == ["raw pixels", "untrained encoder", "online encoder", "target encoder"]
    assert accuracy["target encoder"] > accuracy["untrained encoder"] + 3  # after 12 of 200 epochs
    assert (tmp_path / "byol.png").stat().st_size > 10_000
    assert main(monkeypatch, *settings) == 0  # only the evaluation is left to do
    again, progress = capfd.readouterr()
    assert again == printed
    assert "12/12" in progress
    with pytest.raises(SystemExit):
        main(monkeypatch, *settings, "--seed", 1)
    assert "no checkpoint of this run: a run with other settings: {'seed': 0" in capfd.readouterr().err
    for wrong in (("--seed", -1), ("--epochs", 0), ("--out", folder / "byol.msgpack")):
        with pytest.raises(SystemExit):
            main(monkeypatch, *settings, *wrong)
        assert f"argument {wrong[0]}: " in (err := capfd.readouterr().err) or f"{wrong[0]}: " in err
    (folder / "byol.msgpack").write_bytes(b"nonsense")
    with pytest.raises(SystemExit):
        main(monkeypatch, *settings)
    assert "byol.msgpack is no checkpoint of this run" in capfd.readouterr().err


def test_averages_of_other_lengths(monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(byol, "WIDTHS", (0.01, 0.07))
    settings = ("--posthoc", "--epochs", EPOCHS, "--seed", 3, "--out", tmp_path)
    assert main(monkeypatch, *settings) == 0
    rows = [line.split()[2:] for line in capfd.readouterr().out.splitlines() if "after step" in line]
    assert [row[0] for row in rows] == ["5", "10", "15", "20"]
    assert {row[1] for row in rows} == {"-"}  # the snapshots do not span an average this short
    assert all(50 < float(row[2]) < 100 for row in rows)
    assert (tmp_path / "posthoc.png").stat().st_size > 10_000
    assert len(list((tmp_path / "snapshots").iterdir())) == 2 * EPOCHS
    for other in (("--checkpoint", tmp_path), ("--ablation",)):
        with pytest.raises(SystemExit):
            main(monkeypatch, *settings, *other)
        assert "not allowed with argument" in capfd.readouterr().err


def test_a_reconstructed_average_is_near_the_one_during_training() -> None:
    run, stored = byol.Run(seed=3, epochs=EPOCHS), []
    lengths = [*byol.STORED, schedules.power_function(sigma_rel=0.07)]
    start = nnx.state(run.byol.student.branch)
    run.byol.averages.extend(EMATarget(start, length) for length in lengths)
    for _ in range(EPOCHS):
        run.epoch()
        pairs = list(zip(lengths, run.byol.averages, strict=True))
        stored += [(average.step, length.gamma, average.params) for length, average in pairs[:2]]
    *_, during = run.byol.averages
    assert during.step == EPOCHS * 5
    after = posthoc.reconstruct(stored, sigma_rel=0.07)
    assert during.distance(after) < 0.2 * min(during.distance(params) for _, _, params in stored)


def test_the_target_is_the_average_of_the_paper() -> None:
    run = byol.Run(seed=0, epochs=EPOCHS)
    slow = [np.float64(x) for x in jax.tree.leaves(nnx.state(run.byol.student.branch))]
    images, key = run.images["train"][: byol.BATCH], jax.random.key(0)
    for step in range(3):
        byol.train_step(run.byol, images, key)
        size = 0.1 * (np.cos(np.pi * step / 20) + 1) / 2
        online = jax.tree.leaves(nnx.state(run.byol.student.branch))
        slow = [x + size * (np.float64(y) - x) for x, y in zip(slow, online, strict=True)]
    for x, y in zip(jax.tree.leaves(run.byol.target.params), slow, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_frozen_and_absent_targets() -> None:
    frozen, absent = (byol.Run(seed=0, epochs=1, step_size=s, predictor=False) for s in (0.0, 1.0))
    before = frozen.byol.target.params
    for run in (frozen, absent):
        run.epoch()
    assert_same(frozen.byol.target.params, before)
    assert_same(absent.byol.target.params, nnx.state(absent.byol.student.branch))


def test_views_are_images_of_the_same_digits(uninterrupted: byol.Run) -> None:
    images = jnp.asarray(uninterrupted.images["train"][:64])
    one, other = (byol.views(jax.random.key(seed), images) for seed in (0, 1))
    assert one.shape == images.shape
    same = jnp.mean(jnp.sum(byol.unit(one) * byol.unit(images), -1))
    others = jnp.mean(jnp.sum(byol.unit(one) * byol.unit(jnp.roll(images, 1, 0)), -1))
    assert same > others + 0.1
    assert jnp.mean(jnp.abs(one - other)) > 0.03


def test_the_spread_shows_a_collapse() -> None:
    random = byol.unit(jax.random.normal(jax.random.key(0), (500, 64)))
    width, rank = byol.spread(random)
    assert width > 0.95
    assert rank > 50
    assert byol.spread(jnp.broadcast_to(random[:1], random.shape))[0] < 1e-3
    assert byol.spread(random[:, :1] * jnp.ones(64))[1] < 1.01
