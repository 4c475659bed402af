"""Defines the command ``completion``, which prints a script for bash."""

from __future__ import annotations

import argparse
from argparse import Namespace

from ._output import Output

_SCRIPT = """\
_lortalib() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words="{commands} --version --help"
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    [ "$COMP_CWORD" -eq 1 ] && words="{commands} --version --help"
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _lortalib lortalib"""


def completion(options: Namespace, output: Output) -> bool:
    """Print a script that completes commands and options in bash: ``completion``."""
    from ._parser import make_parser  # deferred on purpose: the parser knows this command

    commands = subcommands(make_parser())
    cases = "\n".join(
        f'        {name}) words="{" ".join(sub._option_string_actions)}" ;;'
        for name, sub in commands.items()
    )
    script = _SCRIPT.format(commands=" ".join(commands), cases=cases)
    output.say(script)
    if output.machine:
        output.show({"script": script})
    return True


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command by its name.

    Args:
        parser: the parser of all commands.
    """
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices)
