"""At home in flax.nnx: owned by a module, moved along by nnx.jit, no part of what is trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.comparisons import arrays, assert_same
from helpers.trees import Network

from target_nets import EMATarget, PeriodicTarget

READ = {
    "state": nnx.state,
    "module": lambda network: network,
    "params": lambda n: nnx.state(n, nnx.Param),
}


class Agent(nnx.Module):
    def __init__(self, make: Any, read: Any) -> None:
        self.network = Network()
        self.target = make(read(self.network))


@pytest.fixture(params=["ema", "periodic", "ema, donate"], name="make")
def _make(request: pytest.FixtureRequest) -> Any:
    return {
        "ema": lambda params: EMATarget(params, 0.5),
        "periodic": lambda params: PeriodicTarget(params, 2),
        "ema, donate": lambda params: EMATarget(params, 0.5, donate=True),
        "ema, compensated": lambda params: EMATarget(params, 0.5, compensated=True, skip_nonfinite=True),
    }[request.param]


@pytest.mark.parametrize("how", READ)
def test_nnx_jit_carries_the_update_out(make: Any, how: str) -> None:
    read = READ[how]
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
    agent.target.update(read(agent.network))  # and eager again
    assert agent.target.step == 5


def test_it_is_data_and_survives_split_merge_and_clone(make: Any) -> None:
    agent = Agent(make, nnx.state)
    assert nnx.is_data(agent.target)
    agent.target.update(nnx.state(agent.network))
    merged = nnx.merge(*nnx.split(agent))
    for twin in (merged, nnx.clone(agent)):
        assert type(twin.target) is type(agent.target)
        assert_same(arrays(twin.target), arrays(agent.target))
    merged.target.update(nnx.state(merged.network))
    assert (merged.target.step, agent.target.step) == (2, 1)


def test_the_slow_copy_has_variables_of_its_own(make: Any) -> None:
    network = Network()
    target = make(network)
    network.layers[0].kernel[...] = jnp.zeros((3, 4))
    assert np.all(arrays(target.params.layers[0].kernel)[0] != 0)
    target.params.layers[0].kernel[...] = jnp.zeros((3, 4))  # what was read is the reader's own
    assert np.all(arrays(target.params.layers[0].kernel)[0] != 0)
    network.train()
    x = jnp.ones((2, 3))
    assert target.params(x).shape == network(x).shape  # a module, ready to call


def test_train_or_eval_mode_is_part_of_the_structure(make: Any) -> None:
    network = Network()
    target = make(network)
    network.eval()
    with pytest.raises(ValueError, match=r"online_params.*: expected .* static data"):
        target.update(network)
    assert target.step == 0


def test_an_optimizer_over_the_whole_agent_decays_the_slow_copy_too() -> None:
    """The trap that README and docstring name: build the optimizer over the network."""
    agent = Agent(lambda params: EMATarget(params, 0.5), nnx.state)
    whole = nnx.Optimizer(agent, optax.adamw(0.1, weight_decay=1.0), wrt=nnx.Param)
    grads = jax.tree.map(jnp.zeros_like, nnx.state(agent, nnx.Param))
    before = arrays(agent.target.params)
    whole.update(agent, grads)
    assert any(np.any(x != y) for x, y in zip(before, arrays(agent.target.params), strict=True))


def test_an_update_inside_jit_that_is_not_returned_is_lost() -> None:
    """The other trap: jit gave the function a copy."""
    network = Network()
    target = EMATarget(nnx.state(network), 0.5)
    nnx.jit(lambda network, target: (target.update(nnx.state(network)), None)[1])(network, target)
    assert target.step == 0


def test_inside_scan_by_split_and_merge() -> None:
    agent = Agent(lambda params: EMATarget(params, 0.5), nnx.state)
    graphdef, state = nnx.split(agent)

    def body(state: Any, _: None) -> tuple[Any, None]:
        agent = nnx.merge(graphdef, state)
        agent.target.update(nnx.state(agent.network))
        return nnx.state(agent), None

    state, _ = jax.lax.scan(body, jax.tree.map(jnp.asarray, state), length=3)
    assert nnx.merge(graphdef, state).target.step == 3


def test_inside_the_loss_of_nnx_grad_it_is_passed_in_with_its_owner() -> None:
    agent = Agent(lambda params: EMATarget(params, 0.5), nnx.state)

    def loss(agent: Agent) -> jax.Array:
        agent.target.update(nnx.state(agent.network))
        return jnp.sum(agent.network.layers[0].kernel[...])

    nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))(agent)
    assert agent.target.step == 1


@pytest.mark.parametrize("how", READ)
def test_printing_a_module_that_owns_a_target(make: Any, how: str) -> None:
    agent = Agent(make, READ[how])
    assert "Target(step=0" in repr(agent)
    assert "arrays=" in repr(agent.target)
