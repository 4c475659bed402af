"""Writes the lines of the formats whose line depends on the modes, and reads tuples of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice

from ._build import Rank
from ._modes import Shape

#: The order of the modes in a tensor train, as in MetaTT-5D and (with a task) MetaTT-(4+1)D.
_TRAIN = ("in", "layer", "task", "expert", "matrix", "head", "out")
_TUCKER = dict(zip(("in", "out", "head", "layer", "matrix", "task", "expert"), "pqstuvw"))


def _letters() -> Iterator[str]:
    """Yield names of bonds without end: a to o, then b1, b2 and so on."""
    return chain("abcdefghijklmno", (f"b{k}" for k in count(1)))


def cp_line(shape: Shape) -> str:
    """Write the line of CP: one factor for each mode."""
    modes = _ordered(shape, ("in", "out", "head", "layer", "matrix", "task", "expert"))
    bond = _fresh(shape, "r")
    return ", ".join(f"{mode} {bond}" for mode in modes)


def cp_matrix_line(shape: Shape) -> str:
    """Write the line that makes a CP of its own for each slice T[matrix]."""
    slices = Shape({mode: size for mode, size in shape.items() if mode != "matrix"})
    own = "matrix " * ("matrix" in shape)
    return ", ".join(own + term for term in cp_line(slices).split(", "))


def _tucker_bonds(shape: Shape) -> dict[str, str]:
    free = _letters()
    return {mode: _fresh(shape, _TUCKER.get(mode) or next(free)) for mode in shape}


def tucker_line(shape: Shape) -> str:
    """Write the line of Tucker: one factor for each mode and a core."""
    bonds = _tucker_bonds(shape)
    modes = _ordered(shape, tuple(_TUCKER))
    factors = [f"{mode} {bonds[mode]}" for mode in modes]
    return ", ".join([*factors, " ".join(bonds[mode] for mode in modes)])


def tt_line(shape: Shape) -> str:
    """Write the line of a tensor train in the order of MetaTT."""
    return train_line(_ordered(shape, _TRAIN), shape)


def train_line(modes: Sequence[str], shape: Shape) -> str:
    """Write the line of a tensor train through ``modes`` in this order."""
    bonds = [_fresh(shape, letter) for letter in islice(_letters(), len(modes) - 1)]
    left, right = ["", *bonds], [*bonds, ""]
    return ", ".join(" ".join(filter(None, legs)) for legs in zip(modes, left, right))


def ring_line(shape: Shape) -> str:
    """Write the line of a tensor ring: a train with one more bond that joins its two ends."""
    modes = _ordered(shape, _TRAIN)
    bonds = [_fresh(shape, letter) for letter in islice(_letters(), len(modes))]
    return ", ".join(f"{mode} {bonds[k - 1]} {bonds[k]}" for k, mode in enumerate(modes))


def cara_line(shape: Shape) -> str:
    """Write the line of CaRA: CP in which all modes but in, out and head share one factor."""
    bond = _fresh(shape, "r")
    slices = [mode for mode in _slices(shape) if mode != "head"]
    factors = [*(mode for mode in ("in", "out", "head") if mode in shape), " ".join(slices)]
    return ", ".join(f"{legs} {bond}" for legs in factors if legs)


def block_term_line(shape: Shape) -> str:
    """Write the line of a block-term decomposition: Tucker with one more bond on every parameter."""
    block = _fresh(shape, "n")
    return ", ".join(f"{term} {block}" for term in tucker_line(shape).split(", "))


def indscal_line(shape: Shape) -> str:
    """Write the line of INDSCAL: each slice is A^T diag(c) A."""
    bond = _fresh(shape, "r")
    return f"in {bond}, out {bond} (tied), {' '.join([*_slices(shape), bond])}"


def rescal_line(shape: Shape) -> str:
    """Write the line of RESCAL: each slice is A^T C A."""
    p, q = _fresh(shape, "p"), _fresh(shape, "q")
    return f"in {p}, out {q} (tied), {' '.join([*_slices(shape), p, q])}"


def _slices(shape: Shape) -> list[str]:
    """List the modes other than in and out; each of their values is one matrix."""
    return _ordered(
        Shape({mode: size for mode, size in shape.items() if mode not in ("in", "out")}),
        ("layer", "head", "matrix"),
    )


def _ordered(shape: Shape, order: Sequence[str]) -> list[str]:
    known = [mode for mode in order if mode in shape]
    return known + [mode for mode in shape if mode not in order]


def _fresh(shape: Shape, name: str) -> str:
    while name in shape:
        name += "_"
    return name


def tucker_ranks(shape: Shape, rank: Sequence[int]) -> Rank:
    """Read one rank for each axis of the tensor, as TensorLy does."""
    if len(rank) != len(shape):
        raise ValueError(
            f"{len(rank)} Tucker ranks were given, {tuple(rank)}, for the {len(shape)} modes "
            f"{', '.join(shape)}"
        )
    return {bond: rank[k] for k, bond in enumerate(_tucker_bonds(shape).values())}


def tt_ranks(shape: Shape, rank: Sequence[int]) -> Rank:
    """Read the inner ranks along the train; the outer ranks of 1 that TensorLy writes are accepted."""
    if len(rank) == len(shape) + 1 and rank[0] == rank[-1] == 1:
        return tuple(rank[1:-1])
    return rank
