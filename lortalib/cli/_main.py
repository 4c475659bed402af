"""Reads the arguments, runs a command, and turns errors into messages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from .._version import __version__
from . import _commands, _compress
from ._models import DTYPES
from ._output import Output

#: Errors that a user can fix: a wrong path, a damaged file, a model that does not fit.
_USER_ERRORS = (OSError, ValueError, KeyError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the arguments without the program's name; by default those of the process.

    Returns:
        The exit code: 0 for success; 1 if the command failed or `check` found a fault; 130 after an
        interrupt. Wrong usage makes argparse exit with 2.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "lora") and not any(each.startswith("-") for each in rest):
        # argparse takes the folders before the options for all that there are.
        options.lora, options.out = [*options.lora, options.out, *rest[:-1]], rest[-1]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not hasattr(options, "command"):
        parser.print_help()
        return 0
    output = Output(options.json)
    try:
        ok: bool = options.command(options, output)
    except _USER_ERRORS as error:
        output.error(error)
        return 1
    except KeyboardInterrupt:
        print("interrupted; no file was left half-written", file=sys.stderr)
        return 130
    return 0 if ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lortalib", description="Fine-tune a transformer through one low-rank tensor."
    )
    parser.add_argument("--version", action="version", version=f"lortalib {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(
        name: str, help: str, *positional: str, room: ModuleType = _commands
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        for argument in positional:
            number = "+" if argument == "LORA" else None
            text = _POSITIONAL[argument]
            sub.add_argument(argument.lower(), metavar=argument, help=text, nargs=number)
        sub.add_argument("--json", action="store_true", help="print JSON for machines")
        sub.set_defaults(command=getattr(room, name.replace("-", "_")))
        return sub

    command("info", "what an adapter is: by tensor, layer, matrix and head", "FOLDER")
    plan = command("plan", "how many trainable parameters each format has on a model", "MODEL")
    plan.add_argument("--rank", type=int, nargs="+", default=[1, 4, 8, 16, 64], metavar="R")
    plan.add_argument(
        "--decomposition",
        nargs="+",
        default=["indscal", "cp", "tucker", "tt", "lotr", "lora"],
        metavar="D",
    )
    plan.add_argument(
        "--acts-on",
        choices=("weights", "stream"),
        help="what the tensor changes (default: what suits the format)",
    )
    sites = command("sites", "what would be adapted in a model, and as what", "MODEL")
    for sub in (plan, sites):
        sub.add_argument(
            "--targets",
            default="qkvo",
            type=_targets,
            help="letters of qkvo, mlp, all, names with commas between them, or a regular expression "
            "(default: qkvo)",
        )
    check = command("check", "is an adapter sound, and does it fit a model?", "FOLDER")
    check.add_argument(
        "--model",
        help="folder or name; by default the folder that the adapter names, if there is one",
    )
    merge = command(
        "merge", "write the model with the adapter in its weights", "MODEL", "FOLDER", "OUT"
    )
    merge.add_argument(
        "--dtype",
        default="auto",
        help=f"of the weights: {', '.join(DTYPES)} (default: as they are stored)",
    )
    export = command(
        "export-lora", "write the adapter as a standard LoRA of PEFT, exactly", "FOLDER", "OUT"
    )
    export.add_argument(
        "--model",
        help="folder or name; needed where the adapter acts on the residual stream, and for gguf",
    )
    export.add_argument(
        "--format",
        choices=("peft", "gguf"),
        default="peft",
        help="a folder for PEFT and vLLM, or a file for llama.cpp (default: peft)",
    )
    command(
        "convert", "write a folder of lortalib as one of PEFT, or the other way", "FOLDER", "OUT"
    )
    compress = command(
        "compress",
        "fit one tensor to LoRAs and adapters of one model",
        "LORA",
        "OUT",
        room=_compress,
    )
    compress.add_argument(
        "--to", default="cp", metavar="D", help="a format or a line of legs (default: cp)"
    )
    compress.add_argument("--rank", type=int, default=32, metavar="R", help="(default: 32)")
    compress.add_argument(
        "--model", help="folder or name; by default the folder that the first adapter names"
    )
    compress.add_argument(
        "--gqa",
        choices=("pool", "split"),
        default="pool",
        help="fewer key/value heads: one tensor with the queries, or one of their own (default: pool)",
    )
    compress.add_argument(
        "--sweeps", type=int, default=100, metavar="N", help="at most so many (default: 100)"
    )
    for sub in (plan, sites, check, merge, export, compress):
        sub.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run code that comes with the model"
            + " (of --model)" * (sub in (check, export, compress)),
        )
    return parser


def _targets(text: str) -> str | list[str]:
    """Split names with commas between them to a list; return a regular expression unchanged."""
    plain = all(each.isidentifier() for each in text.replace(",", ".").split("."))
    return text.split(",") if "," in text and plain else text


_POSITIONAL = {
    "FOLDER": "folder of a saved adapter, of lortalib or of PEFT",
    "LORA": "folders of saved LoRAs or adapters, each called after its folder",
    "MODEL": "folder of a model, or its name on the hub",
    "OUT": "folder to write",
}
