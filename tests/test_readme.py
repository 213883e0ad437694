"""The code of the README runs and prints what its comments say; links and commands are right."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.comparisons import arrays

from target_nets import EMATarget, schedules

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def sections() -> dict[str, str]:
    parts = re.split(r"^##+ (.*)\n", README, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


PYTHON = {title: code for title, text in sections().items() if (code := blocks(text, "python"))}
# The code that each section goes on from.
BEGINNING = [*PYTHON.pop("Install"), *PYTHON.pop("In your code")]
DIFFS = blocks(README, "diff")


def run(*codes: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "readme"}
    for code in codes:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
        expected = re.findall(r"^print\(.*\)(?:  |\n)# (.*)$", code, re.MULTILINE)
        assert printed.getvalue().splitlines() == expected
    return names


@pytest.mark.parametrize("title", PYTHON)
def test_each_section_runs_and_prints_what_its_comments_say(title: str) -> None:
    run(*BEGINNING, *PYTHON[title])


def test_there_is_code_for_every_use() -> None:
    assert {"DQN", "BYOL", "Diffusion", "TrainState", "flax.nnx", "Checkpoints"} < set(PYTHON)
    assert len(DIFFS) == 4
    codes = [code for section in PYTHON.values() for code in section]
    assert max(sum(bool(line) for line in code.splitlines()) for code in codes) < 10


@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_both_sides_of_a_diff_give_the_same_slow_copy(diff: str) -> None:
    before, after = (
        "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] != other)
        for other in "+-"
    )
    expected, slow = (arrays(run(*BEGINNING, program)["slow"]) for program in (before, after))
    start = arrays(run(*BEGINNING)["params"])
    assert any((x != y).any() for x in expected for y in start if x.shape == y.shape)
    for x, y in zip(slow, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def torch_makers() -> dict[str, Any]:
    """Returns the PyTorch classes of the README; the file of timm is loaded without torchvision."""
    swa_utils = pytest.importorskip("torch.optim.swa_utils")
    names = {name: getattr(swa_utils, name) for name in ("AveragedModel", "get_ema_multi_avg_fn")}
    names["EMA"] = pytest.importorskip("ema_pytorch").EMA
    names["EMAModel"] = pytest.importorskip("diffusers.training_utils").EMAModel
    if not (timm := importlib.util.find_spec("timm")):
        pytest.skip("timm is not installed")
    path = Path(timm.submodule_search_locations[0]) / "utils" / "model_ema.py"
    exec(compile(path.read_text(), path, "exec"), names)
    return names


def test_the_classes_of_torch_in_the_readme_give_the_same_averages() -> None:
    names, torch = torch_makers(), pytest.importorskip("torch")
    theirs = r"`((?:AveragedModel|ModelEmaV3|EMA|EMAModel)\(.*?\))`"
    rows = re.findall(rf"^\| .*?{theirs}.*? \| `(.*?\))`(.*)", README, re.MULTILINE)
    assert len(rows) == 10
    online = np.random.default_rng(0).normal(1, 0.1, (300, 3)).astype(np.float32)
    for theirs, ours, note in rows:
        model = torch.nn.Linear(3, 1, bias=False)
        model.weight.data[0] = torch.zeros(3)
        slow = eval(theirs, {**names, "model": model})
        target = eval(ours, {"EMATarget": EMATarget, "schedules": schedules, "params": np.zeros(3)})
        late = re.search(r"made after (\d+)", note)
        for n, x in enumerate(online):
            model.weight.data[0] = torch.tensor(x)
            if theirs.startswith("AveragedModel"):
                slow.update_parameters(model)
            elif theirs.startswith("EMAModel"):
                slow.step(model.parameters())
            elif theirs.startswith("EMA("):
                slow.update()
            else:
                counted = "use_warmup" in theirs or "update_after_step" in theirs
                slow.update(model, **({"step": n + 1} if counted else {}))
            if "target.sync" in note and n == 0:
                target.sync(x)
            elif late is None or n >= int(late[1]):
                target.update(x)
        module = getattr(slow, "module", getattr(slow, "ema_model", None))
        expected = slow.shadow_params[0] if module is None else module.weight
        np.testing.assert_allclose(
            target.params, expected.detach().numpy()[0], rtol=1e-5, err_msg=theirs
        )


def test_the_commands_install_what_they_need() -> None:
    venv = "python3 -m venv .venv && .venv/bin/pip install -q -e"
    assert f"{venv} '.[examples]' && .venv/bin/python examples/dqn.py\n" in README
    assert f"{venv} '.[test]' && .venv/bin/pytest -n 2\n" in README


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        name, _, heading = link.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), link
        headings = re.findall(r"^##+ (.*)", there.read_text(), re.M) if heading else [""]
        assert heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, link
