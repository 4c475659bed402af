"""Checks that each mode of a tensor has its parameters in a line, and each bond joins some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Union

from ._factors import open_legs, wrong_factor
from ._modes import MODES
from ._notation import LegsError, closest

#: The line, and the columns of a leg on the term at a position, by default the first that has it.
Place = Callable[..., tuple[str, Union[tuple[int, int], None]]]


def check_carriers(
    carriers: Mapping[str, Sequence[int]], modes: Sequence[str], line: str, place: Place
) -> None:
    """Check the legs of a line against the modes of a tensor; see `Legs.check` for the errors.

    Args:
        carriers: the positions of the parameters that carry each leg.
        modes: the names of the tensor's axes.
        line: the line, for messages.
        place: where a leg stands, for messages.
    """
    axes = open_legs(tuple(modes), tuple(carriers))
    if len(set(modes)) < len(modes):
        raise LegsError(
            f"a mode stands twice among {', '.join(modes)}; its axes need names, for", line
        )
    wrong = wrong_factor(modes, carriers)
    if wrong is not None:
        raise LegsError(f"{wrong[1]}, in", *place(wrong[0]))
    for leg, positions in carriers.items():
        if leg in axes:
            continue
        if leg in MODES:
            raise LegsError(
                f"unknown leg {leg!r}: it names a mode, but the tensor's modes are "
                f"{', '.join(modes)} (add it to the shape, or choose a line without it), in",
                *place(leg),
            )
        if len(positions) == 1:
            raise LegsError(
                f"unknown leg {leg!r}{closest(leg, modes)}: it is none of the tensor's modes "
                f"({', '.join(modes)}), and as a bond it needs a second parameter to join, in",
                *place(leg),
            )
    missing = [mode for mode in axes if mode not in carriers]
    if missing:
        raise LegsError(
            f"no parameter carries the mode {', '.join(map(repr, missing))} of the tensor, in",
            line,
        )
    for leg in open_legs(("in",), tuple(carriers)):
        if len(carriers.get(leg, ())) > 1:
            raise LegsError(
                f"{leg!r} stands on several parameters; an update is cut at the one that carries it, "
                "so exactly one can, in",
                *place(leg, carriers[leg][1]),
            )
