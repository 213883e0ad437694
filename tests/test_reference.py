"""The docstring of every public name documents its arguments and results, and has an example."""

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
    """Returns the parts of a docstring by heading; the part before the first heading is ''."""
    parts = re.split(
        r"^(Args|Returns|Raises|References|Example):\n", inspect.getdoc(PUBLIC[name]) or "", flags=re.M
    )
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def arguments(name: str) -> list[str]:
    value = PUBLIC[name]
    return [p for p in inspect.signature(value).parameters if p != "self"] if callable(value) else []


def test_every_public_name_is_found() -> None:
    assert {"EMATarget", "periodic_update", "schedules", "cosine", "EMATarget.skipped"} < set(PUBLIC)
    assert {"PeriodicTarget.update", "PeriodicTarget.sync", "PeriodicTarget.params"} < set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_is_complete(name: str) -> None:
    parts = sections(name)
    first, *rest = parts[""].splitlines()
    assert re.fullmatch(r"[A-Z`].*\.", first)
    assert not rest or not rest[0]
    assert re.findall(r"^  (\w+): \S", parts.get("Args", ""), re.M) == arguments(name)
    assert ("Returns" in parts) == inspect.isfunction(PUBLIC[name])
    assert "Raises" in parts or not arguments(name)
    *_, last = name.split(".")
    assert re.search(rf"^ *(>>>|\.\.\.) .*\b{last}\b", parts["Example"], re.M)
