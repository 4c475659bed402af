"""The folder of a run: it knows the arguments that it was made with, so no run goes on from another's.

A run with the same arguments goes on in its folder. Without ``--out``, other arguments get a folder of
their own; with it, they are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

#: The record of the arguments.
ARGUMENTS = "arguments.json"
#: What a finished run found.
RESULTS = "results.json"
#: What is told by its own name, and not by that of the folder.
_NO_PART = "out"
_LONGEST_NAME = 80


def folder_of(arguments: argparse.ArgumentParser, args: argparse.Namespace) -> Path:
    """The folder that was asked for, else the recipe's own with what is not the recipe's default.

    Args:
        arguments: the parser, for its defaults.
        args: what it read.
    """
    default = arguments.get_default(_NO_PART)
    if args.out != default:
        return Path(args.out)
    others = {
        name: value
        for name, value in settings(args).items()
        if value != plain(arguments.get_default(name))
    }
    if not others:
        return Path(default)
    words = "-".join(f"{name}-{value}" for name, value in others.items())
    name = re.sub(r"[^A-Za-z0-9.+-]+", "_", words.replace("_", "-"))
    if name != words.replace("_", "-") or len(name) > _LONGEST_NAME:  # lest two have one name
        digest = hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{name[:_LONGEST_NAME]}-{digest}"
    return Path(f"{default}-{name}")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a run is the result of, as JSON keeps them."""
    return {name: plain(value) for name, value in vars(args).items() if name != _NO_PART}


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def claim(folder: Path, args: argparse.Namespace, write: bool = True) -> None:
    """Let a folder belong to the run with these arguments.

    Args:
        folder: made where it is not there.
        args: of the run.
        write: whether this process writes the record; of several, one does.

    Raises:
        SystemExit: the folder is another run's; the message says what differs and what to do.
    """
    record, own = folder / ARGUMENTS, settings(args)
    if record.exists():
        differing = _differences(_read(record), own)
        if differing:
            raise SystemExit(
                f"{folder} is the folder of a run with other arguments: {'; '.join(differing)}. Start it "
                "with the same ones to go on, give another --out, or remove the folder"
            )
    elif _holds_a_run(folder):
        raise SystemExit(
            f"{folder} holds a run, but no {ARGUMENTS} that says with which arguments it was made; give "
            "another --out, or remove the folder"
        )
    elif write:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, own)


def results(folder: Path) -> dict[str, Any] | None:
    """What the finished run of a folder found; None for one that is not finished."""
    file = folder / RESULTS
    return _read(file) if file.exists() else None


def last_checkpoint(folder: Path) -> tuple[str, int] | None:
    """The last checkpoint of a folder that was written to its end, and its step; None where there is none.

    A Trainer writes the state of the run last, so a save that was killed leaves none.
    """
    for checkpoint in sorted(_checkpoints(folder), key=_step, reverse=True):
        with suppress(OSError, ValueError):
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return str(checkpoint), int(state["global_step"])
    return None


def write_json(file: Path, value: Any) -> None:
    """Write a file in one step: whatever interrupts it, the old one or the new one is there."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as opened:
            opened.write(json.dumps(value, indent=2, default=str) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(
            f"{file} is damaged ({error}); give another --out, or remove the folder"
        ) from error
    return found


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = sorted(before.keys() | now.keys())
    return [
        f"--{name.replace('_', '-')} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _holds_a_run(folder: Path) -> bool:
    return any(_checkpoints(folder)) or any(
        (folder / name).exists() for name in (RESULTS, "adapter_model.safetensors")
    )


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])
