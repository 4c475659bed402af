"""Computes the largest useful ranks of a line: what the sizes of the other legs can fill."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ._notation import Term, vectors_of


def rank_limits(
    terms: Sequence[Term],
    carriers: Mapping[str, Sequence[int]],
    bonds: Sequence[str],
    sizes: Mapping[str, int],
) -> dict[str, int]:
    """Compute the largest useful size of each bond and each vector; see `Legs.limits`.

    Args:
        terms: the terms of the line.
        carriers: the positions of the terms with each leg.
        bonds: the legs that are summed over.
        sizes: the size of every leg and every vector.
    """
    sizes = dict(sizes)
    pairs = [
        (bond, [set(terms[position].legs) for position in carriers[bond]])
        for bond in bonds
        if len(carriers[bond]) == 2
    ]
    changed = True
    while changed:
        changed = False
        for bond, (left, right) in pairs:
            shared = left & right
            limit = min(math.prod(sizes[leg] for leg in side - shared) for side in (left, right))
            if limit < sizes[bond]:
                sizes[bond], changed = limit, True
    limits = {bond: sizes[bond] for bond in bonds}
    for vector in vectors_of(terms):
        own = (term.legs for term in terms if term.of == vector)
        limits[vector] = min(
            sizes[vector], sum(math.prod(sizes[leg] for leg in legs) for legs in own)
        )
    return limits
