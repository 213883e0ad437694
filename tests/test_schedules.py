"""Each schedule follows its closed form in float32 at any n, and is a hashable, picklable value."""

import copy
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from target_nets import EMATarget, schedules

# How to make each schedule, and its formula in float64.
FORMS: dict[str, tuple[Callable[[], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "cosine": (
        lambda: schedules.cosine(0.004, 1000),
        lambda n: 0.004 * np.sin(np.pi / 2 * (1000 - np.minimum(n, 1000)) / 1000) ** 2,
    ),
    "cosine, long": (
        lambda: schedules.cosine(1, 2**31 - 1),
        lambda n: np.sin(np.pi / 2 * (2**31 - 1 - n) / (2**31 - 1)) ** 2,
    ),
    "inverse_power": (
        lambda: schedules.inverse_power(),
        lambda n: np.where(n == 0, 1, np.clip((1 + n) ** (-2 / 3), 1e-4, 1)),
    ),
    "inverse_power, all settings": (
        lambda: schedules.inverse_power(
            inv_gamma=10, power=0.75, min_step_size=0.001, max_step_size=0.5
        ),
        lambda n: np.where(n == 0, 1, np.clip((1 + n / 10) ** -0.75, 0.001, 0.5)),
    ),
    "ramp": (lambda: schedules.ramp(1e-6), lambda n: np.maximum(1e-6, 9 / (10 + n))),
    "uniform": (lambda: schedules.uniform(), lambda n: 1 / (n + 1)),
    "bias_corrected": (
        lambda: schedules.bias_corrected(0.01),
        lambda n: 0.01 / -np.expm1((n + 1) * np.log1p(-0.01)),
    ),
    "bias_corrected, small": (
        lambda: schedules.bias_corrected(1e-6),
        lambda n: 1e-6 / -np.expm1((n + 1) * np.log1p(-1e-6)),
    ),
    "bias_corrected, 1": (lambda: schedules.bias_corrected(1), lambda n: np.ones_like(n)),
    "power_function": (
        lambda: schedules.power_function(gamma=6.94),
        lambda n: np.where(n == 0, 1, -np.expm1(7.94 * np.log1p(-1 / np.maximum(n + 1, 2)))),
    ),
    "delayed, number": (lambda: schedules.delayed(10, 0.005), lambda n: np.where(n < 10, 1, 0.005)),
    "delayed, schedule": (
        lambda: schedules.delayed(500, schedules.cosine(0.1, 500)),
        lambda n: np.where(
            n < 500, 1, 0.1 * np.sin(np.pi / 2 * (1000 - np.clip(n, 500, 1000)) / 500) ** 2
        ),
    ),
    "delayed, twice": (
        lambda: schedules.delayed(5, schedules.delayed(5, schedules.uniform())),
        lambda n: np.where(n < 10, 1, 1 / np.maximum(n - 9, 1)),
    ),
    "power_function, 0": (lambda: schedules.power_function(gamma=0), lambda n: 1 / (n + 1)),
}
NS = np.array([0, 1, 2, 5, 9, 10, 99, 499, 999, 1000, 1001, 12_345, 10**6, 10**7, 2**24 + 1, 2**31 - 1])


@pytest.mark.parametrize("name", FORMS)
def test_the_closed_form_in_float32_at_any_n(name: str) -> None:
    make, formula = FORMS[name]
    schedule, expected = make(), formula(NS.astype(np.float64))
    got = jax.jit(jax.vmap(schedule))(jnp.asarray(NS, jnp.int32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-37)
    for n, value in zip(NS, expected, strict=True):
        for number in (int(n), np.int32(n), jnp.int32(n)):
            np.testing.assert_allclose(schedule(number), value, rtol=2e-6, atol=1e-37)
    with jax.enable_x64(True):
        wide = jax.vmap(schedule)(jnp.asarray(NS))
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, expected, rtol=1e-13, atol=1e-18)


@pytest.mark.parametrize("name", FORMS)
def test_every_value_is_a_step_size(name: str) -> None:
    schedule = FORMS[name][0]()
    values = jax.vmap(schedule)(jnp.asarray(NS, jnp.int32))
    assert ((values >= 0) & (values <= 1)).all()
    if not name.startswith(("cosine", "ramp")):  # the others begin with a copy
        assert schedule(0) == 1
    if name.startswith("cosine"):
        assert schedule(schedule.total_steps) == 0


def test_numbers_of_any_type_are_the_same_setting() -> None:
    for number in (np.float16(0.5), np.float64(0.5), Fraction(1, 2)):
        schedule = schedules.cosine(number, np.int64(10))
        assert schedule == schedules.cosine(0.5, 10)
        with jax.numpy_dtype_promotion("strict"), jax.debug_infs(True):
            assert schedule(0) == 0.5
            assert schedules.bias_corrected(1)(np.int8(3)) == 1
            assert schedules.power_function(gamma=np.int8(127))(0) == 1
    assert schedules.inverse_power(inv_gamma=2**40)(1) == 1


def test_the_formulas_of_the_papers() -> None:
    # BYOL: tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2
    byol = schedules.cosine(1 - 0.996, 300)
    for k in range(301):
        tau = 1 - (1 - 0.996) * (math.cos(math.pi * k / 300) + 1) / 2
        np.testing.assert_allclose(1 - byol(k), tau, rtol=1e-7)
    # TensorFlow: decay = min(decay, (1 + num_updates) / (10 + num_updates))
    ramp = schedules.ramp(0.001)
    for n in range(0, 20_000, 97):
        np.testing.assert_allclose(1 - ramp(n), min(0.999, (1 + n) / (10 + n)), rtol=1e-6)
    # EDM2: sigma_rel = (gamma + 1)**0.5 / ((gamma + 2) (gamma + 3)**0.5); 6.94 and 16.97 are the paper's
    for sigma_rel, gamma in ((0.10, 6.94), (0.05, 16.97)):
        got = schedules.power_function(sigma_rel=sigma_rel).gamma
        assert round(got, 2) == gamma
        np.testing.assert_allclose((got + 1) ** 0.5 / ((got + 2) * (got + 3) ** 0.5), sigma_rel)


def iterates(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32)


def averaged(schedule: Any, online: np.ndarray, start: Any = 7.0) -> np.ndarray:
    target = EMATarget({"w": jnp.full(3, start)}, schedule)
    target, slow = jax.lax.scan(lambda t, x: (t.update({"w": x}), t.params["w"]), target, online)
    return np.asarray(slow)


def test_bias_correction_is_that_of_adam() -> None:
    online, ema = iterates(50), optax.ema(0.9, debias=True)
    state, expected = ema.init(jnp.zeros(3)), []
    for x in online:
        value, state = ema.update(jnp.asarray(x), state)
        expected.append(value)
    np.testing.assert_allclose(averaged(schedules.bias_corrected(0.1), online), expected, rtol=1e-4)


def test_uniform_is_the_mean_and_a_power_function_has_weights_of_a_power() -> None:
    online = iterates(300)
    means = np.cumsum(online.astype(np.float64), 0) / np.arange(1, 301)[:, None]
    np.testing.assert_allclose(averaged(schedules.uniform(), online), means, atol=2e-6)
    # The weight of iterate i tends to i**gamma; it is exactly a ratio of gamma functions.
    slow = averaged(schedules.power_function(gamma=2), online)[-1]
    steps = np.arange(1, 301, dtype=np.float64)
    rest = np.cumprod(np.append(1, (1 - 1 / steps[:0:-1]) ** 3))[::-1]
    weights = (1 - (1 - 1 / steps) ** 3) * rest
    np.testing.assert_allclose(weights.sum(), 1)
    np.testing.assert_allclose(weights / weights[-1], (steps / 300) ** 2, atol=0.01)
    np.testing.assert_allclose(slow, weights @ online, atol=2e-6)


def test_schedules_agree_with_torch_and_ema_pytorch() -> None:
    torch = pytest.importorskip("torch")
    from torch.optim.swa_utils import AveragedModel

    model = torch.nn.Linear(3, 1, bias=False)
    mean, online = AveragedModel(model), iterates(20)
    for x in online:
        model.weight.data[0] = torch.tensor(x)
        mean.update_parameters(model)
    expected = mean.module.weight.detach().numpy()[0]
    np.testing.assert_allclose(averaged(schedules.uniform(), online)[-1], expected, rtol=1e-5)
    ema_pytorch = pytest.importorskip("ema_pytorch")
    warm_up = ema_pytorch.EMA(model, beta=0.999, inv_gamma=3.0, power=0.75, update_after_step=0)
    schedule = schedules.inverse_power(inv_gamma=3, power=0.75, min_step_size=0.001)
    for n in range(1, 30_000, 997):
        warm_up.step.fill_(n + 1)  # its step after n updates
        np.testing.assert_allclose(1 - schedule(n), warm_up.get_current_decay(), rtol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_a_schedule_is_a_value(name: str) -> None:
    make, _ = FORMS[name]
    schedule, twin = make(), make()
    assert schedule == twin
    assert hash(schedule) == hash(twin)
    for copied in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), copy.copy(schedule)):
        assert copied == schedule
        assert copied(3) == schedule(3)
    assert repr(schedule).startswith(name.partition(",")[0] + "(")
    assert schedule != schedules.cosine(0.5, 7)
    with pytest.raises(AttributeError):
        schedule.total_steps = 3
    target = EMATarget({"w": 1.0}, schedule)
    assert pickle.loads(pickle.dumps(target)).update({"w": 3.0}).step == 1


@pytest.mark.parametrize("name", FORMS)
def test_an_equal_schedule_compiles_nothing_again(name: str, trace_counter: Any) -> None:
    params = {"w": jnp.ones(23)}
    update = jax.jit(lambda target, params: target.update(params))  # a cache of its own
    with trace_counter() as compiled:
        EMATarget(params, FORMS[name][0]()).update(params)
        update(EMATarget(params, FORMS[name][0]()), params)
    assert compiled
    with trace_counter() as compiled:
        EMATarget(params, FORMS[name][0]()).update(params)
        update(EMATarget(params, FORMS[name][0]()), params)
    assert not compiled


def test_copies_until_a_step_and_averages_afterwards() -> None:
    schedule = optax.join_schedules([optax.constant_schedule(1.0), schedules.uniform()], [5])
    online = iterates(12)
    slow = averaged(schedule, online)
    np.testing.assert_array_equal(slow[:5], online[:5])
    np.testing.assert_allclose(slow[-1], online[5:].mean(0), rtol=1e-5)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "base above 1": (
        lambda: schedules.cosine(1.5, 10),
        ValueError,
        r"base_step_size: .*\[0, 1\], got 1.5",
    ),
    "base nan": (lambda: schedules.cosine(math.nan, 10), ValueError, "base_step_size: .* got nan"),
    "base an array": (lambda: schedules.cosine(jnp.ones(()), 10), TypeError, "base_step_size: .* Array"),
    "base a bool": (lambda: schedules.cosine(True, 10), TypeError, "base_step_size: .* True"),
    "no steps": (lambda: schedules.cosine(0.1, 0), ValueError, "total_steps: expected 1 to .*, got 0"),
    "steps a float": (
        lambda: schedules.cosine(0.1, 10.0),
        TypeError,
        "total_steps: .* integer, got 10.0",
    ),
    "inv_gamma 0": (
        lambda: schedules.inverse_power(inv_gamma=0),
        ValueError,
        r"inv_gamma: .* got 0",
    ),
    "power below 0": (lambda: schedules.inverse_power(power=-1), ValueError, "power: .* got -1"),
    "power inf": (lambda: schedules.inverse_power(power=math.inf), ValueError, "power: .* got inf"),
    "max above 1": (
        lambda: schedules.inverse_power(max_step_size=1.5),
        ValueError,
        r"max_step_size: .* got 1\.5",
    ),
    "min above max": (
        lambda: schedules.inverse_power(min_step_size=0.5, max_step_size=0.1),
        ValueError,
        "min_step_size: expected at most max_step_size=0.1, got 0.5",
    ),
    "too many steps": (lambda: schedules.cosine(0.1, 2**31), ValueError, "total_steps: .*2147483648"),
    "huge": (lambda: schedules.inverse_power(inv_gamma=10**400), ValueError, "inv_gamma: "),
    "tiny width": (lambda: schedules.power_function(sigma_rel=1e-160), ValueError, "sigma_rel: "),
    "tiny": (lambda: schedules.bias_corrected(1e-39), ValueError, "step_size: .* got 1e-39"),
    "ramp a string": (lambda: schedules.ramp("0.1"), TypeError, "min_step_size: .* '0.1'"),
    "correction of 0": (
        lambda: schedules.bias_corrected(0),
        ValueError,
        r"step_size: .*\[1e-30, 1\], got 0",
    ),
    "neither": (
        lambda: schedules.power_function(),
        ValueError,
        "gamma, sigma_rel: expected one of them",
    ),
    "both": (lambda: schedules.power_function(gamma=1, sigma_rel=0.1), ValueError, "gamma, sigma_rel: "),
    "gamma below 0": (lambda: schedules.power_function(gamma=-0.5), ValueError, "gamma: .* got -0.5"),
    "too wide": (
        lambda: schedules.power_function(sigma_rel=0.3),
        ValueError,
        r"sigma_rel: expected a number in \[1e-06, 0.2887\], got 0.3",
    ),
    "width 0": (lambda: schedules.power_function(sigma_rel=0), ValueError, "sigma_rel: .* got 0"),
    "width of a power below 0": (lambda: schedules.sigma_rel_of(-0.5), ValueError, "gamma: .* got -0.5"),
    "by position": (lambda: schedules.power_function(6.94), TypeError, "positional"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_settings(case: str) -> None:
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


@hypothesis_settings(deadline=None)
@given(st.floats(1e-30, 1))
@pytest.mark.filterwarnings("ignore:.*A decay of")
def test_a_bias_corrected_average_begins_with_a_copy(step_size: float) -> None:
    assert schedules.bias_corrected(step_size)(0) == 1


@hypothesis_settings(deadline=None)
@given(st.floats(0, 9e5))
def test_gamma_and_sigma_rel_are_inverse(gamma: float) -> None:
    width = (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)
    np.testing.assert_allclose(
        schedules.power_function(sigma_rel=width).gamma, gamma, rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(schedules.sigma_rel_of(gamma), width)


# A late start, as in other libraries (their formulas, written out; theirs count updates from 1)


def timm(step: int, after: int, decay: float, warmup: bool) -> float:
    """Returns the step size of timm's ModelEmaV3."""
    k = max(0, step - after - 1)
    if k == 0:
        return 1.0
    return 1 - (max(min(1 - (1 + k) ** (-2 / 3), decay), 0.0) if warmup else decay)


def diffusers(step: int, after: int, decay: float) -> float:
    """Returns the step size of diffusers' EMAModel with its warm-up."""
    k = max(0, step - after - 1)
    return 1.0 if k == 0 else 1 - max(min(1 - (1 + k) ** (-2 / 3), decay), 0.0)


@pytest.mark.parametrize("after", [1, 5, 100])
def test_delayed_is_the_late_start_of_timm_and_diffusers(after: int) -> None:
    ours = {
        "number": schedules.delayed(after + 1, 1e-3),
        "warm-up": schedules.delayed(after, schedules.inverse_power(min_step_size=1e-3)),
    }
    for n in range(3 * after + 5):
        np.testing.assert_allclose(ours["number"](n), timm(n + 1, after, 0.999, False), rtol=1e-6)
        np.testing.assert_allclose(ours["warm-up"](n), timm(n + 1, after, 0.999, True), rtol=1e-6)
        np.testing.assert_allclose(ours["warm-up"](n), diffusers(n + 1, after, 0.999), rtol=1e-6)


def test_before_the_start_the_slow_copy_is_the_online_one() -> None:
    target = EMATarget({"w": jnp.zeros(2)}, schedules.delayed(3, 0.5), update_period=2)
    for step in range(1, 7):
        target.update({"w": jnp.full(2, step)})
        np.testing.assert_array_equal(target.params["w"], np.full(2, step - step % 2))
    target.update({"w": jnp.full(2, 7.0)}).update({"w": jnp.full(2, 8.0)})
    np.testing.assert_array_equal(target.params["w"], np.full(2, 7.0))


@pytest.mark.parametrize(
    ("start", "then", "error", "message"),
    [
        (0, 0.1, ValueError, "start: expected 1 to"),
        (True, 0.1, TypeError, "start: expected an integer"),
        (2, 1.5, ValueError, "then: expected a number in"),
        (2, "0.1", TypeError, "then: expected a number"),
        (2, None, TypeError, "then: expected a number"),
    ],
)
def test_arguments_of_delayed(start: Any, then: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        schedules.delayed(start, then)


@pytest.mark.parametrize(
    "name", sorted(FORMS.keys() - {"cosine, long"})
)  # whose formula ends at 2**31-1
def test_integers_of_64_bits_on_the_host(name: str) -> None:
    make, form = FORMS[name]
    for n in (2**31, np.int64(2**40), np.array([2**31, 2**33])):
        expected = form(np.asarray(n, np.float64))
        np.testing.assert_allclose(make()(n), np.maximum(expected, 0), rtol=1e-5, atol=1e-12)
