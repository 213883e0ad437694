"""The rules can replace those of optax: the tests of optax pass with them."""

import inspect
import unittest
from collections.abc import Callable
from typing import Any

import optax
import pytest
from optax._src import update_test

import target_nets

RULES = ("apply_updates", "incremental_update", "periodic_update")


@pytest.mark.filterwarnings("default")  # the tests of optax may warn
def test_the_tests_of_optax_pass_with_our_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    called: set[str] = set()

    def recording(name: str) -> Callable[..., Any]:
        def rule(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return getattr(target_nets, name)(*args, **kwargs)

        return rule

    for name in RULES:
        monkeypatch.setattr(update_test.update, name, recording(name))
    # `test_none_argument` is repeated below, since it holds the functions of optax themselves.
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(update_test.UpdateTest)
    assert suite.countTestCases() >= 6
    result = suite.run(unittest.TestResult())
    assert not result.failures
    assert not result.errors
    assert called == set(RULES)


def test_none_argument_as_in_optax() -> None:
    for rules in (optax, target_nets):
        assert rules.apply_updates(None, 1.0) is None
        assert rules.incremental_update(None, 1.0, 1) is None


@pytest.mark.parametrize("name", RULES)
def test_same_names_and_arguments(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (target_nets, optax))
    assert list(ours.parameters) == list(theirs.parameters)
