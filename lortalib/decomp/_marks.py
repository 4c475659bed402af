"""Checks and reads the marks of a line, such as ``(zero)``, ``(tied)`` and ``(of n)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Union

from ._modes import MODES
from ._notation import LegsError, Term, vectors_of

#: The line, and the columns of the first leg of the term at a position.
Place = Callable[[int], tuple[str, Union[tuple[int, int], None]]]


def check_marks(
    terms: Sequence[Term], owners: Sequence[int], modes: Sequence[str], place: Place
) -> None:
    """Check the marks of all parameters; see `Legs.check` for the errors.

    Args:
        terms: the terms of the line.
        owners: the position of each term's parameter; see `Legs.owners`.
        modes: the names of the tensor's axes.
        place: where a term stands, for messages.
    """
    zeros = [k for k, term in enumerate(terms) if term.zero]
    if len(zeros) > 1 or any(terms[k].frozen for k in zeros):
        raise LegsError("one trainable parameter can be marked (zero), in", place(zeros[0])[0])
    _check_tied(terms, owners, place)
    _check_hashed(terms, modes, place)


def zeroable(
    terms: Sequence[Term], owners: Sequence[int], holders: Sequence[int]
) -> tuple[int, ...]:
    """List the positions of the parameters that can start at zero; see `Legs.zero`.

    Args:
        terms: the terms of the line.
        owners, holders: as `Legs.owners` and `Legs.holders`.
    """
    once = (k for k in range(len(terms)) if owners.count(owners[k]) == 1)
    trainable = (k for k in once if not terms[k].frozen)
    shared = {k for k in holders if holders.count(k) > 1}
    return tuple(k for k in trainable if terms[k].zero or holders[k] not in shared)


def _check_tied(terms: Sequence[Term], owners: Sequence[int], place: Place) -> None:
    for k, term in enumerate(terms):
        if not term.tied:
            continue
        if k == 0 or len(term.legs) != len(terms[k - 1].legs):
            raise LegsError(
                "(tied) stands for the parameter before it, so there has to be one, with as many "
                "legs; found another in",
                *place(k),
            )
        if terms[owners[k]].zero:
            raise LegsError(
                "a parameter that is used twice cannot be (zero): its gradient would be zero too; in",
                *place(k),
            )


def _check_hashed(terms: Sequence[Term], modes: Sequence[str], place: Place) -> None:
    taken = {leg for term in terms for leg in term.legs}
    for vector in vectors_of(terms):
        own = [k for k, term in enumerate(terms) if term.of == vector]
        if vector in taken or vector in (*modes, *MODES):
            kind = "mode" if vector in (*modes, *MODES) else "bond"
            raise LegsError(
                f"(of {vector}) names a vector, but {vector!r} is a {kind}; choose another name, as "
                "(of n), in",
                *place(own[0]),
            )
        for mark in ("frozen", "shared"):
            if len({getattr(terms[k], mark) for k in own}) > 1:
                raise LegsError(
                    f"the parameters hashed from {vector!r} have one vector, so all or none are ({mark}); "
                    "mark the others too, or name another vector, in",
                    *place(own[0]),
                )
