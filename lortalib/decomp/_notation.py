"""The notation: a tensor network as one line of legs.

A line lists the parameters, separated by commas; a parameter lists its legs, separated by spaces.
A leg is a *mode* (an axis of the tensor) or a *bond* (an axis that is summed over). Behind the legs
a parameter may be marked ``(frozen)``, not trained, ``(zero)``, the one that starts at zero, or
``(tied)``, which is the parameter before it once more, with other legs.

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


#: Every alternative ends at the first character that it cannot take, so reading is linear in the line.
_TOKEN = re.compile(r"\((?P<mark>[^()]*)\)|(?P<leg>[^\s,()]+)|(?P<comma>,)|(?P<other>\S)")


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

#: Bounds of a line, so that one from a stranger's file costs neither time nor memory. The contraction
#: has a letter of the alphabet for each leg.
MAX_LINE, MAX_PARAMETERS, MAX_LEGS, MAX_NAME = 10_000, 64, 52, 100


class LegsError(ValueError):
    """A line of legs that cannot be read, or that does not fit a shape; shows where."""

    def __init__(self, message: str, line: str = "", span: tuple[int, int] | None = None) -> None:
        if line:
            message += f"\n    {line}"
        if line and span is not None:
            message += "\n    " + " " * span[0] + "^" * max(1, span[1] - span[0])
        super().__init__(message)


@dataclass(frozen=True)
class Term:
    """The legs of one parameter and its marks.

    Attributes:
        legs: names of its axes.
        frozen: whether it is not trained; a tied one is as the parameter is.
        zero: whether it is the one that starts at zero.
        tied: whether it is the parameter before it once more, axis by axis, with other legs.
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
        """The same parameter after the legs ``gone`` were indexed away."""
        gone = set(gone)
        return replace(self, legs=tuple(leg for leg in self.legs if leg not in gone), spans=())


def check_bounds(terms: Sequence[Term]) -> None:
    """Refuse a network of more parameters, legs or letters in a name than the library works with.

    Args:
        terms: the parameters.

    Raises:
        LegsError: more than 64 parameters, 52 different legs, or 100 letters in the name of one.
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
    """Quote a text for an error message, and only the beginning of a long one."""
    if len(text) <= MAX_NAME:
        return repr(text)
    return f"{text[:40]!r}... of {len(text):,} characters"


def closest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that is most like a misspelt one, as a clause for an error message.

    Long names are not compared, because that takes quadratic time. Empty if nothing is close.
    """
    short = [other for other in known if len(other) <= MAX_NAME][:200]
    found = difflib.get_close_matches(name, short, 1) if len(name) <= MAX_NAME else []
    return f" (did you mean {found[0]!r}?)" if found else ""


def read_line(line: str) -> tuple[str, tuple[Term, ...]]:
    """Read the parameters off a line of legs; see `Legs.parse` for the errors.

    Args:
        line: the line.

    Returns:
        The line with every blank as a space, and its parameters with their places in it.
    """
    if len(line) > MAX_LINE:
        raise LegsError(
            f"a line of legs has at most {MAX_LINE:,} characters; found {len(line):,}, which "
            f"begin {line[:40]!r}"
        )
    line = re.sub(r"\s", " ", line)  # one for one: errors point at columns
    if not line.strip():
        raise LegsError("the line of legs is empty; CP, for instance, is 'in r, out r, layer r'")
    terms: list[Term] = []
    names: dict[str, tuple[int, int]] = {}  # each with its place in the line
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
