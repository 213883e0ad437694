"""What the programs share: arguments, Ctrl-C, checkpoints, and the look of the pictures."""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
from flax import serialization

mpl.use("agg")  # needs no screen

# The same colours for the same things in all pictures, told apart by colour-blind readers, too
# (Okabe and Ito 2008). They stand out on white, which pictures keep on a dark page.
OURS = "#0072B2"  # a moving average of parameters
COPY = "#009E73"  # a periodic copy of them
ONLINE = "#D55E00"  # the online parameters themselves
PEERS = "#777777"  # other libraries, baselines
LIMIT = "#222222"  # what cannot be exceeded, or should be reached; dashed

# A page is 770 pixels wide. These pictures have twice as many, and letters of 12 pixels or more on it.
WIDTH = 7.7  # inches
mpl.rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "figure.titlesize": 11,
        "figure.titleweight": "bold",
        "font.size": 9.5,
        "grid.color": "#DDDDDD",
        "legend.frameon": False,
        "savefig.dpi": 200,
        "savefig.facecolor": "white",
    }
)


# Arguments


def parser(doc: str, out: str) -> argparse.ArgumentParser:
    """Returns a parser with what all programs take.

    Args:
      doc: The docstring of the program.
      out: The default of `--out`, with the names of other arguments in braces.
    """
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default=out, metavar="DIR", help="folder of checkpoints and pictures")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=within(0, 2**31 - 1), default=0, help="of everything random")
    return parser


def within(low: float, high: float) -> Callable[[str], float]:
    """A type of the command line: numbers of the type of both bounds, between them."""

    def number(text: str) -> float:
        value = type(low)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not within {low} to {high}")
        return value

    number.__name__ = type(low).__name__  # for argparse's own message
    return number


def run(
    parser: argparse.ArgumentParser,
    program: Callable[[argparse.Namespace], int | None],
    checkpoint: str = "checkpoint.msgpack",
) -> int:
    """Runs a program with the arguments of the command line, and returns its exit code.

    Args:
      parser: The parser.
      program: What to call with the arguments. `out` is a folder that exists.
      checkpoint: What a run saves in that folder: a file, or a folder with one for each step.
    """
    args = parser.parse_args()
    if args.out == parser.get_default("out"):
        args.out = args.out.format(**vars(args))
    args.out = Path(args.out).absolute()
    saved = args.out / checkpoint
    if args.resume and not holds_run(saved):
        parser.error(f"--resume: there is no checkpoint {saved}")
    if not args.resume and holds_run(saved):
        parser.error(f"--out: {args.out} holds a run; --resume it, or choose another folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {args.out} is no folder and cannot be made one: {error}")
    try:
        return program(args) or 0
    except KeyboardInterrupt:
        print("\nstopped", end="; ")
        if not holds_run(saved):
            print("nothing was saved yet")
        else:
            again = [argument for argument in sys.argv if argument != "--resume"]
            print(f"to go on: {shlex.join([sys.executable, *again, '--resume'])}")
        return 130


def holds_run(checkpoint: Path) -> bool:
    """Whether there is a checkpoint: a file, or a folder with one for each step."""
    return checkpoint.is_file() or any(path.name.isdigit() for path in checkpoint.glob("*"))


# Ctrl-C


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Holds back the first Ctrl-C, so that the block can finish and save what is under way.

    The block looks at the list that it is given, which is no longer empty after a Ctrl-C. At its end a
    KeyboardInterrupt is raised. A second Ctrl-C raises it at once.
    """
    signals: list[int] = []

    def remember(number: int, _: Any) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, previous)
        os.write(2, b"\nfinishing what is under way, then saving; Ctrl-C again stops at once\n")

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, previous)
    if signals:
        raise KeyboardInterrupt


# Checkpoints


def save(path: Path, settings: dict[str, Any], **state: Any) -> None:
    """Writes a checkpoint so that, whatever happens, the path holds the old one or the new one."""
    saved = serialization.to_state_dict({"settings": settings, **state})
    content = serialization.msgpack_serialize(
        {**saved, "checksum": checksum(serialization.msgpack_serialize(saved))}
    )
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk, for example
        raise SystemExit(f"cannot save {path}: {error}; what was saved before is as it was") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def restoring(path: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Gives what a checkpoint holds to a block that restores it.

    Whatever fails ends the program with one line that names the file.
    """
    try:
        saved = serialization.msgpack_restore(path.read_bytes())
        if saved.pop("checksum") != checksum(serialization.msgpack_serialize(saved)):
            raise ValueError("its checksum differs")
        check(path, saved["settings"], settings)
        yield saved
    except Exception as error:  # damaged bytes make decoders fail in any way
        line = " ".join(str(error).split())
        raise SystemExit(f"{path} is damaged, or no checkpoint of this program: {line}") from None


def restore(state: Any, saved: Any) -> Any:
    """Returns a state with the values of a saved one, or raises a ValueError if it does not fit."""
    restored = serialization.from_state_dict(state, saved)
    shapes, expected = (list(map(jnp.shape, jax.tree.leaves(tree))) for tree in (restored, state))
    if shapes != expected:  # of a plain dict flax checks none
        raise ValueError("it holds arrays of other shapes")
    return restored


def check(path: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Ends the program if a checkpoint is of other settings."""
    for name, value in settings.items():
        if found[name] != value:
            raise SystemExit(f"{path} is of another run, with {name} {found[name]}, not {value}")


def checksum(content: bytes) -> str:
    """A hash of what was saved: neither msgpack nor Orbax notices a flipped bit."""
    return hashlib.sha256(content).hexdigest()


# Checkpoints of Orbax, a folder for each step


def seal(folder: Path, settings: dict[str, Any]) -> None:
    """Adds the settings and the checksums of all files to a checkpoint."""
    seal = {"settings": settings, "checksums": checksums(folder)}
    (folder / "seal.json").write_text(json.dumps(seal))


def checksums(folder: Path) -> dict[str, str]:
    """Of all files in a folder but the seal."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "seal.json")
    return {str(path.relative_to(folder)): checksum(path.read_bytes()) for path in files}


def drop_damaged(checkpoints: Path, settings: dict[str, Any]) -> None:
    """Deletes the checkpoints after the last intact one, and says so.

    This is for one process, before others start. If only some of several noticed the damage, they would
    wait for the others.
    """
    damaged = []
    steps = (int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    for step in sorted(steps, reverse=True):
        folder = checkpoints / str(step)
        try:
            seal = json.loads((folder / "seal.json").read_text())
        except (OSError, ValueError):
            seal = {}
        if seal.get("checksums") == checksums(folder):
            break
        damaged.append(folder)
    else:
        raise SystemExit(f"{checkpoints} holds no intact checkpoint")
    check(folder, seal["settings"], settings)
    for folder in damaged:
        print(f"{folder} is damaged; going on from step {step}")
        shutil.rmtree(folder)
