"""Reads the notation, which writes a tensor network as one line of legs.

A line lists the parameters, separated by commas; a parameter lists its legs, separated by spaces.
A leg is a *mode* (an axis of the tensor) or a *bond* (an axis that is summed over). A mark may follow
the legs of a parameter: ``(frozen)`` is not trained, ``(zero)`` starts at zero, ``(shared)`` is the same
for all adapters of a bank, ``(tied)`` is the parameter before it used a second time, with other legs,
``(of n)`` is hashed: its entries are the entries of a trained vector of size n, drawn by a seed
(``(of n, seed 7)``; 0 if none is given), and ``(full)`` allows one parameter to have factors of both sides
of the update.

    in r, out r, head r, layer r, matrix r          CP
    in p, layer matrix p q, head out q              LoTR
    in r, out r (tied), layer matrix r              INDSCAL: symmetric slices
    layer in r (of n), layer out r (of n, zero)     Uni-LoRA: one vector for all factors
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

_MARKS = ("frozen", "zero", "shared", "tied", "full")


#: No alternative backtracks, so reading takes time linear in the length of the line.
_TOKEN = re.compile(r"\((?P<mark>[^()]*)\)|(?P<leg>[^\s,()]+)|(?P<comma>,)|(?P<other>\S)")


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


#: A leg: a name, or a factor of a mode with its place and perhaps its size, as in.2 or in.2:12.
_LEG = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\.[1-9][0-9]?(?::(?P<size>[1-9][0-9]{0,9}))?)?\Z")


_SEED = re.compile(r"[0-9]{1,18}\Z")  # below 2**64, the size of a key of the generator

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
        shared: whether all adapters of a bank have it in common; a tied term follows its parameter.
        tied: whether it uses the parameter before it again, axis by axis, with other legs.
        of: the name of the vector that its entries are drawn from; empty if the entries are its own.
        seed: the seed that draws which entry is which number of the vector.
        full: whether it may join factors of both sides of the update, whose low-rank pair is of full rank.
        factors: the sizes that the line gives to factors of modes, each with its leg.

    Example:
        >>> from lortalib.decomp import Legs
        >>> frozen, zero = Legs.parse("in r (frozen), out r (zero)").terms
        >>> frozen.legs, frozen.frozen, zero.zero, str(zero)
        (('in', 'r'), True, True, 'out r (zero)')
    """

    legs: tuple[str, ...]
    frozen: bool = False
    zero: bool = False
    shared: bool = False
    tied: bool = False
    of: str = ""
    seed: int = 0
    full: bool = False
    factors: tuple[tuple[str, int], ...] = ()
    spans: tuple[tuple[int, int], ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        marks = ["tied"] if self.tied else [mark for mark in _MARKS if getattr(self, mark)]
        if self.of:
            marks.insert(0, f"of {self.of}" + f", seed {self.seed}" * bool(self.seed))
        sizes = dict(self.factors)
        legs = (f"{leg}:{sizes[leg]}" if leg in sizes else leg for leg in self.legs)
        return " ".join([*legs, *(f"({mark})" for mark in marks)])

    @property
    def unmarked(self) -> Term:
        """The term without the marks that do not change which tensor it has a part in."""
        return replace(self, frozen=False, zero=False, shared=False, full=False, spans=())

    def without(self, gone: Iterable[str]) -> Term:
        """Return the term without the legs ``gone``, as after indexing them."""
        gone = set(gone)
        legs = tuple(leg for leg in self.legs if leg not in gone)
        factors = tuple(pair for pair in self.factors if pair[0] not in gone)
        return replace(self, legs=legs, factors=factors, spans=())


def vectors_of(terms: Iterable[Term]) -> tuple[str, ...]:
    """List the names of the vectors that parameters are hashed from, in order of first appearance."""
    return tuple(dict.fromkeys(term.of for term in terms if term.of))


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
    legs = dict.fromkeys([*(leg for term in terms for leg in term.legs), *vectors_of(terms)])
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
    if not isinstance(line, str):
        raise TypeError(f"a line of legs is a text; found {type(line).__name__}")
    if len(line) > MAX_LINE:
        raise LegsError(
            f"a line of legs has at most {MAX_LINE:,} characters; found {len(line):,}, which "
            f"begin {line[:40]!r}"
        )
    return _read_line(line)


@lru_cache(maxsize=1024)
def _read_line(line: str) -> tuple[str, tuple[Term, ...]]:
    line = re.sub(r"\s", " ", line)  # one for one, since errors point at columns
    if not line.strip():
        raise LegsError("the line of legs is empty; CP, for instance, is 'in r, out r, layer r'")
    terms: list[Term] = []
    names: dict[str, tuple[int, int]] = {}  # each with its position in the line
    sizes: dict[str, int] = {}  # of the factors that say theirs
    marks: dict[str, Any] = {}
    seeds: dict[str, int] = {}  # of each vector

    def close(at: int) -> None:
        if not names:
            raise LegsError("a parameter without legs in", line, (at, at + 1))
        if "tied" in marks and len(marks) > 1:
            raise LegsError(
                "a tied parameter takes its marks where it stands first, so (tied) stands alone in",
                line,
                names[next(iter(names))],
            )
        if (
            "seed" in marks
            and seeds.setdefault(marks.get("of", ""), marks["seed"]) != marks["seed"]
        ):
            raise LegsError(
                f"the vector {marks['of']!r} has one seed for all its parameters; found "
                f"{seeds[marks['of']]} and {marks['seed']} in",
                line,
                names[next(iter(names))],
            )
        if "" in seeds:
            raise LegsError(
                "a seed draws the entries of a hashed parameter, so it stands beside the vector, as in "
                "(of n, seed 7), in",
                line,
                names[next(iter(names))],
            )
        if "tied" in marks and terms:
            marks.update({mark: getattr(terms[-1], mark) for mark in ("frozen", "shared")})
        own = tuple((leg, sizes[leg]) for leg in names if leg in sizes)
        terms.append(Term(tuple(names), factors=own, spans=tuple(names.values()), **marks))
        for read in (names, sizes, marks):
            read.clear()

    for token in _TOKEN.finditer(line):
        span = token.span()
        if token["comma"]:
            close(span[0])
            continue
        if token["mark"] is not None:
            for mark in token["mark"].split(","):
                read = _read_mark(mark.strip(), line, span)
                if marks.get("of", read.get("of")) != read.get("of", marks.get("of")):
                    raise LegsError("one parameter is hashed from one vector, in", line, span)
                marks |= read
            continue
        found = None if token["leg"] is None else _LEG.match(token["leg"])
        if found is None or marks:
            no_leg = "no leg name (letters, digits, _; a factor of a mode is in.1, or in.1:8 with its size)"
            why = "a leg behind a mark" if marks else no_leg
            raise LegsError(f"{token[0]!r} is {why} in", line, span)
        leg = found[0].partition(":")[0]
        if leg in names:
            raise LegsError(
                f"leg {leg!r} stands twice on one parameter; "
                "give the second axis a name of its own in",
                line,
                span,
            )
        names[leg] = span
        if found["size"]:
            sizes[leg] = int(found["size"])
    close(len(line))
    check_bounds(terms)
    return line, tuple(replace(term, seed=seeds.get(term.of, 0)) for term in terms)


def _read_mark(mark: str, line: str, span: tuple[int, int]) -> dict[str, Any]:
    """Read one mark: the field of `Term` that it sets, and the value."""
    if mark in _MARKS:
        return {mark: True}
    word, _, value = mark.partition(" ")
    if word == "of" and _NAME.match(value.strip()):
        return {"of": value.strip()}
    if word == "seed" and _SEED.match(value.strip()):
        return {"seed": int(value)}
    if word == "of":
        raise LegsError(
            f"({abbreviated(mark)[1:-1]}) names no vector; give it a name, as in (of n), and its size with "
            "the ranks, as in rank={'r': 4, 'n': 4096}, in",
            line,
            span,
        )
    raise LegsError(
        f"unknown mark ({mark}); a parameter can be marked "
        f"{' or '.join(f'({known})' for known in _MARKS)} or (of n), for instance (of n, seed 7), in",
        line,
        span,
    )


def name_of(term: Term) -> str:
    """Name a parameter after its legs; names of PyTorch have no dots."""
    return "_".join(term.legs).replace(".", "_")
