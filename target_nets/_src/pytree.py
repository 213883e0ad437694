"""Targets as jax pytrees with named keys, and as data of flax.nnx."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.tree_util import GetAttrKey

from target_nets._src.records import Settings, State
from target_nets._src.target import Target, make_target


def register(target_class: type[Target[Any]]) -> None:
    """Registers a class of targets."""
    unflatten = partial(_unflatten, target_class)
    jax.tree_util.register_pytree_with_keys(target_class, _flatten_with_keys, unflatten, _flatten)
    nnx.register_data_type(target_class)


def _flatten_with_keys(target: Target[Any]) -> tuple[list[tuple[GetAttrKey, Any]], Settings]:
    children, settings = _flatten(target)
    return list(zip(map(GetAttrKey, settings.child_names), children, strict=True)), settings


def _flatten(target: Target[Any]) -> tuple[list[Any], Settings]:
    settings, state = target.__getstate__()
    return [getattr(state, name) for name in settings.child_names], settings


def _unflatten(
    target_class: type[Target[Any]], settings: Settings, children: Iterable[Any]
) -> Target[Any]:
    """Checks nothing, since jax may pass anything as a child."""
    state = State(**dict(zip(settings.child_names, children, strict=True)))
    return make_target(target_class, settings, state)
