"""The README's code runs as it stands, in its order, and prints what its comments say."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_code_runs_and_prints_what_it_says() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "README.md", "exec"), names)
        expected = re.findall(r"^print\(.*\)(?:  |\n)# (.*)$", block, re.MULTILINE)
        assert printed.getvalue().splitlines() == expected


def test_the_commands_are_those_of_the_project() -> None:
    venv = "python3 -m venv .venv && .venv/bin/pip install -q -e"
    assert f"{venv} '.[examples]' && .venv/bin/python examples/dqn.py\n" in README
    assert f"{venv} '.[test]' && .venv/bin/pytest -n 2\n" in README
