"""The pages: all code runs and prints what its comments say; links, commands and lengths are right."""

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
PAGES = {
    path: (ROOT / path).read_text()
    for path in ("README.md", "examples/guide.md", "examples/moving_over.md", "examples/recipes.md")
}
README, MOVING_OVER = PAGES["README.md"], PAGES["examples/moving_over.md"]
# The sections whose code all other sections of the same page start from.
SETUPS = ("Install, and a first example", "In your program", "Setup")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def code_by_section(text: str, language: str) -> dict[str, list[str]]:
    """Returns the code of each section that has some; "first screen" is what stands before them."""
    parts = ["first screen", *re.split(r"^##+ (.*)\n", text, flags=re.MULTILINE)]
    found = {title: blocks(part, language) for title, part in zip(parts[::2], parts[1::2], strict=True)}
    return {title: codes for title, codes in found.items() if codes}


CODE = {path: code_by_section(text, "python") for path, text in PAGES.items()}
SETUP_CODE = {
    path: [code for title in SETUPS for code in by_section.get(title, [])]
    for path, by_section in CODE.items()
}
SECTIONS = [(path, title) for path, titles in CODE.items() for title in titles if title not in SETUPS]
DIFFS = {title: diff for title, (diff,) in code_by_section(MOVING_OVER, "diff").items()}


def run(*codes: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    for code in codes:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "page", "exec"), names)
        expected = re.findall(r"^ *print\(.*\)(?:  |\n)# (.*)$", code, re.MULTILINE)
        assert printed.getvalue().splitlines() == expected
    return names


@pytest.mark.parametrize(("path", "title"), SECTIONS)
def test_each_section_runs_and_prints_what_its_comments_say(path: str, title: str) -> None:
    setup = [] if title == "first screen" else SETUP_CODE[path]
    run(*setup, *CODE[path][title])


@pytest.mark.parametrize("path", PAGES)
def test_code_is_short_and_all_of_it_is_run(path: str) -> None:
    lengths = [
        sum(bool(line) for line in code.splitlines())
        for title, codes in CODE[path].items()
        for code in codes
        if title not in SETUPS[1:]
    ]
    assert max(lengths, default=0) <= 10
    languages = set(re.findall(r"^```(\w+)", PAGES[path], re.MULTILINE))
    assert languages <= {"bash", "python"} | ({"diff"} if path.endswith("moving_over.md") else set())
    assert sum(map(len, CODE[path].values())) == PAGES[path].count("```python\n")


def test_the_readme_has_code_for_every_use_and_is_short() -> None:
    uses = {"first screen", "DQN", "BYOL", "Diffusion", "TrainState", "flax.nnx", "Checkpoints"}
    assert uses < set(CODE["README.md"])
    assert len(DIFFS) == 5
    assert len(README.splitlines()) <= 300
    prose = re.sub(r"^\|.*$", "", without_code(README), flags=re.MULTILINE)  # nor tables
    assert len(prose.split()) <= 1200


@pytest.mark.parametrize("title", DIFFS)
def test_both_sides_of_a_diff_give_the_same_slow_copy(title: str) -> None:
    before, after = (
        "".join(line[1:] for line in DIFFS[title].splitlines(keepends=True) if line[0] != other)
        for other in "+-"
    )
    setup = SETUP_CODE["examples/moving_over.md"]
    expected, slow = (arrays(run(*setup, program)["slow"]) for program in (before, after))
    start = arrays(run(*setup)["params"])
    assert any((x != y).any() for x in expected for y in start if x.shape == y.shape)
    for x, y in zip(slow, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def torch_makers() -> dict[str, Any]:
    """Returns the PyTorch classes of the page; the file of timm is loaded without torchvision."""
    swa_utils = pytest.importorskip("torch.optim.swa_utils")
    names = {name: getattr(swa_utils, name) for name in ("AveragedModel", "get_ema_multi_avg_fn")}
    names["EMA"] = pytest.importorskip("ema_pytorch").EMA
    names["EMAModel"] = pytest.importorskip("diffusers.training_utils").EMAModel
    if not (timm := importlib.util.find_spec("timm")):
        pytest.skip("timm is not installed")  # an optional peer, as the three above
    path = Path(timm.submodule_search_locations[0]) / "utils" / "model_ema.py"
    exec(compile(path.read_text(), path, "exec"), names)
    return names


def test_the_classes_of_torch_on_the_page_give_the_same_averages() -> None:
    names, torch = torch_makers(), pytest.importorskip("torch")
    theirs = r"`((?:AveragedModel|ModelEmaV3|EMA|EMAModel)\(.*?\))`"
    rows = re.findall(rf"^\| .*?{theirs}.*? \| `(.*?\))`(.*)", MOVING_OVER, re.MULTILINE)
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


def test_every_test_file_that_the_readme_names_exists() -> None:
    names = re.findall(r"`(test_\w+\.py)`", README)
    assert names
    assert all((ROOT / "tests" / name).exists() for name in names)


@pytest.mark.parametrize("page", [*PAGES, "examples/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)]+)\)", without_code(path.read_text())):
        name, _, heading = link.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), link
        headings = re.findall(r"^##+ (.*)", without_code(there.read_text()), re.M) if heading else [""]
        assert heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, link
    assert page == "README.md" or "../README.md" in path.read_text()  # each page links back
