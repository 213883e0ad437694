"""`jax.export` writes and reads functions of targets, without pickle."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers.comparisons import assert_same
from helpers.targets import MAKERS, harmonic
from helpers.trees import MIXED, perturb
from jax import export

from target_nets import EMATarget, PeriodicTarget, schedules

SCHEDULES: list[Any] = [
    schedules.bias_corrected(0.1),
    schedules.cosine(0.004, 100),
    schedules.delayed(2, 0.1),
    schedules.delayed(1, schedules.delayed(1, schedules.ramp(0.1))),
    schedules.inverse_power(power=0.7, min_step_size=0.1),
    schedules.power_function(sigma_rel=0.1),
    schedules.ramp(1 / 3),
    schedules.uniform(),
]
TARGETS = {
    **{
        name: make
        for name, make in MAKERS.items()
        if "schedule" not in name and "everything" not in name
    },
    **{repr(s): lambda params, s=s: EMATarget(params, s) for s in SCHEDULES},
    "everything": lambda params: EMATarget(
        params,
        schedules.ramp(0.01),
        update_period=3,
        mask=jax.tree.map(lambda x: x.ndim > 0, params),
        accumulator_dtype=jnp.float16,
        compensated=True,
        skip_nonfinite=True,
        donate=True,
    ),
}


def through_export(function: Any, *args: Any) -> Any:
    return export.deserialize(export.export(jax.jit(function))(*args).serialize()).call


@pytest.fixture(autouse=True)
def _no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_function_of_a_target_comes_back(kind: str) -> None:
    def step(target: Any, online: Any) -> Any:
        return target.updated(online), target.params, target.distance(online)

    target, online = TARGETS[kind](MIXED), perturb(MIXED)
    call, jitted = through_export(step, target, online), jax.jit(step)
    for _ in range(3):
        expected = jitted(target, online)
        got = call(target, online)
        assert jax.tree.structure(got) == jax.tree.structure(expected)  # settings are part of it
        assert_same(got, expected)
        target = got[0]


def test_a_function_that_makes_a_target() -> None:
    target = through_export(lambda params: PeriodicTarget(params, 2), {"w": jnp.ones(2)})(
        {"w": jnp.ones(2)}
    )
    assert repr(target.update({"w": jnp.ones(2)})).startswith("PeriodicTarget(step=1, update_period=2")


def test_what_cannot_be_written_is_named() -> None:
    params = {"w": jnp.ones(2)}

    class ramp(schedules.uniform):  # noqa: N801 (it has the name of another one in the library)
        pass

    for schedule in (harmonic, ramp()):
        with pytest.raises(
            ValueError, match=r"EMATarget: jax.export cannot write the step size .*ramp|harm"
        ):
            through_export(lambda target: target.params, EMATarget(params, schedule))
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    for made in (linear, nnx.state(linear)):
        with pytest.raises(ValueError, match=r"nnx objects .* make the target from nnx.to_pure_dict"):
            through_export(lambda target: target.step, PeriodicTarget(made, 2))
    pure = nnx.to_pure_dict(nnx.state(linear))
    target = PeriodicTarget(pure, 1)
    updated = through_export(lambda target, online: target.update(online), target, pure)(target, pure)
    assert_same(updated.params, target.update(linear).params)  # as the message says
