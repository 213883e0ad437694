"""Every public name is its own manual: `help` of it says what goes in, what comes out, and shows it."""

import inspect
import re
from typing import Any

import pytest

import target_nets
from target_nets import posthoc, schedules

NAMES: dict[str, Any] = {
    name: getattr(module, name)
    for module in (target_nets, schedules, posthoc)
    for name in module.__all__
}
MEMBERS: dict[str, Any] = {
    f"{name}.{member}": value
    for name, cls in NAMES.items()
    if inspect.isclass(cls)
    for member, value in inspect.getmembers(cls)
    if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
}
PUBLIC = {"target_nets": target_nets, **NAMES, **MEMBERS}


def sections(name: str) -> dict[str, str]:
    """The parts of a docstring by their headings; what comes before the first is the part ''."""
    parts = re.split(
        r"^(Args|Returns|Raises|References|Example):\n", inspect.getdoc(PUBLIC[name]) or "", flags=re.M
    )
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def arguments(name: str) -> list[str]:
    value = PUBLIC[name]
    return [p for p in inspect.signature(value).parameters if p != "self"] if callable(value) else []


def test_the_names_are_all_there() -> None:
    assert {"EMATarget", "periodic_update", "schedules", "cosine", "EMATarget.skipped"} < set(PUBLIC)
    assert {"PeriodicTarget.update", "PeriodicTarget.sync", "PeriodicTarget.params"} < set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_one_line_first(name: str) -> None:
    first, *rest = sections(name)[""].splitlines()
    assert re.fullmatch(r"[A-Z`].*\.", first)
    assert not rest or not rest[0]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_and_no_other(name: str) -> None:
    assert re.findall(r"^  (\w+): \S", sections(name).get("Args", ""), re.M) == arguments(name)


@pytest.mark.parametrize("name", PUBLIC)
def test_what_it_returns_and_raises(name: str) -> None:
    there = sections(name)
    assert ("Returns" in there) == inspect.isfunction(PUBLIC[name])
    assert ("Raises" in there) == bool(arguments(name))


@pytest.mark.parametrize("name", PUBLIC)
def test_an_example_that_uses_it(name: str) -> None:
    *_, own = name.split(".")
    assert re.search(rf"^ *(>>>|\.\.\.) .*\b{own}\b", sections(name)["Example"], re.M)
