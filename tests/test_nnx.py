"""A target as an attribute of an nnx.Module: nnx.jit updates it, and split, merge and clone keep it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from helpers.comparisons import arrays, assert_close, assert_same, bits
from helpers.targets import COPIES, MAKERS, update
from helpers.trees import Network, Tied, perturb

from target_nets import EMATarget, PeriodicTarget, incremental_update

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
        ("ema", "module"),
        ("ema, everything", "state"),
        ("ema, donate", "parameters"),
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


FORMS: dict[str, Callable[[Network], Any]] = READ | {
    "evaluating module": lambda network: _in_eval_mode(network),
    "pure dict": lambda network: nnx.to_pure_dict(nnx.state(network)),
}
del FORMS["parameters"]  # fewer arrays than the others have


def _in_eval_mode(network: Network) -> Network:
    network = nnx.clone(network)
    network.eval()
    return network


def changed(network: Network) -> Network:
    """A network with other values, and with its keys advanced."""
    network = nnx.clone(network)
    nnx.update(network, perturb(nnx.state(network)))
    return network


@pytest.mark.parametrize("given", FORMS)
@pytest.mark.parametrize("made_of", FORMS)
def test_all_forms_of_a_network_fit_each_other(made_of: str, given: str) -> None:
    network, online = Network(), changed(Network())
    params = FORMS[made_of](network)
    for kind in ("ema, compensated", "periodic"):
        target, expected = MAKERS[kind](params), MAKERS[kind](nnx.state(network))
        for change in ("update", "update", "sync"):
            getattr(target, change)(FORMS[given](online))
            getattr(expected, change)(nnx.state(online))
            assert_same(arrays(target), arrays(expected))
        assert_same(target.distance(FORMS[given](network)), expected.distance(nnx.state(network)))
        # It reads as what it was made of, whatever came in since.
        assert jax.tree.structure(target.params) == jax.tree.structure(params)
        assert_same(
            arrays(jax.jit(update)(target, FORMS[given](online))), arrays(expected.update(online))
        )


@every_target
def test_a_network_that_does_not_fit_is_named_by_path(kind: str) -> None:
    network = Network()
    target = MAKERS[kind](nnx.state(network, nnx.Param))
    before = bits(target)
    with pytest.raises(ValueError, match=r"online_params\['dropout'\]: expected nothing"):
        target.update(network)
    with pytest.raises(ValueError, match=r"online_params\['norm'\]\['scale'\]: .* got nothing"):
        target.update(nnx.state(network, lambda path, _: path[-1] in ("kernel", "bias")))
    wide = nnx.map_state(lambda _, x: x.replace(jnp.ones((9, 9))), nnx.state(network, nnx.Param))
    with pytest.raises(
        ValueError, match=r"\['layers'\]\[0\]\['bias'\]: .*float\d\d\[4\].*float32\[9, 9\]"
    ):
        target.update(wide)
    assert bits(target) == before


class Tagged(nnx.Variable):
    pass


class Model(nnx.Module):
    """A module with every kind of attribute that nnx knows."""

    def __init__(self) -> None:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        with jax.set_mesh(mesh):
            self.w = nnx.Param(jnp.ones((2, 2)), out_sharding=("data", None), note="first")
        self.tags = nnx.Dict(one=Tagged(jnp.zeros(3, jnp.bfloat16)), two=nnx.BatchStat(jnp.ones(1)))
        self.plain, self.static = nnx.data(jnp.ones(2)), "relu"


def test_what_it_was_made_of_comes_back_with_types_and_metadata() -> None:
    model = Model()
    for params in (model, nnx.state(model), {"a": [nnx.state(model)], "b": (model.w, jnp.ones(2))}):
        ema = EMATarget(params, 0.5)
        for target in (ema, PeriodicTarget(params, 1), *(copy(ema) for copy in COPIES.values())):
            got = target.update(params).params
            assert jax.tree.structure(got) == jax.tree.structure(params)
            assert_same(got, params)
    got = EMATarget(model, 0.5).params
    assert got.w.get_metadata() == model.w.get_metadata()
    assert (type(got.tags["one"]), got.static) == (Tagged, "relu")


def test_the_slow_network_keeps_the_mode_in_which_the_target_was_made() -> None:
    network = Network()
    target = EMATarget(_in_eval_mode(network), 1.0)
    network.train()
    target.update(network)
    assert target.params.dropout.deterministic
    assert not network.dropout.deterministic


def test_shared_variables_stay_shared() -> None:
    for target in (EMATarget(Tied(), 0.5), EMATarget({"model": Tied()}, 0.5)):
        params = target.params
        model = params["model"] if isinstance(params, dict) else params
        assert "arrays=2" in repr(target)
        assert model.encoder.kernel is model.decoder.kernel
        target.update(params)


def test_a_checkpoint_of_version_0_1_names_a_shared_variable_twice() -> None:
    saved = serialization.to_state_dict(EMATarget(Tied(), 0.5))
    saved["params"]["encoder"] = saved["params"]["decoder"]
    restored = serialization.from_state_dict(EMATarget(Tied(), 0.5), saved)
    assert_same(restored.params, Tied())
    saved["params"]["other"] = saved["params"]["decoder"]
    with pytest.raises(ValueError, match=r"params/(encoder|other): unexpected"):
        serialization.from_state_dict(EMATarget(Tied(), 0.5), saved)


def test_variables_that_hold_trees() -> None:
    def make(value: float) -> nnx.Dict:
        tree = {"x": jnp.full(2, value), "y": [jnp.full(3, value + 1), None]}
        return nnx.Dict(a=nnx.Param({}), b=nnx.Param(tree), c=nnx.Param({"w": jnp.full(2, value)}))

    for read in (nnx.state, lambda module: module, lambda module: {"module": module}):
        target = EMATarget(read(make(0.0)), 0.5).update(read(make(1.0)))
        assert_same(target.params, read(make(0.5)))
        assert_same(incremental_update(read(make(1.0)), read(make(0.0)), 0.5), read(make(0.5)))
        assert_same(COPIES["bytes"](target).params, target.params)


class Logarithm(nnx.Param):
    """A Variable that holds the logarithm of its value."""

    def get_value(self, **kwargs: Any) -> Any:
        return jnp.exp(super().get_value(**kwargs))

    def set_value(self, value: Any, **kwargs: Any) -> None:
        super().set_value(jnp.log(value), **kwargs)


def test_variables_with_values_of_their_own_are_averaged_as_they_are_stored() -> None:
    module = nnx.Dict(w=Logarithm(jnp.zeros(2)))
    for params in (module, nnx.state(module), {"w": module.w}):
        got = EMATarget(params, 0.5).update(params).params
        assert_same(got, params)
        assert_same(incremental_update(params, params, 0.5), params)


class NotAPytree(nnx.Module, pytree=False):
    def __init__(self) -> None:
        self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def test_a_module_that_is_no_pytree() -> None:
    target = EMATarget(NotAPytree(), 0.5).update(NotAPytree())
    assert isinstance(target.params, NotAPytree)
    new, old = NotAPytree(), NotAPytree()
    new.linear.kernel[...] += 1.0
    average = incremental_update(new, old, 0.5).linear.kernel[...]
    np.testing.assert_allclose(average, old.linear.kernel[...] + 0.5, rtol=1e-6)


def test_numbers_in_a_state() -> None:
    target = EMATarget(nnx.State({"log_alpha": 1.0, "w": nnx.Param(2.0)}), 0.5)
    target.update(nnx.State({"log_alpha": 2.0, "w": nnx.Param(4.0)}))
    assert (target.params["log_alpha"], target.params["w"][...]) == (1.5, 3.0)


def test_masks_of_nnx_objects() -> None:
    network, online = Network(), changed(Network())

    def parameter(_: Any, x: Any) -> bool:
        return isinstance(x, nnx.Param)

    masks = [
        nnx.map_state(parameter, nnx.state(network)),
        nnx.to_pure_dict(nnx.map_state(parameter, nnx.state(network))),
        lambda params: nnx.map_state(parameter, nnx.state(params)),
        jax.tree.map(lambda x: x.dtype == jnp.float32 and x.shape != (), network),
    ]
    for mask in masks:
        target = EMATarget(network, 0.5, mask=mask).update(online)
        got, old, new = (n.layers[0].kernel[...] for n in (target.params, network, online))
        np.testing.assert_allclose(got, (old + new) / 2, rtol=1e-6)
        assert_same(target.params.scale, online.scale)  # no parameter
    shared, plain = Tied(), nnx.Dict(x=nnx.data((jnp.ones(3),)), w=nnx.Param(jnp.ones(2)))
    for params in (shared, plain, {"model": shared}):
        for average in (True, False):
            mask = jax.tree.map(lambda _, average=average: average, params)
            target = EMATarget(params, 0.25, mask=mask).update(nnx.clone(params))
            assert ("averaged=0 of 2" in repr(target)) != average
    copied = EMATarget(network, 0.5, mask=masks[0]).update(online).params
    assert_same(copied.norm.mean[...], online.norm.mean[...])
    with pytest.raises(ValueError, match=r"mask\['dropout'\]: expected dict as in params"):
        EMATarget(network, 0.5, mask={"layers": True})


# Nothing in nnx takes the slow copy for parameters


@targets_and_readings
def test_no_filter_or_gradient_finds_the_slow_copy(kind: str, how: str) -> None:
    agent = Agent(MAKERS[kind], READ[how])
    parameters = nnx.to_pure_dict(nnx.state(agent, nnx.Param))
    assert list(parameters) == ["network"]
    _, params, rest = nnx.split(agent, nnx.Param, ...)
    assert list(params) == ["network"]
    assert "target" in rest
    grads = nnx.grad(lambda agent: jnp.sum(agent.network.layers[0].kernel[...] ** 2))(agent)
    assert list(grads) == ["network"]

    def is_nnx(x: Any) -> bool:
        return isinstance(x, nnx.Variable | nnx.State | nnx.Pytree)

    assert not any(map(is_nnx, jax.tree.leaves(agent.target, is_leaf=is_nnx)))


def test_an_optimizer_over_the_whole_agent_leaves_the_slow_copy() -> None:
    agent = Agent(MAKERS["ema"], lambda network: network)
    optimizer = nnx.Optimizer(agent, optax.adamw(0.1, weight_decay=1.0), wrt=nnx.Param)
    grads = jax.tree.map(jnp.zeros_like, nnx.state(agent, nnx.Param))
    slow, online = arrays(agent.target.params), arrays(nnx.state(agent.network))
    optimizer.update(agent, grads)
    assert_same(arrays(agent.target.params), slow)
    assert any(np.any(x != y) for x, y in zip(arrays(nnx.state(agent.network)), online, strict=True))


# nnx's control flow


class Counting(nnx.Module):
    """An agent that learns by adding one, and counts it."""

    def __init__(self, make: Any, read: Any) -> None:
        self.network = Network()
        self.target = make(read(self.network))
        self.read = read
        self.count = nnx.Variable(jnp.int32(0))

    def learn(self) -> None:
        self.network.layers[0].kernel[...] += 1.0
        self.target.update(self.read(self.network))
        self.count[...] += 1


def in_cond(agent: Counting) -> Counting:
    learn = nnx.jit(lambda agent, p: nnx.cond(p, lambda a: a.learn(), lambda a: None, agent))
    for p in (True, False, True, True):
        learn(agent, p)
    return agent


def in_switch(agent: Counting) -> Counting:
    for index in (0, 1, 1, 1):
        nnx.switch(index, [lambda a: None, lambda a: a.learn()], agent)
    return agent


def in_while_loop(agent: Counting) -> Counting:
    def body(agent: Counting) -> Counting:
        agent.learn()
        return agent

    return nnx.while_loop(lambda agent: agent.count[...] < 3, body, agent)


def in_fori_loop(agent: Counting) -> Counting:
    def body(_: Any, agent: Counting) -> Counting:
        agent.learn()
        return agent

    return nnx.jit(lambda agent: nnx.fori_loop(0, 3, body, agent))(agent)


def in_scan(agent: Counting) -> Counting:
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def learn(agent: Counting, x: jax.Array) -> tuple[Counting, jax.Array]:
        agent.learn()
        return agent, x

    return learn(agent, jnp.arange(3))[0]


def in_scan_of_a_cond(agent: Counting) -> Counting:
    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def learn(agent: Counting, p: jax.Array) -> tuple[Counting, jax.Array]:
        nnx.cond(p, lambda a: a.learn(), lambda a: None, agent)
        return agent, p

    return learn(agent, jnp.array([True, False, True, True]))[0]


LOOPS = {
    "cond": in_cond,
    "switch": in_switch,
    "while_loop": in_while_loop,
    "fori_loop": in_fori_loop,
    "scan": in_scan,
    "cond in scan": in_scan_of_a_cond,
}


some_targets_and_readings = pytest.mark.parametrize(
    ("kind", "how"),
    [("ema, everything", "state"), ("ema, donate", "module"), ("periodic", "parameters")],
)


@pytest.mark.parametrize("loop", LOOPS)
@some_targets_and_readings
def test_control_flow(kind: str, how: str, loop: str) -> None:
    make, read = MAKERS[kind], READ[how]
    agent, expected = LOOPS[loop](Counting(make, read)), Counting(make, read)
    for _ in range(3):
        expected.learn()
    assert agent.target.step == 3
    for x, y in zip(arrays(agent.target), arrays(expected.target), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert type(agent.target.params) is type(read(agent.network))


@some_targets_and_readings
def test_a_population_of_agents(kind: str, how: str) -> None:
    make, read = MAKERS[kind], READ[how]

    @nnx.vmap
    def make_agent(start: jax.Array) -> Counting:
        agent = Counting(make, read)
        agent.network.layers[0].kernel[...] += start
        agent.target.sync(read(agent.network))
        return agent

    @nnx.vmap
    def learn(agent: Counting) -> None:
        agent.learn()

    population = make_agent(jnp.arange(3.0))
    learn(population)
    learn(population)
    np.testing.assert_array_equal(population.target.step, [2, 2, 2])
    alone = Counting(make, read)
    alone.learn()
    alone.learn()
    first = jax.tree.map(lambda x: x[0], population.target)
    for x, y in zip(arrays(first), arrays(alone.target), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_an_agent_with_two_targets_equals_the_program_of_pure_functions() -> None:
    class TwoTargets(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.actor, self.critic = nnx.Linear(3, 2, rngs=rngs), nnx.Linear(5, 1, rngs=rngs)
            self.slow_actor = EMATarget(self.actor, 0.1)
            self.slow_critic = PeriodicTarget(nnx.state(self.critic), 2)

    def linear(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["kernel"] + params["bias"]

    def loss_of(actor: Any, critic: Any, slow_actor: Any, slow_critic: Any, x: jax.Array) -> jax.Array:
        def value(critic: Any, actor: Any) -> jax.Array:
            return critic(jnp.concatenate([x, actor(x)], axis=-1))

        goal = jax.lax.stop_gradient(0.9 * value(slow_critic, slow_actor) + 1)
        return jnp.mean((value(critic, actor) - goal) ** 2)

    tx = optax.adamw(1e-2, weight_decay=0.1)
    agent = TwoTargets(nnx.Rngs(0))
    optimizer = nnx.Optimizer(agent, tx, wrt=nnx.Param)

    @nnx.jit
    def train(agent: TwoTargets, optimizer: nnx.Optimizer, x: jax.Array) -> None:
        def loss(agent: TwoTargets) -> jax.Array:
            slow_critic = nnx.merge(nnx.graphdef(agent.critic), agent.slow_critic.params)
            return loss_of(agent.actor, agent.critic, agent.slow_actor.params, slow_critic, x)

        optimizer.update(agent, nnx.grad(loss)(agent))
        agent.slow_actor.update(agent.actor)
        agent.slow_critic.update(agent.critic)

    params = {name: nnx.to_pure_dict(nnx.state(getattr(agent, name))) for name in ("actor", "critic")}
    slow, opt_state = params, tx.init(params)
    for step in range(1, 7):
        x = jax.random.normal(jax.random.key(step), (4, 3))
        train(agent, optimizer, x)

        def pure_loss(params: Any, slow: Any, x: jax.Array) -> jax.Array:
            networks = [partial(linear, p[name]) for p in (params, slow) for name in ("actor", "critic")]
            return loss_of(*networks, x)

        grads = jax.grad(pure_loss)(params, slow, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        slow = {
            "actor": optax.incremental_update(params["actor"], slow["actor"], 0.1),
            "critic": optax.periodic_update(params["critic"], slow["critic"], step, 2),
        }
    got = [nnx.state(x) for x in (agent.actor, agent.critic, agent.slow_actor.params)]
    got = [*got, agent.slow_critic.params]
    expected = [params["actor"], params["critic"], slow["actor"], slow["critic"]]
    assert_close([nnx.to_pure_dict(x) for x in got], expected)


# Restoring


def test_an_agent_is_restored_into_an_abstract_one(tmp_path: Path) -> None:
    def make() -> Agent:
        return Agent(MAKERS["ema, everything"], lambda network: network)

    agent = make()
    nnx.jit(lambda agent: agent.target.update(changed(agent.network)) and None)(agent)
    graphdef, template = jax.eval_shape(lambda: nnx.split(make()))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "agent", nnx.state(agent))
        checkpointer.wait_until_finished()
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "agent", template))
    assert_same(arrays(restored.target), arrays(agent.target))
    for twin in (agent, restored):
        twin.target.update(twin.network)
    assert_same(arrays(restored.target), arrays(agent.target))


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
