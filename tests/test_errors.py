"""An error names the argument or the key path, what was expected and what was given; nothing changes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from flax.serialization import from_bytes, to_bytes
from helpers.comparisons import assert_same
from helpers.targets import MAKERS, jitted_update, make_makers
from helpers.trees import perturb

from target_nets import EMATarget, PeriodicTarget, incremental_update, schedules

PARAMS = {"a": {"w": jnp.zeros((3, 1)), "b": jnp.zeros(())}, "c": [jnp.arange(3), None]}
ONLINE_PARAMS = perturb(PARAMS)
W = "online_params['a']['w']: expected float32[3, 1] as in the slow copy, got "
B = "online_params['a']['b']: expected float32[] as in the slow copy, got "


def with_leaf(name: str, value: Any) -> Any:
    """Returns the online parameters with another leaf below "a"."""
    tree = jax.tree.map(lambda x: x, ONLINE_PARAMS)
    tree["a"][name] = value
    return tree


def without_w() -> Any:
    return {"a": {"b": ONLINE_PARAMS["a"]["b"]}, "c": ONLINE_PARAMS["c"]}


MISFITS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "missing": (without_w, ValueError, W + "nothing"),
    "extra": (
        lambda: with_leaf("z", 1.0),
        ValueError,
        "online_params['a']['z']: expected nothing as in the slow copy, got float32[]",
    ),
    "transposed": (lambda: with_leaf("w", jnp.ones((1, 3))), ValueError, W + "float32[1, 3]"),
    "broadcastable": (lambda: with_leaf("w", jnp.ones((1, 1))), ValueError, W + "float32[1, 1]"),
    "flat": (lambda: with_leaf("w", jnp.ones(3)), ValueError, W + "float32[3]"),
    "scalar": (lambda: with_leaf("w", 1.0), ValueError, W + "float32[]"),
    "None leaf": (lambda: with_leaf("w", None), ValueError, W + "None"),
    "array for None": (
        lambda: {**ONLINE_PARAMS, "c": [ONLINE_PARAMS["c"][0], 1.0]},
        ValueError,
        "online_params['c'][1]: expected None as in the slow copy, got float32[]",
    ),
    "string leaf": (lambda: with_leaf("w", "x"), TypeError, W + "str"),
    "object leaf": (lambda: with_leaf("w", object()), TypeError, W + "object"),
    "array of strings": (lambda: with_leaf("w", np.array(["x"])), TypeError, W + "<U1[1]"),
    "complex into float": (
        lambda: with_leaf("w", jnp.ones((3, 1)) * 1j),
        TypeError,
        W + "complex64[3, 1]",
    ),
    "key into float": (lambda: with_leaf("w", jax.random.key(0)), TypeError, W + "key<"),
    "integer past 32 bits": (lambda: with_leaf("b", 2**31), TypeError, B + "int"),
    "integer past 64 bits": (lambda: with_leaf("b", -(2**70)), TypeError, B + "int"),
    "float into int": (
        lambda: {**ONLINE_PARAMS, "c": [jnp.ones(3), None]},
        TypeError,
        "online_params['c'][0]: expected int32[3] as in the slow copy, got float32[3]",
    ),
    "tuple for list": (
        lambda: {**ONLINE_PARAMS, "c": tuple(ONLINE_PARAMS["c"])},
        ValueError,
        "online_params['c']: expected list as in the slow copy, got tuple",
    ),
    "node for leaf": (lambda: with_leaf("w", {"x": 1.0}), ValueError, W + "dict"),
    "leaf for the whole tree": (lambda: 1.0, ValueError, "online_params: expected dict as in"),
    "None for the whole tree": (lambda: None, ValueError, "online_params: expected dict as in"),
    "abstract leaf": (
        lambda: with_leaf("w", jax.ShapeDtypeStruct((3, 1), jnp.float32)),
        TypeError,
        W + "ShapeDtypeStruct",
    ),
    "population": (lambda: with_leaf("w", jnp.ones((2, 3, 1))), ValueError, W + "float32[2, 3, 1]"),
    "empty": (dict, ValueError, "online_params['a']: expected dict as in the slow copy, got nothing"),
    "the target itself": (
        lambda: EMATarget(PARAMS, 0.5),
        ValueError,
        "online_params: expected dict as in the slow copy, got EMATarget",
    ),
    "string for the whole tree": (lambda: "x", ValueError, "online_params: expected dict as in"),
}
REFUSED_BY_JIT = (  # jit itself refuses these arguments, in its own words
    "string leaf",
    "abstract leaf",
    "object leaf",
    "array of strings",
    "string for the whole tree",
    "integer past 32 bits",
    "integer past 64 bits",
)
SLOW_PERIOD = make_makers(period=10)
TARGETS: dict[str, Callable[[], Any]] = {
    "ema": lambda: MAKERS["ema"](PARAMS),
    "ema, donate": lambda: MAKERS["ema, donate"](PARAMS),
    "ema, compensated": lambda: MAKERS["ema, compensated"](PARAMS),
    "ema, skipping": lambda: MAKERS["ema, skipping"](PARAMS),
    "ema, between periods": lambda: SLOW_PERIOD["ema, period"](PARAMS),
    "ema, after jit": lambda: jax.jit(lambda t: t)(MAKERS["ema, array"](PARAMS)),
    "periodic": lambda: PeriodicTarget(PARAMS, 1),
    "periodic, donate": lambda: PeriodicTarget(PARAMS, 1, donate=True),
    "periodic, between periods": lambda: SLOW_PERIOD["periodic"](PARAMS),
    "periodic, after jit": lambda: jax.jit(lambda t: t)(PeriodicTarget(PARAMS, 3)),
}


def check_misfit(kind: str, case: str) -> None:
    """Asserts that each method refuses the online parameters, and that the target goes on as before."""
    bad, error, message = MISFITS[case]
    target, good = TARGETS[kind](), TARGETS[kind]()
    for updates in (0, 2):  # a mistake on the first update and on later ones
        for _ in range(updates):
            target.update(ONLINE_PARAMS)
            good.update(ONLINE_PARAMS)
        before = jax.tree.map(np.array, target)
        calls = [target.update, target.sync, target.distance]
        if updates and "between" in kind:
            calls.remove(target.update)  # it reads nothing there
        if case not in REFUSED_BY_JIT:
            calls.append(partial(jitted_update, target))
        for call in calls:
            with pytest.raises(error) as caught:
                call(bad())
            assert str(caught.value).startswith(message)
        assert_same(jax.tree.map(np.array, target), before)
    assert_same(target.update(ONLINE_PARAMS).params, good.update(ONLINE_PARAMS).params)
    assert target.step == good.step == 3


@pytest.mark.parametrize("kind", ["ema", "periodic, between periods"])
@pytest.mark.parametrize("case", MISFITS)
def test_online_parameters_that_do_not_fit(kind: str, case: str) -> None:
    check_misfit(kind, case)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_target_refuses_online_parameters_that_do_not_fit(kind: str) -> None:
    for case in ("missing", "transposed", "string leaf", "complex into float", "integer past 32 bits"):
        check_misfit(kind, case)


@pytest.mark.parametrize("kind", TARGETS)
def test_online_parameters_that_were_donated(kind: str) -> None:
    target = TARGETS[kind]().sync(ONLINE_PARAMS).update(ONLINE_PARAMS).update(ONLINE_PARAMS)
    before = jax.tree.map(np.array, target)
    donated = perturb(PARAMS)
    jax.jit(perturb, donate_argnums=0)(donated)
    for call in (target.update, target.sync, target.distance, partial(jitted_update, target)):
        if call != target.update or "between" not in kind:
            with pytest.raises((RuntimeError, ValueError), match="deleted"):  # in jax's own words
                call(donated)
    assert_same(jax.tree.map(np.array, target), before)
    assert target.update(ONLINE_PARAMS).step == 3


# Targets of a step size that is known only while the update runs.
STEP_SIZES: dict[str, Callable[[float], Any]] = {
    "array": lambda s: EMATarget(PARAMS, jnp.float32(s)),
    "array, compensated": lambda s: EMATarget(PARAMS, jnp.float32(s), compensated=True),
    "schedule": lambda s: EMATarget(PARAMS, lambda n: s + 0 * n),
    "schedule, compensated": lambda s: EMATarget(PARAMS, lambda n: s + 0 * n, compensated=True),
    "schedule that returns a number": lambda s: EMATarget(PARAMS, lambda n: s),
    "traced": jax.jit(lambda s: EMATarget(PARAMS, s)),
}


def check_clipping(how: str, value: float) -> None:
    expected = ONLINE_PARAMS if value > 1 else {**PARAMS, "c": ONLINE_PARAMS["c"]}  # integers are copied
    for call in (EMATarget.update, jitted_update):
        assert_same(call(STEP_SIZES[how](value), ONLINE_PARAMS).params, expected)


@pytest.mark.parametrize("value", [1.5, -0.1, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("how", ["array", "array, compensated"])
def test_a_step_size_on_the_device_is_clipped(how: str, value: float) -> None:
    check_clipping(how, value)


@pytest.mark.parametrize("how", STEP_SIZES)
def test_every_step_size_that_cannot_raise_is_clipped(how: str) -> None:
    for value in (1.5, -0.1, np.nan):
        check_clipping(how, value)


SETTINGS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "string in params": (lambda: EMATarget({"a": "x"}, 0.5), TypeError, r"params\['a'\]: .* got str"),
    "objects in params": (
        lambda: PeriodicTarget([np.array([None])], 2),
        TypeError,
        r"params\[0\]: expected an array, got object",
    ),
    "abstract params": (
        lambda: EMATarget(jax.eval_shape(lambda: PARAMS), 0.5),
        TypeError,
        r"params\['a'\]\['b'\]: expected an array, got ShapeDtypeStruct",
    ),
    "float0 in params": (
        lambda: EMATarget(np.zeros(3, jax.dtypes.float0), 0.5),
        TypeError,
        r"params: expected an array, got .*float0",
    ),
    "step size below 0": (lambda: EMATarget(PARAMS, -0.1), ValueError, "step_size: .* got -0.1"),
    "step size above 1": (lambda: EMATarget(PARAMS, 1.5), ValueError, "step_size: .* got 1.5"),
    "step size nan": (lambda: EMATarget(PARAMS, float("nan")), ValueError, "step_size: .* got nan"),
    "NumPy step size": (lambda: EMATarget(PARAMS, np.array(2.0)), ValueError, "step_size: .* got 2.0"),
    "step size huge": (lambda: EMATarget(PARAMS, 2**31), ValueError, "step_size: .* got 2147483648"),
    "step size a huge integer": (lambda: EMATarget(PARAMS, 10**400), ValueError, "step_size: expected"),
    "huge integer in params": (
        lambda: EMATarget({"n": 2**70}, 0.1),
        TypeError,
        r"params\['n'\]: .* got int",
    ),
    "step size a string": (lambda: EMATarget(PARAMS, "0.1"), TypeError, "step_size: .* got str"),
    "step size None": (lambda: EMATarget(PARAMS, None), TypeError, "step_size: .* got None"),
    "step size a boolean": (lambda: EMATarget(PARAMS, True), TypeError, r"step_size: .* got True"),
    "step size complex": (lambda: EMATarget(PARAMS, 1j), TypeError, "step_size: .* got 1j"),
    "step size a vector": (
        lambda: EMATarget(PARAMS, jnp.ones(3)),
        ValueError,
        r"step_size: .* shape \[3\]",
    ),
    "step size a list": (lambda: EMATarget(PARAMS, [0.1]), TypeError, "step_size: .* got list"),
    "schedule not hashable": (
        lambda: EMATarget(PARAMS, _Unhashable()),
        TypeError,
        "step_size: .* hashable",
    ),
    "EMA period 0": (
        lambda: EMATarget(PARAMS, 0.1, update_period=0),
        ValueError,
        "update_period: .* got 0",
    ),
    "period 0": (lambda: PeriodicTarget(PARAMS, 0), ValueError, "update_period: .* got 0"),
    "period negative": (lambda: PeriodicTarget(PARAMS, -5), ValueError, "update_period: .* got -5"),
    "period too large": (
        lambda: PeriodicTarget(PARAMS, 2**31),
        ValueError,
        "update_period: .* 2147483648",
    ),
    "period a float": (lambda: PeriodicTarget(PARAMS, 2.0), TypeError, r"update_period: .* got 2\.0"),
    "period a boolean": (lambda: PeriodicTarget(PARAMS, True), TypeError, "update_period: .* got True"),
    "period a string": (lambda: PeriodicTarget(PARAMS, "2"), TypeError, "update_period: .* got str"),
    "period a vector": (
        lambda: PeriodicTarget(PARAMS, np.arange(3)),
        ValueError,
        "update_period: expected a scalar, got shape",
    ),
    "EMA period a float": (
        lambda: EMATarget(PARAMS, 0.1, update_period=2.0),
        TypeError,
        r"update_period: .* got 2\.0",
    ),
    "period None": (lambda: PeriodicTarget(PARAMS, None), TypeError, "update_period: .* got None"),
    "period a device array": (
        lambda: PeriodicTarget(PARAMS, jnp.int32(2)),
        TypeError,
        "update_period: .*Python",
    ),
    "no step size": (lambda: EMATarget(PARAMS), TypeError, "step_size"),
    "no period": (lambda: PeriodicTarget(PARAMS), TypeError, "update_period"),
    "donate None": (lambda: EMATarget(PARAMS, 0.1, donate=None), TypeError, "donate"),
    "donate a number": (lambda: PeriodicTarget(PARAMS, 2, donate=1), TypeError, "donate"),
    "compensated None": (lambda: EMATarget(PARAMS, 0.1, compensated=None), TypeError, "compensated"),
    "skip_nonfinite 1": (lambda: EMATarget(PARAMS, 0.1, skip_nonfinite=1), TypeError, "skip_nonfinite"),
    "mask of other structure": (
        lambda: EMATarget(PARAMS, 0.1, mask={"a": True}),
        ValueError,
        r"mask\['c'\]: expected list as in params, or a boolean, got nothing",
    ),
    "mask of numbers": (
        lambda: EMATarget(PARAMS, 0.1, mask={"a": 1, "c": 0}),
        TypeError,
        r"mask\['a'\]: .* got int",
    ),
    "mask of strings": (lambda: EMATarget(PARAMS, 0.1, mask="a"), TypeError, "mask: .* got str"),
    "mask of a class": (
        lambda: EMATarget(PARAMS, 0.1, mask=nnx.Param),
        TypeError,
        "mask: expected booleans, or a function .*, got <class '.*Param'>",
    ),
    "mask that returns None": (
        lambda: EMATarget(PARAMS, 0.1, mask=lambda p: None),
        ValueError,
        "mask: ",
    ),
    "accumulator an integer": (
        lambda: EMATarget(PARAMS, 0.1, accumulator_dtype=jnp.int32),
        TypeError,
        "accumulator_dtype: expected a floating dtype, got int32",
    ),
    "accumulator complex": (
        lambda: EMATarget(PARAMS, 0.1, accumulator_dtype="complex64"),
        TypeError,
        "accumulator_dtype: expected a floating dtype, got complex64",
    ),
    "accumulator no dtype": (
        lambda: EMATarget(PARAMS, 0.1, accumulator_dtype="x"),
        TypeError,
        "accumulator_dtype",
    ),
    "unknown argument": (lambda: EMATarget(PARAMS, 0.1, decay=0.9), TypeError, "decay"),
    "settings by position": (lambda: EMATarget(PARAMS, 0.1, 2), TypeError, "positional"),
}


class _Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, n: jax.Array) -> jax.Array:
        return n


@pytest.mark.parametrize("case", SETTINGS)
def test_invalid_arguments_of_the_constructors(case: str) -> None:
    make, error, message = SETTINGS[case]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (
            lambda n: jnp.stack([n, n]),
            ValueError,
            r"as the schedule returned it: expected a scalar, got shape",
        ),
        (lambda n: "0.1", TypeError, "as the schedule returned it: expected a real scalar, got str"),
        (lambda n: None, TypeError, "as the schedule returned it: expected a real scalar, got None"),
        (
            lambda n: n * 1j,
            TypeError,
            "as the schedule returned it: expected a real scalar, got complex64",
        ),
        (lambda n: 1 / 0, ZeroDivisionError, "division"),
        (lambda n: [0.1], TypeError, "as the schedule returned it: expected a real scalar, got list"),
        (lambda n: n > 0, TypeError, "as the schedule returned it: expected a real scalar, got bool"),
        (
            lambda n: 10**400,
            TypeError,
            "as the schedule returned it: expected a real scalar, got an integer that jax",
        ),
        (lambda: 0.1, TypeError, "argument"),
        (lambda n: 0.1 if n > 3 else 0.2, jax.errors.TracerBoolConversionError, "boolean"),
    ],
)
def test_schedules_that_fail(schedule: Any, error: type[Exception], message: str) -> None:
    target = EMATarget(PARAMS, schedule)
    for call in (EMATarget.update, jitted_update):
        with pytest.raises(error, match=message):
            call(target, ONLINE_PARAMS)
        assert target.step == 0
        assert_same(target.params, PARAMS)


def test_a_mistake_is_found_on_the_first_update_and_checks_cost_nothing_later() -> None:
    target = PeriodicTarget(PARAMS, 10)
    with pytest.raises(ValueError, match="got nothing"):
        target.update(without_w())
    target.update(ONLINE_PARAMS)
    target.update(without_w())  # between syncs nothing is read or checked
    again = jax.tree.map(lambda x: x, target)
    with pytest.raises(ValueError, match="got nothing"):
        again.update(without_w())


def test_nnx_states_that_do_not_fit_are_named_by_path() -> None:
    network = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    everything, parameters = nnx.state(network), nnx.state(network, nnx.Param)
    for held, given, path, what in (
        (parameters, everything, "mean", "expected nothing as in the slow copy, got "),
        (everything, parameters, "mean", "expected .* as in the slow copy, got nothing"),
    ):
        target = EMATarget(held, 0.5)
        for method in (target.update, target.sync, target.distance):
            with pytest.raises(ValueError, match=rf"online_params\['{path}'\]: {what}"):
                method(given)
    with pytest.raises(
        ValueError, match=r"online_params\['bias'\]: expected float32\[2\] .* got nothing"
    ):
        PeriodicTarget(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 5).update(
            nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        )


@pytest.mark.parametrize("kind", TARGETS)
def test_an_abstract_target_must_be_restored_first(kind: str) -> None:
    abstract = jax.eval_shape(TARGETS[kind])
    for method in ("update", "sync", "distance"):
        with pytest.raises(TypeError, match=f"^{method}: this target is abstract, .* restore it first"):
            getattr(abstract, method)(ONLINE_PARAMS)


@pytest.mark.parametrize("donate", [False, True])
def test_a_target_restored_without_its_step_size_refuses_updates(donate: bool) -> None:
    def make() -> Any:
        return EMATarget({"w": jnp.zeros(2)}, jnp.float32(0.5), donate=donate)

    restored = from_bytes(jax.eval_shape(make), to_bytes(make()))
    with pytest.raises(TypeError, match=r"^update: the step size is abstract.* that has a step size"):
        restored.update({"w": jnp.ones(2)})
    assert restored.sync({"w": jnp.ones(2)}).step == 0


@pytest.mark.parametrize(
    "settings", [{}, {"compensated": True}, {"accumulator_dtype": "float64"}], ids=str
)
def test_a_target_made_under_x64_is_refused_without_it(settings: dict[str, Any]) -> None:
    dtype = np.float32 if "accumulator_dtype" in settings else np.float64
    with jax.enable_x64(True):
        target = EMATarget({"w": np.ones(2, dtype)}, 0.5, **settings)
    online = {"w": np.zeros(2, dtype)}
    for call in (target.update, target.sync, target.updated, target.distance):
        with pytest.raises(
            ValueError, match=r"the slow copy\['w'\]: float64 was made with jax_enable_x64"
        ):
            call(online)
    if "accumulator_dtype" in settings:
        with pytest.raises(ValueError, match="jax_enable_x64"):
            _ = target.params
    with jax.enable_x64(True):
        assert target.update(online).params["w"].dtype == dtype
        assert target.step == 1
        old = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"old_tensors\['w'\]: float64 was made with jax_enable_x64"):
        incremental_update(online, old, 0.5)


def test_the_classes_are_final() -> None:
    for parent in (EMATarget, PeriodicTarget):
        with pytest.raises(TypeError, match="Mine: the classes of targets are final"):

            class Mine(parent):  # type: ignore[misc, valid-type]
                pass


@pytest.mark.parametrize(
    "make", [lambda p: EMATarget(p, 0.5, donate=True), lambda p: PeriodicTarget(p, 1, donate=True)]
)
def test_a_donating_target_may_be_updated_with_its_own_parameters(make: Any) -> None:
    target = make({"w": jnp.ones(3), "b": jnp.zeros(2)})
    for change in (target.update, target.sync):
        params = target.params
        change({"w": params["w"], "b": jnp.ones(2)})
        np.testing.assert_array_equal(target.params["w"], np.ones(3))


# For those who come from elsewhere

FOREIGN = [
    (EMATarget, {"decay": 0.995}, "EMATarget has no argument decay: write step_size=0.005"),
    (EMATarget, {"beta": 0.9999}, "EMATarget has no argument beta: write step_size=0.0001"),
    (EMATarget, {"momentum": 0.99}, "EMATarget has no argument momentum: write step_size=0.01"),
    (EMATarget, {"polyak": 0.995}, "EMATarget has no argument polyak: write step_size=0.005"),
    (EMATarget, {"decay": jnp.float32(0.9)}, "no argument decay: write step_size=1 - decay"),
    (EMATarget, {"tau": 0.005}, "EMATarget has no argument tau: write step_size=0.005"),
    (EMATarget, {"step_size": 0.1, "update_every": 10}, "update_every: write update_period=10"),
    (
        EMATarget,
        {"step_size": 0.1, "update_after_step": 100},
        r"write step_size=schedules.delayed\(100, ",
    ),
    (PeriodicTarget, {"period": 500}, "PeriodicTarget has no argument period: write update_period=500"),
    (PeriodicTarget, {"interval": 500}, "no argument interval: write update_period=500"),
    (PeriodicTarget, {"tau": 0.005}, r"no argument tau: write EMATarget\(params, step_size=0.005\)"),
]


@pytest.mark.parametrize(
    ("make", "arguments", "message"), FOREIGN, ids=[str(case[1]) for case in FOREIGN]
)
def test_a_name_from_elsewhere_is_answered_with_the_line_to_write(
    make: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        make(PARAMS, **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        make(PARAMS, 1, colour=1)


@pytest.mark.parametrize("decay", [0.9, 0.995, np.float32(0.99), 0.9999])
def test_a_decay_in_place_of_a_step_size_warns(decay: Any) -> None:
    target = EMATarget(PARAMS, 0.5)
    for make in (
        lambda: EMATarget(PARAMS, decay),
        lambda: setattr(target, "step_size", decay),
        lambda: schedules.cosine(decay, 100),
        lambda: schedules.bias_corrected(decay),
        lambda: schedules.ramp(decay),
        lambda: schedules.delayed(100, decay),
    ):
        with pytest.warns(UserWarning, match="A decay of .* is (.*step_size|then)=0") as caught:
            make()
        assert caught[0].filename == __file__
    for right in (0.89, 1, 1.0, jnp.float32(0.995)):
        EMATarget(PARAMS, right)


def test_several_differences_are_named() -> None:
    slow = {name: jnp.ones(2) for name in "abcdef"}
    target = PeriodicTarget(slow, 1)
    renamed = {**slow, "bias": slow["b"]}
    del renamed["b"]
    message = r"\['b'\]: expected .* got nothing; .*\['bias'\]: expected nothing"
    with pytest.raises(ValueError, match=message):
        target.update(renamed)
    with pytest.raises(ValueError, match=r"\['a'\].*\['b'\].*\['c'\].*; 12 differences in all"):
        target.update({name.upper(): x for name, x in slow.items()})


def test_frozen_dicts_say_how_to_thaw_them() -> None:
    plain = {"w": {"b": jnp.ones(2)}}
    for held, given, mend in (
        (plain, freeze(plain), r"got FrozenDict \(call flax.core.unfreeze on it\)"),
        (freeze(plain), plain, r"got dict \(call flax.core.freeze on it\)"),
    ):
        with pytest.raises(ValueError, match=mend):
            PeriodicTarget(held, 1).update(given)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            {"a": True, "c": {"x": True}},
            r"mask\['c'\]: expected list .*, or a boolean, got dict",
        ),
        ({"a": {"w": True}, "c": False}, r"mask\['a'\]\['b'\]: expected .*, or a boolean, got nothing"),
        ({"a": True, "c": False, "d": True}, r"mask\['d'\]: expected nothing .*, got bool"),
        ({"a": True, "c": "no"}, r"mask\['c'\]: expected a boolean, got str"),
    ],
    ids=str,
)
def test_a_mask_that_is_no_prefix_is_named_by_path(mask: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        EMATarget(PARAMS, 0.5, mask=mask)


@pytest.mark.parametrize("kind", ["ema", "periodic"])
def test_deleted_arrays_are_named(kind: str) -> None:
    online, target = perturb({"w": jnp.ones(3)}), MAKERS[kind]({"w": jnp.ones(3)})
    target.update(online)
    jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)(online)
    for call in (target.update, target.sync, target.distance, lambda p: incremental_update(p, p, 0.5)):
        with pytest.raises(RuntimeError, match=r"(params|tensors)\['w'\]: this array has been deleted"):
            call(online)
    jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)(target.params)
    with pytest.raises(RuntimeError, match=r"the slow copy\['w'\]: this array has been deleted"):
        target.distance({"w": jnp.ones(3)})


def test_settings_are_checked_before_anything_is_copied() -> None:
    deleted = {"w": jnp.ones(3)}
    deleted["w"].delete()
    for wrong in (
        {"step_size": 1.5},
        {"step_size": 0.5, "update_period": 0},
        {"step_size": 0.5, "donate": 1},
    ):
        with pytest.raises((TypeError, ValueError), match=r"^(step_size|update_period|donate): "):
            EMATarget(deleted, **wrong)
    with pytest.raises(ValueError, match="update_period"):
        PeriodicTarget(deleted, 0)
