"""A target as an attribute of an nnx.Module: nnx.jit updates it, and split, merge and clone keep it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.comparisons import arrays, assert_same
from helpers.targets import MAKERS
from helpers.trees import Network

from target_nets import EMATarget

READ: dict[str, Callable[[Network], Any]] = {  # what a target is made of
    "state": nnx.state,
    "module": lambda network: network,
    "parameters": lambda network: nnx.state(network, nnx.Param),
}


class Agent(nnx.Module):
    def __init__(self, make: Any, read: Any) -> None:
        self.network = Network()
        self.target = make(read(self.network))


every_target = pytest.mark.parametrize("kind", ["ema", "ema, everything", "ema, donate", "periodic"])
targets_and_readings = pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("ema", "state"),
        ("ema", "module"),
        ("ema", "parameters"),
        ("ema, everything", "state"),
        ("ema, donate", "module"),
        ("periodic", "state"),
    ],
)


@targets_and_readings
def test_nnx_jit_updates_the_target_of_an_argument(kind: str, how: str) -> None:
    make, read = MAKERS[kind], READ[how]
    agent, alone = Agent(make, read), make(read(Network()))
    optimizer = nnx.Optimizer(agent.network, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train(agent: Agent, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda network: jnp.mean(network(x) ** 2))(agent.network)
        optimizer.update(agent.network, grads)
        agent.target.update(read(agent.network))
        return loss

    for step in range(4):
        train(agent, optimizer, jnp.full((2, 3), float(step)))
        alone.update(read(agent.network))
    assert agent.target.step == 4
    for x, y in zip(arrays(agent.target.params), arrays(alone.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    agent.target.update(read(agent.network))  # eager updates go on afterwards
    assert agent.target.step == 5


@every_target
def test_a_target_is_data_and_survives_split_merge_and_clone(kind: str) -> None:
    agent = Agent(MAKERS[kind], nnx.state)
    assert nnx.is_data(agent.target)
    agent.target.update(nnx.state(agent.network))
    merged = nnx.merge(*nnx.split(agent))
    for twin in (merged, nnx.clone(agent)):
        assert type(twin.target) is type(agent.target)
        assert_same(arrays(twin.target), arrays(agent.target))
    merged.target.update(nnx.state(merged.network))
    assert (merged.target.step, agent.target.step) == (2, 1)


@every_target
def test_the_slow_copy_shares_no_variable(kind: str) -> None:
    network = Network()
    target = MAKERS[kind](network)
    network.layers[0].kernel[...] = jnp.zeros((3, 4))
    assert np.all(arrays(target.params.layers[0].kernel)[0] != 0)
    target.params.layers[0].kernel[...] = jnp.zeros((3, 4))  # each reading is a copy
    assert np.all(arrays(target.params.layers[0].kernel)[0] != 0)
    network.train()
    x = jnp.ones((2, 3))
    assert target.params(x).shape == network(x).shape  # a module that can be called


@every_target
def test_train_or_eval_mode_is_part_of_the_structure(kind: str) -> None:
    network = Network()
    target = MAKERS[kind](network)
    network.eval()
    with pytest.raises(ValueError, match=r"online_params.*: expected .* static data"):
        target.update(network)
    assert target.step == 0


def test_an_optimizer_of_the_network_leaves_the_slow_copy() -> None:
    agent = Agent(MAKERS["ema"], nnx.state)
    optimizer = nnx.Optimizer(agent.network, optax.adamw(0.1, weight_decay=1.0), wrt=nnx.Param)
    grads = jax.tree.map(jnp.zeros_like, nnx.state(agent.network, nnx.Param))
    slow, online = arrays(agent.target.params), arrays(nnx.state(agent.network))
    optimizer.update(agent.network, grads)
    assert_same(arrays(agent.target.params), slow)
    assert any(np.any(x != y) for x, y in zip(arrays(nnx.state(agent.network)), online, strict=True))


def test_an_update_inside_jit_of_a_target_that_is_not_returned_is_lost() -> None:
    """A target is a pytree, so jit gives the function a copy of an argument."""
    network = Network()
    target = EMATarget(nnx.state(network), 0.5)
    nnx.jit(lambda network, target: (target.update(nnx.state(network)), None)[1])(network, target)
    assert target.step == 0


def test_a_scan_with_split_and_merge() -> None:
    agent = Agent(MAKERS["ema"], nnx.state)
    graphdef, state = nnx.split(agent)

    def body(state: Any, _: None) -> tuple[Any, None]:
        agent = nnx.merge(graphdef, state)
        agent.target.update(nnx.state(agent.network))
        return nnx.state(agent), None

    state, _ = jax.lax.scan(body, jax.tree.map(jnp.asarray, state), length=3)
    assert nnx.merge(graphdef, state).target.step == 3


def test_an_update_inside_a_loss_of_nnx_grad() -> None:
    agent = Agent(MAKERS["ema"], nnx.state)

    def loss(agent: Agent) -> jax.Array:
        agent.target.update(nnx.state(agent.network))
        return jnp.sum(agent.network.layers[0].kernel[...])

    nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))(agent)
    assert agent.target.step == 1


@targets_and_readings
def test_printing_a_module_that_has_a_target(kind: str, how: str) -> None:
    agent = Agent(MAKERS[kind], READ[how])
    assert "Target(step=0" in repr(agent)
    assert "arrays=" in repr(agent.target)
