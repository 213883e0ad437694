"""Any bytes restore to a target like the template or raise an error soon, and nothing in them is run."""

import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization
from helpers.comparisons import arrays, assert_same
from helpers.processes import process_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from target_nets import EMATarget, PeriodicTarget

PARAMS = {
    "w": jnp.arange(3.0),
    "h": [jnp.ones(2, jnp.bfloat16), None],
    "z": jnp.ones((1, 2), jnp.complex64),
    "n": jnp.int8(1),
    "key": jax.random.key(0),
}
TEMPLATES = {
    "ema": EMATarget(PARAMS, 0.5, compensated=True, skip_nonfinite=True).update(PARAMS),
    "periodic": PeriodicTarget(PARAMS, 1).update(PARAMS),
}
SAVED = {name: serialization.to_bytes(target) for name, target in TEMPLATES.items()}
# All errors of msgpack are ValueErrors. Flax makes arrays of what msgpack decodes, and raises others.
DECODING = (ValueError, TypeError, LookupError, RecursionError)


def restore(template: Any, content: bytes) -> None:
    """Asserts that bytes restore to a target like the template, or are refused by path."""
    before = arrays(template)
    try:
        state = serialization.msgpack_restore(content)
    except DECODING:
        return
    message, restored = None, None
    try:
        restored = serialization.from_state_dict(template, state)
    except ValueError as error:
        message = str(error)
    if restored is None:
        assert message.startswith(("./", ".: expected a dict"))
    else:
        assert type(restored) is type(template)
        assert jax.tree.structure(restored) == jax.tree.structure(template)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert restored.step >= 0
        restored.update(PARAMS)
    assert_same(arrays(template), before)


def damage_bytes(content: bytes, how: str, rng: random.Random) -> bytes:
    """Damages bytes at random."""
    damage = bytearray(content)
    first, last = sorted(rng.sample(range(len(content) + 1), 2))
    if how == "truncated":
        return content[:first]
    if how == "duplicated":
        return content[:last] + content[first:]
    if how == "cut":
        return content[:first] + content[last:]
    for _ in range(rng.randint(1, 3)):
        where = rng.randrange(len(content))
        damage[where] = damage[where] ^ 1 << rng.randrange(8) if how == "flipped" else rng.randrange(256)
    return bytes(damage)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("how", ["truncated", "duplicated", "cut", "flipped", "overwritten"])
def test_damaged_bytes(kind: str, how: str) -> None:
    rng = random.Random(0)
    for _ in range(1000):
        restore(TEMPLATES[kind], damage_bytes(SAVED[kind], how, rng))


@pytest.mark.parametrize("kind", TEMPLATES)
def test_truncated_bytes_are_refused(kind: str) -> None:
    for length in range(len(SAVED[kind])):
        with pytest.raises(ValueError, match=r"incomplete|exceeds"):
            serialization.from_bytes(TEMPLATES[kind], SAVED[kind][:length])


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes(kind: str, content: bytes) -> None:
    restore(TEMPLATES[kind], content)


arrays_of_any_kind = st.builds(
    lambda shape, dtype: np.zeros(shape, dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["float32", "int8", "uint64", "bfloat16", "bool", "complex64"]).map(jnp.dtype),
)
scalars = (
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.booleans() | st.text(max_size=3)
)
anything = st.recursive(
    scalars | st.binary(max_size=3) | st.complex_numbers() | arrays_of_any_kind,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | scalars, inner),
    max_leaves=5,
)


def paths(node: Any) -> list[tuple[str, ...]]:
    """Returns the paths of all parts of a state."""
    below = node.items() if isinstance(node, dict) else ()
    return [(), *((key, *path) for key, child in below for path in paths(child))]


def replace_part(node: Any, path: tuple[str, ...], value: Any) -> Any:
    """Returns a state with another value at a path."""
    if not path:
        return value
    return {**node, path[0]: replace_part(node.get(path[0], {}), path[1:], value)}


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_value_in_place_of_any_part(kind: str, data: st.DataObject) -> None:
    state = serialization.msgpack_restore(SAVED[kind])
    where = data.draw(st.sampled_from(paths(state)))
    content = serialization.msgpack_serialize(
        replace_part(state, where, data.draw(anything)), in_place=True
    )
    restore(TEMPLATES[kind], content)


# Bytes that were made to do harm


def extension(code: int, *parts: Any) -> Any:
    """Returns the extension that flax decodes as an array (1), a complex number (2) or a scalar (3)."""
    return msgpack.ExtType(code, msgpack.packb(parts, use_bin_type=True))


def checkpoint_with(path: tuple[str, ...], value: Any) -> bytes:
    """Returns a checkpoint with one value replaced."""
    state = serialization.msgpack_restore(SAVED["periodic"])
    return serialization.msgpack_serialize(replace_part(state, path, value))


