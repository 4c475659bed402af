"""Reads the notation, which writes a tensor network as one line of legs.

A line lists the parameters, separated by commas; a parameter lists its legs, separated by spaces.
A leg is a *mode* (an axis of the tensor) or a *bond* (an axis that is summed over). A mark may follow
the legs of a parameter: ``(frozen)`` is not trained, ``(zero)`` starts at zero, and ``(tied)`` is the
parameter before it used a second time, with other legs.

    in r, out r, head r, layer r, matrix r          CP
    in p, layer matrix p q, head out q              LoTR
    in r, out r (tied), layer matrix r              INDSCAL: symmetric slices
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

_MARKS = ("frozen", "zero", "tied")


#: No alternative backtracks, so reading takes time linear in the length of the line.
_TOKEN = re.compile(r"\((?P<mark>[^()]*)\)|(?P<leg>[^\s,()]+)|(?P<comma>,)|(?P<other>\S)")


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

#: Limits of a line, so that a line from an untrusted file cannot use up time or memory. There are 52
#: legs at most because einsum has one letter for each.
MAX_LINE, MAX_PARAMETERS, MAX_LEGS, MAX_NAME = 10_000, 64, 52, 100


class LegsError(ValueError):
    """Raised for a line of legs that cannot be read or does not fit a shape; the message shows where."""

    def __init__(self, message: str, line: str = "", span: tuple[int, int] | None = None) -> None:
        if line:
            message += f"\n    {line}"
        if line and span is not None:
            message += "\n    " + " " * span[0] + "^" * max(1, span[1] - span[0])
        super().__init__(message)


@dataclass(frozen=True)
class Term:
    """A term of a line: the legs and marks of one parameter.

    Attributes:
        legs: the names of its axes.
        frozen: whether it is not trained; a tied term follows its parameter.
        zero: whether it is the parameter that starts at zero.
        tied: whether it uses the parameter before it again, axis by axis, with other legs.
    """

    legs: tuple[str, ...]
    frozen: bool = False
    zero: bool = False
    tied: bool = False
    spans: tuple[tuple[int, int], ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        marks = ["tied"] if self.tied else [mark for mark in _MARKS if getattr(self, mark)]
        return " ".join([*self.legs, *(f"({mark})" for mark in marks)])

    def without(self, gone: Iterable[str]) -> Term:
        """Return the term without the legs ``gone``, as after indexing them."""
        gone = set(gone)
        return replace(self, legs=tuple(leg for leg in self.legs if leg not in gone), spans=())


def check_bounds(terms: Sequence[Term]) -> None:
    """Refuse a network with too many parameters, too many legs or too long a name.

    Args:
        terms: the terms of its line.

    Raises:
        LegsError: more than 64 parameters, 52 different legs or 100 characters in the name of a leg.
    """
    if len(terms) > MAX_PARAMETERS:
        raise LegsError(
            f"a network has at most {MAX_PARAMETERS} parameters; found {len(terms)}. Contract some "
            "of them to one first"
        )
    legs = dict.fromkeys(leg for term in terms for leg in term.legs)
    if len(legs) > MAX_LEGS:
        raise LegsError(
            f"a network has at most {MAX_LEGS} different legs, one for each letter of einsum; found "
            f"{len(legs)}. Join bonds between the same parameters to one"
        )
    long = [leg for leg in legs if len(leg) > MAX_NAME]
    if long:
        raise LegsError(
            f"the name of a leg has at most {MAX_NAME} characters; found {abbreviated(long[0])}"
        )


def abbreviated(text: str) -> str:
    """Quote a text for an error message; of a long text, only the beginning."""
    if len(text) <= MAX_NAME:
        return repr(text)
    return f"{text[:40]!r}... of {len(text):,} characters"


def closest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name most similar to a misspelt one, as a clause for an error message.

    The clause is empty if no name is close. Long names are not compared: that takes quadratic time.
    """
    short = [other for other in known if len(other) <= MAX_NAME][:200]
    found = difflib.get_close_matches(name, short, 1) if len(name) <= MAX_NAME else []
    return f" (did you mean {found[0]!r}?)" if found else ""


def read_line(line: str) -> tuple[str, tuple[Term, ...]]:
    """Split a line of legs into its parameters; see `Legs.parse` for the errors.

    Args:
        line: the line.

    Returns:
        The line with every blank replaced by a space, and its terms with their positions in it.
    """
    if len(line) > MAX_LINE:
        raise LegsError(
            f"a line of legs has at most {MAX_LINE:,} characters; found {len(line):,}, which "
            f"begin {line[:40]!r}"
        )
    line = re.sub(r"\s", " ", line)  # one for one, since errors point at columns
    if not line.strip():
        raise LegsError("the line of legs is empty; CP, for instance, is 'in r, out r, layer r'")
    terms: list[Term] = []
    names: dict[str, tuple[int, int]] = {}  # each with its position in the line
    marks: list[str] = []

    def close(at: int) -> None:
        if not names:
            raise LegsError("a parameter without legs in", line, (at, at + 1))
        marked = dict.fromkeys(marks, True)
        if "tied" in marked and len(marked) > 1:
            raise LegsError(
                "a tied parameter takes its marks where it stands first, so (tied) stands alone in",
                line,
                names[next(iter(names))],
            )
        if "tied" in marked and terms:
            marked["frozen"] = terms[-1].frozen
        terms.append(Term(tuple(names), spans=tuple(names.values()), **marked))
        names.clear()
        marks.clear()

    for token in _TOKEN.finditer(line):
        span = token.span()
        if token["comma"]:
            close(span[0])
        elif token["mark"] is not None:
            mark = token["mark"].strip()
            if mark not in _MARKS:
                raise LegsError(
                    f"unknown mark ({mark}); a parameter can be marked "
                    f"{' or '.join(f'({mark})' for mark in _MARKS)} in",
                    line,
                    span,
                )
            marks.append(mark)
        elif token["leg"] is None or not _NAME.match(token["leg"]) or marks:
            why = "a leg behind a mark" if marks else "no leg name (letters, digits, _)"
            raise LegsError(f"{token[0]!r} is {why} in", line, span)
        elif token["leg"] in names:
            raise LegsError(
                f"leg {token['leg']!r} stands twice on one parameter; "
                "give the second axis a name of its own in",
                line,
                span,
            )
        else:
            names[token["leg"]] = span
    close(len(line))
    check_bounds(terms)
    return line, tuple(terms)
