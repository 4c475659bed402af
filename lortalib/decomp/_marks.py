"""Checks that the marks of a line fit together: ``(zero)``, ``(frozen)``, ``(tied)`` and ``(of n)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._modes import MODES
from ._notation import LegsError

if TYPE_CHECKING:
    from ._legs import Legs


def check_marks(legs: Legs, modes: Sequence[str]) -> None:
    """Check the marks of all parameters; see `Legs.check` for the errors.

    Args:
        legs: the line.
        modes: the names of the tensor's axes.
    """
    zeros = [term for term in legs.terms if term.zero]
    if len(zeros) > 1 or any(term.frozen for term in zeros):
        raise LegsError("one trainable parameter can be marked (zero), in", legs.line)
    _check_tied(legs)
    _check_hashed(legs, modes)


def _check_tied(legs: Legs) -> None:
    for k, term in enumerate(legs.terms):
        if not term.tied:
            continue
        if k == 0 or len(term.legs) != len(legs.terms[k - 1].legs):
            raise LegsError(
                "(tied) stands for the parameter before it, so there has to be one, with as many "
                "legs; found another in",
                *legs.place(term.legs[0], k),
            )
        if legs.terms[legs.owners[k]].zero:
            raise LegsError(
                "a parameter that is used twice cannot be (zero): its gradient would be zero too; in",
                *legs.place(term.legs[0], k),
            )


def _check_hashed(legs: Legs, modes: Sequence[str]) -> None:
    for vector in legs.vectors:
        own = [k for k, term in enumerate(legs.terms) if term.of == vector]
        where = legs.place(legs.terms[own[0]].legs[0], own[0])
        if vector in legs.carriers or vector in (*modes, *MODES):
            kind = "mode" if vector in (*modes, *MODES) else "bond"
            raise LegsError(
                f"(of {vector}) names a vector, but {vector!r} is a {kind}; choose another name, as "
                "(of n), in",
                *where,
            )
        if len({legs.terms[k].frozen for k in own}) > 1:
            raise LegsError(
                f"the parameters hashed from {vector!r} have one vector, so all or none are (frozen); mark "
                "the others too, or name another vector, in",
                *where,
            )
