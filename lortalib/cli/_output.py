"""Prints tables and progress for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")


class Output:
    """Prints a command's findings as tables, with rich if it is installed, or as one JSON object.

    Attributes:
        machine: whether to print JSON.
    """

    def __init__(self, machine: bool) -> None:
        self.machine = machine

    def show(self, findings: dict[str, Any], *tables: Iterable[dict[str, Any]]) -> None:
        """Print the findings.

        Args:
            findings: all findings, for JSON.
            tables: tables for people: records with the same keys, which become the headings.
        """
        if self.machine:
            print(json.dumps(findings, indent=2))
            return
        for records in tables:
            rows = list(records)
            if rows:
                _print_table(list(rows[0]), [[_cell(v) for v in row.values()] for row in rows])

    def say(self, line: str) -> None:
        """Print a line for people."""
        if not self.machine:
            print(_printable(line))

    def error(self, error: BaseException) -> None:
        """Print an error's message, without a traceback."""
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        text = text.strip() or type(error).__name__
        if self.machine:
            print(json.dumps({"error": text, "kind": type(error).__name__}))
        else:
            print(f"lortalib: {_printable(text)}", file=sys.stderr)

    def progress(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """Yield the items, with a progress bar if standard error is a terminal."""
        if self.machine or not sys.stderr.isatty():
            yield from items
            return
        from tqdm import tqdm

        yield from tqdm(items, desc=what, leave=False)

    @contextmanager
    def counter(self, number: int, what: str) -> Iterator[Callable[[str], None]]:
        """Lend a function that counts steps on a progress bar, if standard error is a terminal.

        Args:
            number: the largest number of steps.
            what: what is counted.
        """
        if self.machine or not sys.stderr.isatty():
            yield lambda text: None
            return
        from tqdm import tqdm

        with tqdm(total=number, desc=what, leave=False) as bar:

            def step(text: str) -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update()

            yield step


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else _printable(str(value))


def _printable(text: str) -> str:
    """Escape characters that a terminal should not get, such as control characters in file names."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text
    )


def _is_number(cell: str) -> bool:
    """Return True if a cell is a number, or the mark of a missing number."""
    return cell == _cell(None) or cell.replace(",", "").replace(".", "").isdigit()


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        for row in (head, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        print()
        return
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name, column in zip(head, zip(*rows)):
        side: Literal["left", "right"] = "right" if all(map(_is_number, column)) else "left"
        table.add_column(name, justify=side, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    # Names from files may look like markup of rich, and are printed as plain text.
    console = Console(width=width, markup=False, emoji=False)
    console.print(table)
    console.print()
