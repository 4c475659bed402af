"""Computes the largest useful ranks of a line: what the sizes of the other legs can fill."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ._notation import Term, vectors_of


def rank_limits(
    terms: Sequence[Term],
    owners: Sequence[int],
    carriers: Mapping[str, Sequence[int]],
    bonds: Sequence[str],
    sizes: Mapping[str, int],
) -> dict[str, int]:
    """Compute the largest useful size of each bond and each vector; see `Legs.limits`.

    Args:
        terms: the terms of the line.
        owners: for each term, the position of the term whose parameter it is.
        carriers: the positions of the terms with each leg.
        bonds: the legs that are summed over.
        sizes: the size of every leg and every vector.
    """
    sizes = dict(sizes)
    joined = {bond: [set(terms[k].legs) for k in carriers[bond]] for bond in bonds}
    holders = {bond: _holders(terms, owners, carriers[bond]) for bond in bonds}
    changed = True
    while changed:
        changed = False
        for bond, legs in joined.items():
            every = set().union(*legs)
            for holder in holders[bond]:
                limit = math.prod(sizes[leg] for leg in every - legs[holder])
                if limit < sizes[bond]:
                    sizes[bond], changed = limit, True
    limits = {bond: sizes[bond] for bond in bonds}
    for vector in vectors_of(terms):
        own = (term.legs for term in terms if term.of == vector)
        limits[vector] = min(
            sizes[vector], sum(math.prod(sizes[leg] for leg in legs) for legs in own)
        )
    return limits


def _holders(
    terms: Sequence[Term], owners: Sequence[int], carriers: Sequence[int]
) -> Sequence[int]:
    """Find which of a bond's parameters can hold every entry of their product, by their places there."""
    if len(carriers) == 2:
        return range(2)
    if any(terms[k].frozen or terms[k].of for k in carriers):
        return ()  # the others cannot be ones and zeros
    own = [owners[k] for k in carriers]
    return [place for place, owner in enumerate(own) if own.count(owner) == 1]
