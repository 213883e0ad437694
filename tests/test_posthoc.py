"""Post-hoc averages, compared with the integrals of the paper and with averages during training."""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.comparisons import arrays, assert_same
from helpers.trees import Network, perturb
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy.integrate import quad

from target_nets import EMATarget, posthoc, schedules

PAIR = [schedules.power_function(sigma_rel=s).gamma for s in (0.05, 0.1)]


def profile(tau: float, step: float, gamma: float) -> float:
    """The density of an average's weight at time tau (EDM2, section 3.1)."""
    return (gamma + 1) / step * (tau / step) ** gamma if tau <= step else 0.0


def product(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The inner product of two profiles, by quadrature."""
    end = min(a[0], b[0])
    scaled = quad(lambda x: end * profile(x * end, *a) * end * profile(x * end, *b), 0, 1, epsrel=1e-12)
    return scaled[0] / end


def by_quadrature(profiles: list[tuple[float, float]], target: tuple[float, float]) -> np.ndarray:
    """The weights from the normal equations."""
    products = np.array([[product(a, b) for b in profiles] for a in profiles])
    return np.linalg.solve(products, [product(a, target) for a in profiles])


def stored(times: int, total: float, gammas: list[float] = PAIR) -> list[tuple[float, float]]:
    """Returns the profiles of snapshots that were taken at equal intervals of a run."""
    return [(total * (i + 1) / times, gamma) for i in range(times) for gamma in gammas]


@pytest.mark.parametrize(
    ("total", "target"),
    [
        (1e-6, (0.75, 3.0)),
        (1.0, (1.0, 10.0)),
        (1.0, (0.75, 3.0)),
        (1.0, (0.6, 0.0)),
        (1.0, (1.0, 500.0)),
        (1000.0, (0.6, 0.0)),
        (2.0**31, (1.0, 500.0)),
    ],
)
def test_the_closed_forms_are_the_integrals(total: float, target: tuple[float, float]) -> None:
    profiles, target = stored(4, total), (total * target[0], target[1])
    got = posthoc.solve_weights(*zip(*profiles, strict=True), *target)
    assert got.dtype == np.float64
    assert got.shape == (8,)
    np.testing.assert_allclose(got, by_quadrature(profiles, target), rtol=1e-7, atol=1e-9)


@hypothesis_settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 30)), min_size=2, max_size=6, unique=True),
    st.floats(0.01, 1),
    st.floats(0, 50),
    st.floats(1e-6, 1e6),
)
def test_the_residual_is_orthogonal_to_every_snapshot(
    profiles: list[tuple[int, int]], part: float, gamma: float, unit: float
) -> None:
    target = (part * max(step for step, _ in profiles), gamma)
    weights = posthoc.solve_weights(*zip(*profiles, strict=True), *target)
    for a in profiles:
        left = product(a, target) - sum(
            w * product(a, b) for w, b in zip(weights, profiles, strict=True)
        )
        assert abs(left) < 1e-7 * (product(a, a) * product(target, target)) ** 0.5
    scaled = posthoc.solve_weights(
        [step * unit for step, _ in profiles], [g for _, g in profiles], target[0] * unit, gamma
    )
    np.testing.assert_allclose(scaled, weights, rtol=1e-5, atol=1e-7)  # any unit of time will do


def test_ema_pytorch_has_the_same_weights() -> None:
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("ema_pytorch.post_hoc_ema")
    for times, gamma, part in itertools.product((1, 4, 32), (0.0, 3.0, 10.0, 40.0), (0.5, 1.0)):
        steps, gammas = (np.array(x) for x in zip(*stored(times, 1024), strict=True))
        got = posthoc.solve_weights(steps, gammas, 1024 * part, gamma)
        target = (torch.tensor([1024 * part]), torch.tensor([gamma]))
        expected = peer.solve_weights(torch.tensor(steps), torch.tensor(gammas), *target)
        np.testing.assert_allclose(got, expected[:, 0], rtol=1e-6, atol=1e-9)


def test_a_stored_average_is_reconstructed_as_it_is() -> None:
    profiles = stored(8, 1000)
    for index, (step, gamma) in enumerate(profiles):
        got = posthoc.solve_weights(*zip(*profiles, strict=True), step, gamma)
        np.testing.assert_allclose(got, np.eye(16)[index], atol=1e-11)
        snapshots = [(*profile, np.float32(i)) for i, profile in enumerate(profiles)]
        assert abs(posthoc.reconstruct(snapshots, gamma=gamma, step=step) - index) < 1e-5


def test_long_runs_and_short_averages_do_not_overflow() -> None:
    profiles = stored(64, 2.0**31, [1e4, 1e5])  # averages so short that only the last two matter
    got = posthoc.solve_weights(*zip(*profiles, strict=True), 2**31, 5e4)
    np.testing.assert_allclose(got[-2:], posthoc.solve_weights([1, 1], [1e4, 1e5], 1, 5e4))
    np.testing.assert_allclose(got[:-2], 0, atol=1e-12)
    assert np.all(posthoc.solve_weights([1e-30, 1e30], [1e30, 1e30], 1e-25, 1e30) == 0)


@pytest.mark.parametrize("apart", [1e-13, 1e-9, 1e-7])
def test_snapshots_that_nearly_coincide_share_their_weight(apart: float) -> None:
    expected = posthoc.solve_weights([1000, 500], [6.94, 16.97], 1000, 10)
    got = posthoc.solve_weights([1000, 1000, 500], [6.94, 6.94 * (1 + apart), 16.97], 1000, 10)
    np.testing.assert_allclose(got, [expected[0] / 2, expected[0] / 2, expected[1]], atol=1e-5)


def test_the_width_of_a_power() -> None:
    for sigma_rel, gamma in ((0.05, 16.97), (0.10, 6.94), (12**-0.5, 0)):  # the paper's; the mean
        np.testing.assert_allclose(schedules.sigma_rel_of(gamma), sigma_rel, atol=5e-5)
    for gamma in (0.0, 0.5, 3.0, 1000.0):
        width = schedules.sigma_rel_of(gamma)
        mean = quad(lambda x, gamma=gamma: x * profile(x, 1, gamma), 0, 1)[0]
        square = quad(lambda x, m=mean, gamma=gamma: (x - m) ** 2 * profile(x, 1, gamma), 0, 1)[0]
        np.testing.assert_allclose(width, square**0.5, rtol=1e-6)
        np.testing.assert_allclose(schedules.gamma_of(width), gamma, rtol=1e-9, atol=1e-9)


# Reconstruction

TOTAL, SIZE = 2048, 1000


def weights_of_iterates(gamma: float, step: int = TOTAL) -> np.ndarray:
    """Returns the weight of each iterate after so many averagings: the integral of the profile."""
    return np.diff(np.minimum(np.arange(TOTAL + 1) / step, 1) ** (gamma + 1))


@pytest.fixture(scope="module", name="trajectories")
def _trajectories() -> dict[str, np.ndarray]:
    """Iterates of shape (TOTAL, SIZE): noise, and training that leaves its start and ends noisy."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((TOTAL, SIZE))
    start, end = rng.standard_normal((2, SIZE))
    path = end + (start - end) * np.exp(-np.arange(TOTAL) / 200)[:, None]
    return {"noise": noise, "training": path + 0.1 * noise}


@pytest.fixture(scope="module", name="slow")
def _slow(trajectories: dict[str, np.ndarray]) -> dict[tuple[str, float], np.ndarray]:
    """The averages after each update, computed during training."""

    def averages(target: Any, online: Any) -> Any:
        return jax.lax.scan(lambda t, x: (t.update(x), t.params), target, online)[1]

    return {
        (name, gamma): np.asarray(
            jax.jit(averages)(
                EMATarget(jnp.zeros(SIZE), schedules.power_function(gamma=gamma)),
                online.astype(np.float32),
            )
        )
        for name, online in trajectories.items()
        for gamma in PAIR
    }


def snapshots_of(slow: Any, name: str, times: int) -> list[tuple[int, float, Any]]:
    steps = [TOTAL * (i + 1) // times for i in range(times)]
    return [(step, gamma, slow[name, gamma][step - 1]) for step in steps for gamma in PAIR]


def rms(x: np.ndarray) -> float:
    return float(np.mean(np.asarray(x, np.float64) ** 2) ** 0.5)


# Number of snapshots, width, and the largest errors: of noise, relative to the average, and of training.
ERRORS = [
    (8, 0.04, 0.07, 6e-4),
    (8, 0.07, 0.04, 3e-4),
    (8, 0.15, 0.12, 8e-4),
    (16, 0.04, 0.04, 3e-4),
    (16, 0.07, 0.02, 1e-4),
    (16, 0.15, 0.04, 3e-4),
    (64, 0.02, 0.05, 5e-4),
    (64, 0.04, 0.004, 4e-5),
    (64, 0.07, 0.0015, 1e-5),
    (64, 0.15, 0.003, 2e-5),
    (64, 0.25, 0.04, 6e-3),
]


@pytest.mark.parametrize(("count", "sigma_rel", "noise", "training"), ERRORS)
def test_a_known_trajectory(
    trajectories: Any, slow: Any, count: int, sigma_rel: float, noise: float, training: float
) -> None:
    gamma = schedules.power_function(sigma_rel=sigma_rel).gamma
    errors = {}
    for name, online in trajectories.items():
        direct = weights_of_iterates(gamma) @ online
        got = posthoc.reconstruct(snapshots_of(slow, name, count // 2), sigma_rel=sigma_rel)
        errors[name] = rms(got - direct) / (rms(direct) if name == "noise" else 1)
    assert errors["noise"] < noise
    assert errors["training"] < training
    # No sum of the snapshots is much closer, whatever its weights.
    profiles = np.array([weights_of_iterates(g, s) for s, g in stored(count // 2, TOTAL)])
    wanted = weights_of_iterates(gamma)
    best = np.linalg.lstsq(profiles.T, wanted, rcond=None)[0]
    closest = np.linalg.norm(best @ profiles - wanted) / np.linalg.norm(wanted)
    assert 0.85 * closest < errors["noise"] < 1.15 * closest


def test_an_average_that_ends_earlier(trajectories: Any, slow: Any) -> None:
    snapshots = snapshots_of(slow, "training", 16)
    for step in (TOTAL // 2, TOTAL // 16 * 15):
        direct = weights_of_iterates(10, step) @ trajectories["training"]
        got = posthoc.reconstruct(snapshots, gamma=10, step=jnp.int32(step))
        assert rms(got - direct) < 2e-4
    last = posthoc.reconstruct(snapshots, gamma=10, step=TOTAL)
    assert_same(posthoc.reconstruct(iter(snapshots), gamma=10), last)
    # Snapshots after the end have little weight.
    before = [snapshot for snapshot in snapshots if snapshot[0] <= step]
    assert rms(got - posthoc.reconstruct(before, gamma=10)) < 2e-4


def test_lengths_that_the_snapshots_do_not_span_are_refused(slow: Any) -> None:
    snapshots = snapshots_of(slow, "noise", 8)
    profiles = np.array([weights_of_iterates(g, s) for s, g in stored(8, TOTAL)])
    refused = []
    for sigma_rel in (0.01, 0.028, 0.032, 0.07, 0.21, 0.23, 0.2886):
        wanted = weights_of_iterates(schedules.gamma_of(sigma_rel))
        best = np.linalg.lstsq(profiles.T, wanted, rcond=None)[0]
        error = np.linalg.norm(best @ profiles - wanted) / np.linalg.norm(wanted)
        if error < 0.1:
            posthoc.reconstruct(snapshots, sigma_rel=sigma_rel)
            continue
        refused.append(sigma_rel)
        message = (
            rf"^snapshots: they do not span an average of sigma_rel {sigma_rel:.3g} .* at step 2048: "
            rf"the closest profile is off by {error:.0%}, more than 10%. They are 16 of sigma_rel "
            r"0.05 to 0.1 at steps 256 to 2048$"
        )
        with pytest.raises(ValueError, match=message):
            posthoc.reconstruct(snapshots, sigma_rel=sigma_rel)
    assert refused == [0.01, 0.028, 0.23, 0.2886]
    with pytest.raises(ValueError, match=r"ends at step 300: .* to 2048, not at 300"):
        posthoc.reconstruct(snapshots, sigma_rel=0.07, step=300)


def pair(a: Any, b: Any, steps: tuple[Any, Any] = (64, 64)) -> list[Any]:
    return [(step, gamma, x) for step, gamma, x in zip(steps, PAIR, (a, b), strict=True)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e5m2", "float32", "complex64"])
def test_parameters_that_stay_constant_are_reconstructed_exactly(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(1000) + (1j if dtype == "complex64" else 0)
    constant = jnp.asarray(values).astype(dtype)
    for times in (1, 8, 32):
        snapshots = [(step, gamma, constant) for step, gamma in stored(times, 1000)]
        assert_same(posthoc.reconstruct(snapshots, sigma_rel=0.08), constant)


def test_sums_are_computed_in_float64_and_rounded_once() -> None:
    weights = posthoc.solve_weights([64, 64], PAIR, 64, 10)
    weights /= weights.sum()
    a, b = (np.random.default_rng(i).standard_normal(1000) + 100 for i in range(2))
    for dtype in ("bfloat16", "float16", "float32"):
        x, y = (np.asarray(jnp.asarray(value, dtype)) for value in (a, b))
        got = posthoc.reconstruct(pair({"w": x}, {"w": jnp.asarray(y)}), gamma=10)["w"]
        assert got.dtype == dtype
        exact = weights @ np.stack([x, y]).astype(np.float64)
        np.testing.assert_allclose(got.astype(float), exact, rtol=0.51 * float(jnp.finfo(dtype).eps))
    got = posthoc.reconstruct(pair(a * 1j, np.complex64(b)), gamma=10)
    np.testing.assert_allclose(got, weights[0] * a * 1j + weights[1] * b, rtol=1e-7)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            posthoc.reconstruct(pair(a, b), gamma=10), weights @ np.stack([a, b]), rtol=1e-15
        )


def test_every_tree_given_or_loaded(tree: Any) -> None:
    a, b = tree, perturb(tree, 2.0)
    for snapshots in (pair(a, b), pair(lambda: a, lambda: b)):
        got = posthoc.reconstruct(snapshots, gamma=10)
        assert jax.tree.structure(got) == jax.tree.structure(tree)
        weight = posthoc.solve_weights([64, 64], PAIR, 64, 10)
        weight = weight[1] / weight.sum()
        for leaf, x, y in zip(jax.tree.leaves(got), *map(jax.tree.leaves, (a, b)), strict=True):
            assert isinstance(leaf, jax.Array)
            assert (leaf.dtype, leaf.shape) == (x.dtype, x.shape)
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                wide = [np.asarray(value).astype(complex) for value in (leaf, x, y)]
                expected = wide[1] + weight * (wide[2] - wide[1])
                np.testing.assert_allclose(wide[0], expected, rtol=jnp.finfo(leaf.dtype).eps)
            else:
                assert_same([leaf], [jnp.asarray(x)])


def test_integers_and_keys_are_those_of_the_nearest_snapshot() -> None:
    steps, trees = (10, 20, 30, 40), [{"n": np.int32(i), "key": jax.random.key(i)} for i in range(4)]
    for end, index in ((40, 3), (30, 2), (20, 1)):
        snapshots = [(s, g, t) for s, t in zip(steps, trees, strict=True) for g in PAIR]
        got = posthoc.reconstruct(snapshots, gamma=10, step=end)
        assert_same(got, jax.tree.map(jnp.asarray, trees[index]))


def test_one_snapshot_is_in_memory_at_a_time() -> None:
    alive: set[int] = set()

    class Array(np.ndarray):
        pass

    def loader(index: int) -> Callable[[], Any]:
        def load() -> Any:
            assert not alive
            array = np.ones(1000).view(Array)
            alive.add(index)
            weakref.finalize(array, alive.remove, index)
            loaded.append(index)
            return {"w": array, "b": array[:10]}

        return load

    loaded: list[int] = []
    profiles = stored(4, 1000)
    snapshots = [(*profile, loader(index)) for index, profile in enumerate(profiles)]
    got = posthoc.reconstruct(snapshots, gamma=10)
    assert loaded == list(range(8))
    assert_same(got, {"w": jnp.ones(1000), "b": jnp.ones(10)})


def test_the_result_shares_no_memory_and_is_placed_as_the_snapshots_are() -> None:
    sharding = NamedSharding(jax.make_mesh((1,), ("d",)), PartitionSpec("d"))
    w, n = jax.device_put(jnp.ones(64), sharding), jnp.zeros(64, jnp.int32)
    got = posthoc.reconstruct(pair({"w": w, "n": n}, {"w": w, "n": n}), gamma=10)
    assert got["w"].sharding == sharding
    assert not got["n"].committed
    for x, y in ((w, got["w"]), (n, got["n"])):
        assert x.unsafe_buffer_pointer() != y.unsafe_buffer_pointer()


def test_inf_and_nan_stay_in_their_places() -> None:
    a = np.array([1, np.inf, np.nan, np.inf, 3e38], np.float32)
    b = np.array([1, np.inf, 1, -np.inf, -3e38], np.float32)
    got = posthoc.reconstruct(pair(a, b), gamma=16)
    np.testing.assert_array_equal(got[:4], [1, np.inf, np.nan, np.nan])
    assert posthoc.reconstruct(pair(a, b), gamma=20)[4] == np.inf


def test_a_reconstructed_network_can_be_called() -> None:
    network = Network()
    network.eval()
    targets = [EMATarget(network, schedules.power_function(gamma=gamma)) for gamma in PAIR]
    for target in targets:
        target.update(perturb(network)).update(perturb(network))
    snapshots = [(t.step, g, t.params) for t, g in zip(targets, PAIR, strict=True)]
    slow = posthoc.reconstruct(snapshots, sigma_rel=0.08)
    x = jnp.ones((1, 3))
    np.testing.assert_allclose(slow(x), perturb(network)(x), rtol=1e-5)
    state = [(t.step, g, nnx.state(t.params)) for t, g in zip(targets, PAIR, strict=True)]
    merged = nnx.merge(nnx.graphdef(network), posthoc.reconstruct(state, sigma_rel=0.08))
    assert_same(arrays(nnx.state(merged)), arrays(nnx.state(slow)))


W = {"w": jnp.ones(3), "n": jnp.int32(1)}
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "none": (lambda: posthoc.reconstruct([], gamma=10), ValueError, "snapshots: .* two, got 0"),
    "one": (lambda: posthoc.reconstruct([(1, 6, W)], gamma=6), ValueError, "snapshots: .* two, got 1"),
    "equal profiles": (
        lambda: posthoc.reconstruct([(64, 6, W), (32, 6, W), (64, 6.0, W)], gamma=10),
        ValueError,
        "snapshots: numbers 0 and 2 both have step 64 and gamma 6",
    ),
    "no tuple": (
        lambda: posthoc.reconstruct([(64, 6, W), EMATarget(W, 0.1)], gamma=10),
        TypeError,
        r"snapshots\[1\]: expected a tuple \(step, gamma, params\), got EMATarget",
    ),
    "a pair": (
        lambda: posthoc.reconstruct([(64, W), (64, W)], gamma=10),
        TypeError,
        r"snapshots\[0\]: expected a tuple .* got tuple",
    ),
    "neither": (lambda: posthoc.reconstruct(pair(W, W)), ValueError, "gamma, sigma_rel: .* one of them"),
    "both": (
        lambda: posthoc.reconstruct(pair(W, W), gamma=6, sigma_rel=0.1),
        ValueError,
        "gamma, sigma_rel: .* one of them",
    ),
    "too wide": (
        lambda: posthoc.reconstruct(pair(W, W), sigma_rel=0.3),
        ValueError,
        "sigma_rel: .* got 0.3",
    ),
    "after the last": (
        lambda: posthoc.reconstruct(pair(W, W), gamma=10, step=65),
        ValueError,
        "^step: expected at most 64, the last snapshot's, got 65",
    ),
    "step 0": (lambda: posthoc.reconstruct(pair(W, W), gamma=10, step=0), ValueError, "^step: .* got 0"),
    "step a string": (
        lambda: posthoc.reconstruct(pair(W, W), gamma=10, step="x"),
        TypeError,
        "^step: expected a real number, got 'x'",
    ),
    "before the first averaging": (
        lambda: posthoc.reconstruct(pair(W, W, (0, 64)), gamma=10),
        ValueError,
        r"steps: expected numbers in \[1e-30, 1e\+30\], got \[ 0. 64.\]",
    ),
    "schedule for a gamma": (
        lambda: posthoc.reconstruct([(64, schedules.uniform(), W)] * 2, gamma=10),
        TypeError,
        "gammas: expected real numbers, got",
    ),
    "missing leaf": (
        lambda: posthoc.reconstruct(pair(W, {"n": W["n"]}), gamma=10),
        ValueError,
        r"snapshots\[1\]\['w'\]: expected float32\[3\] as in snapshots\[0\], got nothing",
    ),
    "other shape": (
        lambda: posthoc.reconstruct(pair(W, lambda: {**W, "w": np.ones((1, 3))}), gamma=10),
        ValueError,
        r"snapshots\[1\]\['w'\]: expected float32\[3\] as in snapshots\[0\], got float64\[1, 3\]",
    ),
    "wider kind": (
        lambda: posthoc.reconstruct(pair(W, {**W, "n": 1.5}), gamma=10),
        TypeError,
        r"snapshots\[1\]\['n'\]: expected int32\[\] as in snapshots\[0\], got float32",
    ),
    "no array": (
        lambda: posthoc.reconstruct(pair({"w": "x"}, W), gamma=10),
        TypeError,
        r"snapshots\[0\]\['w'\]: expected an array, got str",
    ),
    "a path": (
        lambda: posthoc.reconstruct(pair("a.msgpack", "b.msgpack"), gamma=10),
        TypeError,
        r"snapshots\[0\]: expected an array, got str",
    ),
    "steps a matrix": (
        lambda: posthoc.solve_weights(np.ones((2, 2)), [6, 16], 1, 10),
        ValueError,
        r"steps: expected shape \(N,\), got \(2, 2\)",
    ),
    "fewer gammas": (
        lambda: posthoc.solve_weights([1, 2, 3], [6, 16], 1, 10),
        ValueError,
        "gammas: expected as many as steps, 3, got 2",
    ),
    "gamma below 0": (
        lambda: posthoc.solve_weights([1, 2], [6, -0.1], 1, 10),
        ValueError,
        r"gammas: expected numbers in \[0, 1e\+30\], got \[ 6.  -0.1\]",
    ),
    "gamma too large": (
        lambda: posthoc.solve_weights([1, 2], [6, 1e31], 1, 10),
        ValueError,
        r"gammas: expected numbers in \[0, 1e\+30\], got",
    ),
    "step nan": (
        lambda: posthoc.solve_weights([1, np.nan], [6, 16], 1, 10),
        ValueError,
        "steps: .* nan",
    ),
    "target step too late": (
        lambda: posthoc.solve_weights([1, 2], [6, 16], 2.5, 10),
        ValueError,
        "target_step: expected at most 2, the last snapshot's, got 2.5",
    ),
    "target gammas": (
        lambda: posthoc.solve_weights([1, 2], [6, 16], 1, [10]),
        ValueError,
        r"target_gamma: expected shape \(\), got \(1,\)",
    ),
    "target gamma below 0": (
        lambda: posthoc.solve_weights([1, 2], [6, 16], 1, -0.5),
        ValueError,
        r"target_gamma: expected numbers in \[0, 1e\+30\], got -0\.5",
    ),
    "complex step": (
        lambda: posthoc.solve_weights([1j, 2], [6, 16], 1, 10),
        TypeError,
        "steps: .* real",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_arguments(case: str) -> None:
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("wrong", [["1", "2"], [True, False], "12", [1 + 0j, 2]], ids=str)
def test_what_is_no_number_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="steps: expected real numbers"):
        posthoc.solve_weights(wrong, [6, 16], 1, 10)
    with pytest.raises(TypeError, match="gammas: expected real numbers"):
        posthoc.solve_weights([1, 2], wrong, 1, 10)
