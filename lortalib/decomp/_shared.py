"""Marks parameters of a line as shared by all adapters of a bank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ._legs import Legs
from ._notation import LegsError, closest


def mark_shared(legs: Legs, names: Iterable[str]) -> Legs:
    """Mark all parameters that carry one of some legs as ``(shared)``.

    Parameters that use one stored tensor, because they are tied or hashed from one vector, are marked
    together.

    Args:
        legs: the line.
        names: names of modes or bonds; a mode that is split stands for all its factors.

    Raises:
        LegsError: no parameter carries a leg of this name.

    Example:
        >>> str(mark_shared(Legs.parse("in r, out r, layer r"), ["in", "out"]))
        'in r (shared), out r (shared), layer r'
    """
    shared = set()
    for name in names:
        own = legs.open_legs([name])
        if not legs.carriers.keys() >= {*own}:
            raise LegsError(
                f"no parameter carries the leg {name!r}{closest(name, legs.carriers)}, so none can be "
                f"shared; the legs are {', '.join(legs.carriers)}, in",
                legs.line or str(legs),
            )
        shared |= {legs.holders[k] for leg in own for k in legs.carriers[leg]}
    terms = zip(legs.terms, legs.holders)
    marked = (replace(t, shared=True, spans=()) if k in shared else t for t, k in terms)
    return Legs(tuple(marked))
