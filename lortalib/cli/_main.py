"""Reads the arguments, runs a command, and turns errors into messages."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ._output import Output
from ._parser import make_parser

#: Errors that a user can fix: a wrong path, a damaged file, a model that does not fit.
_USER_ERRORS = (OSError, ValueError, KeyError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the arguments without the program's name; by default those of the process.

    Returns:
        The exit code: 0 for success; 1 if the command failed or a check found a fault; 130 after an
        interrupt. Wrong usage makes argparse exit with 2.

    Example:
        >>> main(["info", "no-such-folder", "--json"])  # doctest: +ELLIPSIS
        {"error": "no adapter.safetensors in no-such-folder; ...
        1
    """
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if (
        rest
        and all(rest)
        and hasattr(options, "lora")
        and not any(each.startswith("-") for each in rest)
    ):
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