class Payload:
    """An object whose pickle touches a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


W, MANY = ("params", "w"), 10**6
HARMFUL: dict[str, Callable[[], bytes]] = {
    "nested lists": lambda: b"\x91" * MANY,
    "nested dicts": lambda: b"\x81\xa1a" * MANY,
    "nested dicts, below the decoder's limit": lambda: b"\x81\xa1a" * 1010 + b"\xc0",
    "nested lists in place of a leaf": lambda: (
        b"\x82\xa4step\x01\xa6params\x81\xa1w" + b"\x91" * 1000 + b"\xc0"
    ),
    "a list of 4 billion": lambda: b"\xdd\xff\xff\xff\xff",
    "a dict of 4 billion": lambda: b"\xdf\xff\xff\xff\xff",
    "a string of 4 GB": lambda: b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GB": lambda: b"\xc6\xff\xff\xff\xff",
    "an array of 4 GB": lambda: b"\xc9\xff\xff\xff\xff\x01",
    "a huge shape": lambda: checkpoint_with(W, extension(1, (2**40,), "float32", b"x" * 12)),
    "a huge empty shape": lambda: checkpoint_with(W, extension(1, (0, 2**62), "float32", b"")),
    "a shape past 64 bits": lambda: checkpoint_with(
        W, extension(1, (2**64 - 1, 2), "float32", b"x" * 12)
    ),
    "a negative shape": lambda: checkpoint_with(W, extension(1, (-1, 3, 1), "float32", b"x" * 12)),
    "100 dimensions": lambda: checkpoint_with(W, extension(1, (1,) * 100, "float32", b"x" * 4)),
    "a huge element": lambda: checkpoint_with(W, extension(1, (1,), "V2000000000", b"x" * 12)),
    "a huge subarray": lambda: checkpoint_with(W, extension(1, (1,), "(500000000,)i4", b"x" * 12)),
    "a structure": lambda: checkpoint_with(W, extension(1, (1,), "i4,i4,i4", b"x" * 12)),
    "objects": lambda: checkpoint_with(W, extension(1, (1,), "O", b"x" * 8)),
    "an unknown dtype": lambda: checkpoint_with(W, extension(1, (3,), "float33", b"x" * 12)),
    "no buffer": lambda: checkpoint_with(W, extension(1, (3,), "float32", 5)),
    "half an array": lambda: checkpoint_with(W, extension(1, (3,))),
    "half a complex number": lambda: checkpoint_with(W, extension(2, 1.0)),
    "chunks without a shape": lambda: checkpoint_with(W, {"__msgpack_chunked_array__": True}),
    "chunks of a huge shape": lambda: checkpoint_with(
        W,
        {"__msgpack_chunked_array__": True, "shape": {"0": 2**62}, "chunks": {"0": np.ones(3, "f4")}},
    ),
    "an unknown extension": lambda: checkpoint_with(W, msgpack.ExtType(77, b"x")),
    "a time stamp": lambda: b"\x82\xa4step\xd6\xffabcd\xa6params\xc0",
    "a reserved byte": lambda: b"\xc1",
    "a dict as a key": lambda: b"\x81\x80\x01",
    "a million keys": lambda: checkpoint_with(("params",), dict.fromkeys(map(str, range(MANY // 4)), 0)),
    "a million steps": lambda: checkpoint_with(("step",), np.zeros(40 * MANY, np.uint8)),
    "a long step": lambda: checkpoint_with(("step",), "1" * 40 * MANY),
    "a step past 64 bits": lambda: checkpoint_with(("step",), 2**64 - 1),
    "a long leaf": lambda: checkpoint_with(W, np.zeros(10 * MANY, np.float32)),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_harmful_bytes_are_refused_soon_and_in_little_memory(case: str) -> None:
    content = HARMFUL[case]()
    if linux := Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = process_memory("VmRSS")
    start = time.thread_time()  # other processes do not count
    with pytest.raises(DECODING):
        serialization.from_bytes(TEMPLATES["periodic"], content)
    assert time.thread_time() - start < 1
    if linux:
        assert process_memory("VmHWM") - before < 1e8
    restore(TEMPLATES["periodic"], content)


def test_nothing_in_the_bytes_is_run(tmp_path: Path) -> None:
    file = tmp_path / "touched"
    code = pickle.dumps(Payload(file))
    for content in (
        code,
        checkpoint_with(W, code),
        checkpoint_with(W, extension(1, (1,), "O", code)),
        checkpoint_with(W, extension(1, (), f"V{len(code)}", code)),
        checkpoint_with(W, msgpack.ExtType(42, code)),
        checkpoint_with(("step",), code),
    ):
        restore(TEMPLATES["periodic"], content)
        assert not file.exists()
    pickle.loads(code)
    assert file.exists()  # loading the pickle does run it
