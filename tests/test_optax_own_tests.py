"""The rules can replace those of optax: the tests of optax pass with them."""

import inspect
import unittest

import optax
import pytest
from optax._src import update_test

import target_nets

RULES = ("apply_updates", "incremental_update", "periodic_update")


@pytest.mark.filterwarnings("default")  # the tests of optax may warn
def test_the_tests_of_optax_pass_with_our_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RULES:
        monkeypatch.setattr(update_test.update, name, getattr(target_nets, name))
    # `test_none_argument` is repeated below, since it holds the functions of optax themselves.
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(update_test.UpdateTest)
    assert suite.countTestCases() >= 6
    result = suite.run(unittest.TestResult())
    assert not result.failures
    assert not result.errors


def test_none_argument_as_in_optax() -> None:
    for rules in (optax, target_nets):
        assert rules.apply_updates(None, 1.0) is None
        assert rules.incremental_update(None, 1.0, 1) is None


@pytest.mark.parametrize("name", RULES)
def test_same_names_and_arguments(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (target_nets, optax))
    assert list(ours.parameters) == list(theirs.parameters)
