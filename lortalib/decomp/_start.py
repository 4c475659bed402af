"""Defines the starting values of a network by the update that they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Union

import torch
from torch import Tensor, nn

from ._hashed import make_hashes
from ._legs import Legs

Randn = Callable[[Sequence[int]], Tensor]


#: A start is a function. It takes the line, the size of every leg, the modes (of which a split one is there
#: as its factors), and a source of standard normal numbers (called with a shape), and returns one tensor for
#: each parameter.
Start = Callable[[Legs, Mapping[str, int], Sequence[str], Randn], "list[Tensor]"]


StartLike = Union[str, Start]


def normal(
    legs: Legs, sizes: Mapping[str, int], modes: Sequence[str], randn: Randn
) -> list[Tensor]:
    """Make a random start: `invariant`, but the parameter that would be zero has entries of variance 1.

    Every entry of the full tensor then has a variance near 1/n_in, for any rank and format.
    """
    zero = legs.zero if legs.zeroable else None
    own = [k for k, term in enumerate(legs.terms) if not term.tied]
    inputs = legs.open_legs(["in"])
    rest = [k for k in own if k != zero and not {*inputs} & {*legs.terms[k].legs}]
    bonds = set(legs.bonds(modes))
    spread = math.prod(sizes[bond] for bond in bonds) ** (-0.5 / max(1, len(rest)))
    tensors: list[Tensor] = []
    for k, term in enumerate(legs.terms):
        if term.tied:
            tensors.append(tensors[-1])
            continue
        axes = [leg for leg in term.legs if leg in bonds]
        order = [leg for leg in term.legs if leg not in bonds] + axes
        tensor = randn([sizes[leg] for leg in order])
        if k != zero and len(axes) > 1:
            tensor = _orthogonal_slices(tensor, len(order) - len(axes))
        elif k in rest:
            tensor = tensor.sign()
        has_input = any(leg in term.legs for leg in inputs)
        size = math.prod(sizes[leg] for leg in inputs if leg in term.legs) ** -0.5
        if k in rest or (has_input and not rest):
            size *= spread
        # A parameter that is used n times stands n times in the product of variances.
        tensor = tensor * size ** (1 / legs.owners.count(k))
        tensors.append(tensor.permute([order.index(leg) for leg in term.legs]))
    return tensors


def invariant(
    legs: Legs, sizes: Mapping[str, int], modes: Sequence[str], randn: Randn
) -> list[Tensor]:
    """Make a start with a zero update and a first step whose effect depends on neither rank nor modes.

    One parameter (see `Legs.zero`) is zero. Let the entries of parameter k be independent, with mean
    zero and variance v_k. The first step of Adam moves every entry of the zero parameter by +-h. If a
    layer's inputs have unit variance, its outputs then move, in root mean square, by

        h * sqrt(n_in * prod_k v_k * prod_bonds size)

    so the start sets ``prod_k v_k = 1 / (n_in * prod_bonds size)``: a step of size h moves the
    output by h. (Many tokens and projections share the tensor and pull in different directions, so the
    squares of the terms of the sum over the bonds add up.) If the zero parameter carries ``out``, the
    norm of the first gradient is proportional to the same quantity, so it does not depend on the rank;
    nor does the first decrease of the loss under plain gradient descent.

    The parameter that carries ``in`` has variance 1/n_in, as in LoRA (if ``in`` is split, those of its
    factors have it together); all others have one common variance. A tied parameter counts once for each
    of its terms. With these variances, a parameter with several bonds is semi-orthogonal in each slice of
    its modes, and short mode factors are signs.

    Where the zero parameter is hashed, its entries are the numbers that move by +-h, over the square root
    of how many entries have one number; all other parameters together are larger by that root.
    """
    zero = legs.zero
    tensors = normal(legs, sizes, modes, randn)
    tensors[zero].zero_()
    if legs.terms[zero].of:
        hashes = make_hashes(legs.terms, sizes, str(legs))
        repeats = next(one.repeats(zero) for one in hashes if zero in one.positions)
        factor = repeats ** (0.5 / max(1, len(tensors) - 1))
        for k in set(legs.owners) - {zero}:
            tensors[k] *= factor  # a tied term has the very tensor of its owner
    return tensors


def lorta(legs: Legs, sizes: Mapping[str, int], modes: Sequence[str], randn: Randn) -> list[Tensor]:
    """Make the published start of LoRTA (arXiv 2410.04060, official code with ``init_scale=0``).

    It is Kaiming uniform with the rank as fan-in: U(+-1/sqrt(r)) for the parameter that carries
    ``in``, U(+-sqrt(6/r)) for the others, and zero for one. r is the product of a parameter's bonds.
    The update is meant to be scaled by alpha/r; the first step falls as r^-2.5.
    """
    zero = legs.zero
    bonds, inputs = set(legs.bonds(modes)), legs.open_legs(["in"])
    tensors: list[Tensor] = []
    for k, term in enumerate(legs.terms):
        if term.tied:
            tensors.append(tensors[-1])
            continue
        fan = math.prod(sizes[leg] for leg in term.legs if leg in bonds)
        has_input = any(leg in term.legs for leg in inputs)
        bound = 0.0 if k == zero else (1 / fan if has_input else 6 / fan) ** 0.5
        # The distribution function of a standard normal number is uniform on (0, 1).
        uniform = torch.special.ndtr(randn([sizes[leg] for leg in term.legs]))
        tensors.append(bound * (2 * uniform - 1))
    return tensors


STARTS: dict[str, Start] = {"invariant": invariant, "lorta": lorta, "normal": normal}


def get_start(init: StartLike) -> Start:
    """Find a start by its name; a callable is returned as it is.

    Args:
        init: ``"invariant"``, ``"lorta"``, ``"normal"``, or a callable as `Start` describes it.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> from lortalib.decomp import network
        >>> start = get_start("normal")
        >>> bool(network("in r, out r", {"in": 4, "out": 3}, 2, init=start).dense().any())
        True
    """
    if callable(init) and not isinstance(init, nn.Module):  # every module looks callable
        return init
    if not isinstance(init, str) or init not in STARTS:
        raise ValueError(
            f"unknown init {init!r}; choose {', '.join(map(repr, STARTS))} or a callable"
        )
    return STARTS[init]


def _orthogonal_slices(tensor: Tensor, n_modes: int) -> Tensor:
    """Orthogonalise the rows or columns of each slice over the leading ``n_modes`` axes; entries have
    unit variance."""
    rows = tensor.shape[n_modes]
    matrix = tensor.reshape(*tensor.shape[:n_modes], rows, -1)
    columns = matrix.shape[-1]
    tall = matrix if rows >= columns else matrix.mT
    q = torch.linalg.qr(tall).Q
    q = q if rows >= columns else q.mT
    scaled: Tensor = q * max(rows, columns) ** 0.5
    return scaled.reshape(tensor.shape)
