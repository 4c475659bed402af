"""Finds the sizes of the legs of a line from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._carriers import Place
from ._notation import LegsError, Term


def sizes_of_tensors(
    terms: Sequence[Term],
    owners: Sequence[int],
    carriers: Mapping[str, Sequence[int]],
    shapes: Sequence[Sequence[int]],
    known: Mapping[str, int],
    line: str,
    place: Place,
) -> dict[str, int]:
    """Find the size of each leg and each vector; see `Legs.sizes` for the errors.

    Args:
        terms: the terms of the line.
        owners: for each term, the position of the term whose parameter it is.
        carriers: the positions of the terms with each leg.
        shapes: the shape of the stored tensor of each term.
        known: sizes of legs, which the tensors have to agree with.
        line: the line, for messages.
        place: where a leg stands, for messages.
    """
    if len(shapes) != len(terms):
        raise LegsError(
            f"{len(terms)} parameters are named but {len(shapes)} tensors were given, in",
            line,
        )
    sizes = {leg: n for leg, n in known.items() if leg in carriers}
    for position, (owner, shape) in enumerate(zip(owners, shapes)):
        term, vector = terms[position], terms[owner].of
        legs = (vector,) if vector else term.legs
        if len(shape) != len(legs):
            what = f"is hashed from the vector {vector!r}," if vector else f"has {len(legs)} legs"
            raise LegsError(
                f"parameter {position} ({term}) {what} but its tensor has shape {tuple(shape)}, in",
                *place(term.legs[0], position),
            )
        for leg, size in zip(legs, shape):
            if sizes.setdefault(leg, size) != size:
                where = "in the line" if leg in dict(term.factors) else "on an earlier parameter"
                raise LegsError(
                    f"{'vector' if vector else 'leg'} {leg!r} has size {size} here but {sizes[leg]} "
                    f"{where}, in",
                    *place(term.legs[0] if vector else leg, position),
                )
    unknown = [leg for leg in carriers if leg not in sizes]
    if unknown:
        raise LegsError(
            f"only hashed parameters carry {', '.join(unknown)}, so no tensor shows the sizes; give them "
            "too, as in Network(..., sizes=net.sizes), in",
            *place(unknown[0]),
        )
    return sizes


def check_tied_sizes(
    terms: Sequence[Term], owners: Sequence[int], sizes: Mapping[str, int], place: Place
) -> None:
    """Check that a tied term has the same sizes as its parameter; see `Legs.check_tied_sizes`."""
    for k, (term, owner) in enumerate(zip(terms, owners)):
        own = [sizes[leg] for leg in term.legs]
        wanted = [sizes[leg] for leg in terms[owner].legs]
        if own != wanted:
            raise LegsError(
                f"a tied parameter has the shape {tuple(wanted)} at ({terms[owner]}) and "
                f"{tuple(own)} here; its legs need equal sizes, in",
                *place(term.legs[0], k),
            )
