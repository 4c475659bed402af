"""Refuses a split line whose low-rank pairs would have full rank, unless it asks for that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ._cut import OUT_MODES, make_cut_plan
from ._factors import is_factor
from ._legs import Legs
from ._notation import LegsError


def check_full(legs: Legs, sizes: Mapping[str, int], modes: Sequence[str]) -> None:
    """Check that no unmarked parameter of a split line has legs of ``in`` and of the other side.

    Such a leg cannot stay on its side of a cut, as in a Kronecker product ``in.1 out.1, in.2 out.2``, so the
    pair (A, B) has the rank of a dense matrix and a forward takes as many multiplications.

    Args:
        legs: the line.
        sizes: the size of every leg.
        modes: the modes of the tensor, whole.

    Raises:
        LegsError: such a parameter that is not marked ``(full)``.
    """
    inputs = legs.open_legs(["in"])
    outputs = legs.open_legs([mode for mode in OUT_MODES if mode in modes])
    if not any(map(is_factor, (*inputs, *outputs))):
        return
    for term in legs.terms:
        near, far = ([leg for leg in term.legs if leg in side] for side in (inputs, outputs))
        if near and far and not term.full:
            others = [mode for mode in modes if mode not in ("in", *OUT_MODES)]
            terms = tuple(term.legs for term in legs.terms)
            batch = tuple(legs.open_legs([mode]) for mode in others)
            rank = make_cut_plan(terms, tuple(sizes.items()), inputs, outputs, batch).rank
            width = math.prod(sizes[leg] for leg in inputs)
            raise LegsError(
                f"{' '.join(near)} and {' '.join(far)} are of opposite sides of the update and on one "
                f"parameter, so the low-rank pair has rank {rank}, for an input of {width}: it costs as "
                f"much as a dense matrix. If that is wanted, mark the parameter, as in "
                f"'{' '.join(term.legs)} (full)'; else give each side parameters of its own, in\n"
                f"    {legs.line or legs}"
            )
