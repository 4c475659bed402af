"""Prints tables and progress for people, JSON for machines."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")


class Output:
    """Prints a command's findings as tables, or as one JSON object.

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
                cells = [[_cell(value) for value in row.values()] for row in rows]
                print("\n".join(_table(list(rows[0]), cells, _width())), end="\n\n")

    def say(self, line: str) -> None:
        """Print a line for people."""
        if not self.machine:
            print(_printable(line))

    def error(self, error: BaseException) -> None:
        """Print an error's message, without a traceback."""
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        if isinstance(error, OSError) and error.strerror and error.filename:  # of the system itself
            text = (
                f"{error.filename}: {error.strerror}. Give another path, or change its permissions"
            )
        text = text.strip() or type(error).__name__
        if self.machine:
            print(json.dumps({"error": text, "kind": type(error).__name__}))
        else:
            print(f"lortalib: {_printable(text)}", file=sys.stderr)

    def progress(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """Yield the items, with a progress bar if standard error is a terminal and tqdm is installed."""
        try:
            if self.machine or not sys.stderr.isatty():
                raise ImportError
            from tqdm import tqdm
        except ImportError:
            yield from items
            return
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
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return _printable(str(value))


def _printable(text: str) -> str:
    """Escape characters that a terminal should not get, such as control characters in file names."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text
    )


def _is_number(cell: str) -> bool:
    """Return True if a cell is a number, or the mark of a missing number."""
    try:
        float(cell.replace(",", ""))
    except ValueError:
        return cell == _cell(None)
    return True


def _width() -> int | None:
    """Return the number of characters in a line: of the terminal, or of ``COLUMNS``; None for a pipe."""
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return None


def _table(head: list[str], rows: list[list[str]], width: int | None) -> list[str]:
    """Return the lines of a table, or, where it is too wide, of its records one below the other."""
    rows = [[" ".join(cell.split("\n")) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        return _records(head, rows, width)
    right = [all(map(_is_number, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.rjust(size) if number else cell.ljust(size)
            for cell, size, number in zip(row, widths, right)
        ).rstrip()
        for row in (head, *rows)
    ]


def _records(head: list[str], rows: list[list[str]], width: int) -> list[str]:
    """Return one line for each cell, under its heading; a record of several lines ends with an empty one."""
    lines: list[str] = []
    for row in rows:
        for name, cell in zip(head, row):
            text = f"{name}: {cell}" if name else cell
            lines += textwrap.wrap(text, max(width, 20), subsequent_indent="    ")
        lines.append("")
    return lines[:-1]
