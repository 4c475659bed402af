"""Declares the commands of the command line: their arguments, help texts and examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import chain

from .._version import __version__
from ._check import check, compare, verify
from ._completion import completion
from ._compress import compress
from ._info import info
from ._models import DTYPES
from ._options import add_place, add_subfolders, add_task, add_trust
from ._output import Output
from ._plan import FORMATS, plan
from ._sites import sites
from ._texts import count, folder, names, number, ranks, targets, text, tolerance
from ._write import convert, export_lora, from_lora, merge

Command = Callable[[argparse.Namespace, Output], bool]

_POSITIONAL = {
    "LORA...": "folders of LoRAs or adapters, or their names on the hub; each is called after its folder",
    "FOLDER": "folder of a saved adapter, of lortalib or of PEFT, or its name on the hub",
    "MODEL": "folder of a model, or its name on the hub",
    "OUT": "folder to write",
    "A": "folder or name on the hub of an adapter, of lortalib or PEFT, or of a LoRA",
    "B": "what A is compared with, likewise",
}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; what it reads has the command's function as ``command``."""
    parser = argparse.ArgumentParser(
        prog="lortalib",
        description="Fine-tune a transformer through one low-rank tensor.",
        epilog="`lortalib COMMAND --help` explains a command and shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"lortalib {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(run: Command, help: str, usage: str, *examples: str) -> argparse.ArgumentParser:
        name = run.__name__.replace("_", "-")
        sub = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog="examples:\n" + "\n".join(f"  lortalib {name} {each}" for each in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for argument in usage.split():
            name, many = argument.removesuffix("..."), argument.endswith("...")
            kind = folder if name == "OUT" and run is not export_lora else text
            sub.add_argument(
                name.lower(),
                metavar=name,
                type=kind,
                nargs="+" if many else None,
                help=_POSITIONAL[argument],
            )
        sub.add_argument(
            "--json", action="store_true", help="print JSON for machines (default: no)"
        )
        sub.set_defaults(command=run)
        return sub

    _add_readers(add)
    _add_checks(add)
    _add_writers(add)
    add(
        completion,
        "print a script that completes the commands and options in bash",
        "",
        ">> ~/.bash_completion",
    )
    return parser


Add = Callable[..., argparse.ArgumentParser]


def _add_readers(add: Add) -> None:
    add_place(
        add(info, "describe an adapter: by tensor, layer, matrix and head", "FOLDER", "my-adapter")
    )
    planned = add(
        plan,
        "count the trainable parameters that each format has on a model",
        "MODEL",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "MODEL --rank 1,4,16 --decomposition cp,tt,lora",
        "MODEL --numbers 50,000",
        "MODEL --decomposition 'in r, head out r, layer matrix r' --rank 8",
    )
    planned.add_argument(
        "--rank",
        type=ranks,
        nargs="+",
        action=_Joined,
        default=[1, 4, 8, 16, 64],
        metavar="R",
        help="ranks, with commas or blanks between them (default: 1,4,8,16,64)",
    )
    planned.add_argument(
        "--decomposition",
        type=names,
        nargs="+",
        action=_Joined,
        metavar="D",
        help="names of formats with commas or blanks between them, or lines of legs "
        f"(default: {','.join(FORMATS)}; with --numbers every format)",
    )
    planned.add_argument(
        "--numbers",
        type=number,
        metavar="N",
        help="instead of --rank: find the ranks of each format that have at most so many trainable "
        "parameters (default: none)",
    )
    planned.add_argument(
        "--acts-on",
        choices=("weights", "stream"),
        help="what the tensor changes (default: what suits the format)",
    )
    listed = add(
        sites,
        "list what would be adapted in a model",
        "MODEL",
        "MODEL",
        "MODEL --targets all --all",
    )
    listed.add_argument(
        "--all",
        action="store_true",
        help="list each projection, and how it is read (default: one line for each kind)",
    )
    for sub in (planned, listed):
        sub.add_argument(
            "--targets",
            default="qkvo",
            type=targets,
            metavar="T",
            help="letters of qkvo, mlp, all, names with commas between them, or a regular expression "
            "(default: qkvo)",
        )
        add_trust(sub)


def _add_checks(add: Add) -> None:
    checked = add(
        check,
        "check that an adapter is sound, and fits a model",
        "FOLDER",
        "my-adapter",
        "user/name --model HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    verified = add(
        verify,
        "load an adapter on its model, and check its effect, merging and export",
        "FOLDER",
        "my-adapter --model HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    for sub in (checked, verified):
        sub.add_argument(
            "--model",
            type=text,
            metavar="MODEL",
            help="folder of the model, or its name on the hub (default: the folder that the adapter names)",
        )
        add_place(sub)
        add_trust(sub, "the model of --model")
    verified.add_argument("--dtype", default="float32", metavar="TYPE", help=_dtype("float32"))
    add_task(verified)
    compared = add(
        compare,
        "compare the updates of two adapters, or of an adapter and its LoRA, module by module",
        "A B",
        "adapter-1 adapter-2",
        "my-adapter my-lora --all",
    )
    compared.add_argument(
        "--model",
        type=text,
        metavar="MODEL",
        help="folder of the model, or its name on the hub; needed for adapters on the residual stream "
        "(default: none)",
    )
    compared.add_argument(
        "--all", action="store_true", help="list every module (default: the ten that differ most)"
    )
    add_subfolders(compared, "A and B")
    add_task(compared, "--task-a", "A")
    add_task(compared, "--task-b", "B")
    add_trust(compared, "the model of --model")
    for sub, default in ((verified, 1e-3), (compared, 1e-4)):
        sub.add_argument(
            "--tolerance",
            type=tolerance,
            default=default,
            metavar="X",
            help=f"largest relative difference that counts as equal (default: {default:g})",
        )


def _add_writers(add: Add) -> None:
    merged = add(
        merge,
        "write the model with the adapter in its weights",
        "MODEL FOLDER OUT",
        "MODEL my-adapter merged --dtype bfloat16",
    )
    merged.add_argument(
        "--dtype", default="auto", metavar="TYPE", help=_dtype("as they are stored")
    )
    exported = add(
        export_lora,
        "write the adapter exactly as a standard LoRA of PEFT or llama.cpp",
        "FOLDER OUT",
        "my-adapter my-lora",
        "my-adapter adapter.gguf --format gguf --model MODEL",
        "my-tasks my-lora --task sst2",
    )
    exported.add_argument(
        "--model",
        type=text,
        metavar="MODEL",
        help="folder of the model, or its name on the hub; needed for adapters on the residual stream, and "
        "for gguf (default: none)",
    )
    exported.add_argument(
        "--format",
        choices=("peft", "gguf"),
        default="peft",
        help="OUT is a folder for PEFT and vLLM, or a file for llama.cpp (default: peft)",
    )
    imported = add(
        from_lora,
        "write a LoRA of PEFT as an adapter of lortalib, exactly",
        "FOLDER OUT",
        "my-lora my-adapter --model MODEL",
    )
    imported.add_argument(
        "--model",
        type=text,
        metavar="MODEL",
        help="folder of the model, or its name on the hub (default: the folder that the LoRA names)",
    )
    converted = add(
        convert,
        "write a folder of lortalib as one of PEFT, or the other way round",
        "FOLDER OUT",
        "my-adapter as-peft",
    )
    compressed = add(
        compress,
        "fit one tensor to LoRAs and adapters of one model",
        "LORA... OUT",
        "my-lora small --to cp --rank 32",
        "lora-1 lora-2 lora-3 together --to 'adapter r, layer matrix r, in r, head out r'",
        "lora-1 lora-2 lora-3 together --to jd --rank 16 --joint",
    )
    compressed.add_argument(
        "--to",
        type=text,
        default="cp",
        metavar="D",
        help="a format or a line of legs (default: cp)",
    )
    compressed.add_argument(
        "--rank", type=count, default=32, metavar="R", help="size of every bond (default: 32)"
    )
    compressed.add_argument(
        "--model",
        type=text,
        metavar="MODEL",
        help="folder of the model, or its name on the hub (default: the folder that the first adapter names)",
    )
    compressed.add_argument(
        "--gqa",
        choices=("pool", "split"),
        default="pool",
        help="where a model has fewer key/value heads than query heads: one tensor for all, or one for k "
        "and v alone (default: pool)",
    )
    compressed.add_argument(
        "--joint",
        action="store_true",
        help="write one folder for all, as an adapter whose tasks they are, with what they share once "
        "(default: a folder for each)",
    )
    compressed.add_argument(
        "--sweeps",
        type=count,
        default=100,
        metavar="N",
        help="largest number of sweeps of the fit (default: 100)",
    )
    add_trust(merged)
    add_trust(exported, "the model of --model")
    add_trust(imported, "the model of --model")
    add_place(imported)
    add_subfolders(compressed, "LORA")
    add_trust(compressed, "the model of --model")
    for sub in (merged, exported, converted):
        add_place(sub)
        add_task(sub)


def _dtype(default: str) -> str:
    return f"dtype of the weights: {', '.join(DTYPES)} (default: {default})"


class _Joined(argparse.Action):
    """Joins the lists that the words of one option stand for."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        """Store the joined list."""
        setattr(namespace, self.dest, list(chain.from_iterable(values)))
