"""The BYOL example learns features, resumes bit for bit after any epoch, and refuses other settings."""

import functools
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import byol
import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from helpers.comparisons import arrays, assert_same
from helpers.faults import full_disk

EPOCHS = 4


def trained_arrays(run: byol.Run) -> list[np.ndarray]:
    """Returns every array that training changes."""
    return [*arrays(nnx.to_pure_dict(nnx.state(run.byol))), np.array(run.losses)]


def train(run: byol.Run, epochs: int = EPOCHS) -> byol.Run:
    while len(run.losses) < epochs:
        run.epoch()
    return run


@pytest.fixture(scope="module", name="uninterrupted")
def _uninterrupted() -> byol.Run:
    return train(byol.Run(seed=3, epochs=EPOCHS))


@pytest.mark.parametrize("stop", [0, 1, EPOCHS])
def test_a_run_resumes_bit_for_bit_after_any_epoch(
    stop: int, uninterrupted: byol.Run, tmp_path: Path
) -> None:
    train(byol.Run(seed=3, epochs=EPOCHS), stop).save(tmp_path / "byol.msgpack")
    second = byol.Run(seed=3, epochs=EPOCHS)
    second.restore(tmp_path / "byol.msgpack")
    train(second)
    assert_same(trained_arrays(second), trained_arrays(uninterrupted))
    assert second.byol.target.step == EPOCHS * 5
    assert second.byol.target.distance(nnx.state(second.byol.student.branch)) > 0


def test_a_checkpoint_of_other_shapes_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run, path = byol.Run(seed=3, epochs=EPOCHS), tmp_path / "byol.msgpack"
    run.save(path)
    saved = serialization.msgpack_restore(path.read_bytes())
    settings, before = saved.pop("settings"), trained_arrays(run)
    del saved["checksum"]
    for part, keys in (("target", ["params", "projector"]), ("student", ["0", "branch", "projector"])):
        layers = functools.reduce(lambda node, key: node[key], [*keys, "layers"], saved[part])
        layer = layers[min(layers)]
        kernel, layer["kernel"] = layer["kernel"], np.ones((7, 7), np.float32)
        common.save(path, settings, **saved)
        with pytest.raises(SystemExit, match=f"^{path} is damaged, or no checkpoint of this program"):
            run.restore(path)
        layer["kernel"] = kernel
    assert_same(trained_arrays(run), before)


def test_evaluation_changes_nothing() -> None:
    evaluated, other = (byol.Run(seed=3, epochs=EPOCHS) for _ in range(2))
    evaluated.features(evaluated.byol.slow())
    for run in (evaluated, other):
        run.epoch()
    assert_same(trained_arrays(evaluated), trained_arrays(other))


def main(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["byol.py", *map(str, args)])
    return byol.main()


def test_ctrl_c_finishes_the_epoch_and_the_run_resumes_bit_for_bit(
    uninterrupted: byol.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    train_step, calls = byol.train_step, itertools.count()

    def interrupted(*args: Any) -> jax.Array:
        if next(calls) == 5 * 2 + 3:  # in the middle of the third epoch
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    settings = ("--seed", 3, "--epochs", EPOCHS, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(byol, "train_step", interrupted)
        assert main(monkeypatch, *settings) == 130
    line = capfd.readouterr().out.splitlines()[-1]
    assert line.startswith("stopped; to go on: ")
    assert line.endswith(f"byol.py --seed 3 --epochs 4 --out {tmp_path} --resume")
    second = byol.Run(seed=3, epochs=EPOCHS)
    second.restore(tmp_path / "checkpoint.msgpack")
    assert len(second.losses) == 3
    train(second)
    assert_same(trained_arrays(second), trained_arrays(uninterrupted))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run, path = byol.Run(seed=3, epochs=EPOCHS), tmp_path / "byol.msgpack"
    run.save(path)
    before = path.read_bytes()
    with (
        full_disk(len(before) // 2),
        pytest.raises(SystemExit, match=f"^cannot save {path}: .*too large"),
    ):
        run.save(path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_the_program(monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path) -> None:
    settings = ("--epochs", 12, "--out", tmp_path)
    assert main(monkeypatch, *settings) == 0
    printed = capfd.readouterr().out
    table = {line[:34].strip(): line[34:].split() for line in printed.splitlines() if " %" in line}
    accuracy = {name: float(cells[0]) for name, cells in table.items()}
    assert list(accuracy) == ["raw pixels", "untrained encoder", "online encoder", "target encoder"]
    assert accuracy["target encoder"] > accuracy["untrained encoder"] + 3  # after 12 of 200 epochs
    assert (tmp_path / "byol.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match=r"is of another run, with decay 0\.9, not 0\.99$"):
        main(monkeypatch, *settings, "--resume", "--decay", 0.99)
    (tmp_path / "checkpoint.msgpack").write_bytes(b"nonsense")
    with pytest.raises(SystemExit, match=r"checkpoint\.msgpack is damaged, or no checkpoint"):
        main(monkeypatch, *settings, "--resume")
    for wrong in (
        ("--seed", -1),
        ("--epochs", 0),
        ("--decay", 1.5),
        ("--decay", "nan"),
        ("--out", __file__),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(monkeypatch, *settings, *wrong)
        assert f"{wrong[0]}: " in capfd.readouterr().err


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
    frozen, absent = (byol.Run(seed=0, epochs=1, decay=d, predictor=False) for d in (1.0, 0.0))
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
    assert byol.spread(random) > 0.95
    assert byol.spread(jnp.broadcast_to(random[:1], random.shape)) < 1e-3
