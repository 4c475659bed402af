"""Writes the lines of the formats whose line depends on the modes, and reads tuples of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice

from ._factors import mode_of, usual_factors
from ._modes import Shape
from ._ranks import Rank

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
    own, rest = _sides(shape, ("matrix",))
    slices = Shape({leg: shape[leg] for leg in rest})
    return ", ".join(" ".join([*own, term]) for term in cp_line(slices).split(", "))


def folded_cp_line(shape: Shape) -> str:
    """Write the line of CP with a factor for each digit of ``in`` and ``out``."""
    return cp_line(_folded(shape))


def tt_lora_line(shape: Shape) -> str:
    """Write the line of TT-LoRA: for each matrix a train through the digits of ``in`` and of ``out``."""
    return _own_train(_folded(shape))


def loretta_line(shape: Shape) -> str:
    """Write the line of LoRETTA_rep: each of the two matrices of a LoRA of rank r is a train of its own."""
    return _own_train(_folded(shape), "r")


def _own_train(shape: Shape, joint: str = "") -> str:
    """Write a train for each matrix; with a bond ``joint`` between ``in`` and the other side, and a core for
    each end of that bond."""
    inputs, rest = _sides(shape, ("in",))
    outputs, slices = _sides(Shape({leg: shape[leg] for leg in rest}), ("head", "out"))
    middle = [_fresh(shape, joint)] * 2 if joint else []
    train = [*inputs, *middle, *outputs]
    letters = (_fresh(shape, letter) for letter in _letters())
    # The two cores with the joint bond have no other in common.
    apart = len(inputs) if joint else None
    bonds = ["" if k == apart else next(letters) for k in range(len(train) - 1)]
    return ", ".join(
        " ".join(filter(None, [*slices, leg, left, right]))
        for leg, left, right in zip(train, ["", *bonds], [*bonds, ""])
    )


def _folded(shape: Shape) -> Shape:
    """Split ``in`` and ``out`` into small factors if the shape has them whole."""
    sides = {mode: usual_factors(shape[mode]) for mode in ("in", "out") if mode in shape}
    split = {mode: factors for mode, factors in sides.items() if len(factors) > 1}
    return Shape({**shape, **split}).split


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
    bonds = [_fresh(shape, letter) for letter in islice(_letters(), max(0, len(modes) - 1))]
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
    sides, slices = _sides(shape, ("in", "out", "head"))
    factors = [*sides, " ".join(slices)]
    return ", ".join(f"{legs} {bond}" for legs in factors if legs)


def jd_line(shape: Shape) -> str:
    """Write the line of joint diagonalisation: two sides for each weight, and a core for each adapter."""
    p, q = _fresh(shape, "p"), _fresh(shape, "q")
    return _between_sides(shape, p, q)


def jd_diag_line(shape: Shape) -> str:
    """Write the line of joint diagonalisation with diagonal cores."""
    bond = _fresh(shape, "r")
    return _between_sides(shape, bond, bond)


def _between_sides(shape: Shape, left: str, right: str) -> str:
    """Write two sides for each ``layer``, ``matrix`` and ``expert``, and a core with all slices."""
    inputs, rest = _sides(shape, ("in",))
    outputs, slices = _sides(Shape({leg: shape[leg] for leg in rest}), ("head", "out"))
    weights, own = _sides(Shape({leg: shape[leg] for leg in slices}), ("layer", "matrix", "expert"))
    core = [*own, *weights, *dict.fromkeys((left, right))]
    terms = [*weights, *inputs, left], core, [*weights, *outputs, right]
    return ", ".join(" ".join(legs) for legs in terms)


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
    """List the legs other than those of in and out; each of their values is one matrix."""
    rest = _sides(shape, ("in", "out"))[1]
    return _ordered(Shape({leg: shape[leg] for leg in rest}), ("layer", "head", "matrix"))


def _sides(shape: Shape, modes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the legs into those of some modes, in their order, and the others."""
    legs = _ordered(shape, modes)
    own = [leg for leg in legs if mode_of(leg) in modes]
    return own, legs[len(own) :]


def _ordered(shape: Shape, order: Sequence[str]) -> list[str]:
    known = [leg for mode in order for leg in shape if mode_of(leg) == mode]
    return known + [leg for leg in shape if mode_of(leg) not in order]


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
