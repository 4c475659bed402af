"""Starting values, said in terms of the update they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Union

import torch
from torch import Tensor

from ._legs import Legs

Randn = Callable[[Sequence[int]], Tensor]


#: A start: from the line, the size of every leg, the modes, and a source of standard normal numbers
#: (called with a shape) to one tensor for each parameter.
Start = Callable[[Legs, Mapping[str, int], Sequence[str], Randn], "list[Tensor]"]


StartLike = Union[str, Start]


def normal(
    legs: Legs, sizes: Mapping[str, int], modes: Sequence[str], randn: Randn
) -> list[Tensor]:
    """A random network: as `invariant`, but the parameter that would be zero has unit entries.

    Every entry of the tensor then has a variance near 1/n_in, whatever the rank and the format.
    """
    zero = legs.zero
    own = [k for k, term in enumerate(legs.terms) if not term.tied]
    rest = [k for k in own if k != zero and "in" not in legs.terms[k].legs]
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
        size = sizes["in"] ** -0.5 if "in" in term.legs else 1.0
        if k in rest or ("in" in term.legs and not rest):
            size *= spread
        # Used n times, it stands n times in the product of variances.
        tensor = tensor * size ** (1 / legs.owners.count(k))
        tensors.append(tensor.permute([order.index(leg) for leg in term.legs]))
    return tensors


def invariant(
    legs: Legs, sizes: Mapping[str, int], modes: Sequence[str], randn: Randn
) -> list[Tensor]:
    """Zero update, and a first step whose effect depends neither on the rank nor on the modes.

    One parameter (see `Legs.zero`) is zero. Let the entries of the others be independent, of
    mean zero and variance v_k. When every entry of the zero parameter moves by +-h, the first step
    of Adam, every output of a layer with inputs of unit variance moves, in root mean square, by

        h * sqrt(n_in * prod_k v_k * prod_bonds size)

    so the start sets ``prod_k v_k = 1 / (n_in * prod_bonds size)``: a step of size h moves the
    output by h. (The many tokens and projections that share the tensor pull in unlike directions,
    so the terms of the sum over the bonds add in squares.) The norm of the first gradient, and with
    it the first decrease of the loss under plain gradient descent, is proportional to the same
    quantity where the zero parameter carries ``out``, and does not depend on the rank either.

    The parameter that carries ``in`` keeps unit gain (variance 1/n_in, as in LoRA); the rest have
    entries of one common size. One that is tied stands in the product once for each of its terms. Within
    these variances a parameter with several bonds is semi-orthogonal in each slice of its modes, and short
    mode factors are signs.
    """
    tensors = normal(legs, sizes, modes, randn)
    tensors[legs.zero].zero_()
    return tensors


def lorta(legs: Legs, sizes: Mapping[str, int], modes: Sequence[str], randn: Randn) -> list[Tensor]:
    """The published start of LoRTA (arXiv 2410.04060, official code with ``init_scale=0``).

    Kaiming uniform with the rank as fan-in: U(+-1/sqrt(r)) for the parameter that carries ``in``,
    U(+-sqrt(6/r)) for the others, zero for one. r is the product of a parameter's bonds. Meant
    for an update scaled by alpha/r; its first step falls as r^-2.5.
    """
    zero = legs.zero
    bonds = set(legs.bonds(modes))
    tensors: list[Tensor] = []
    for k, term in enumerate(legs.terms):
        if term.tied:
            tensors.append(tensors[-1])
            continue
        fan = math.prod(sizes[leg] for leg in term.legs if leg in bonds)
        bound = 0.0 if k == zero else (1 / fan if "in" in term.legs else 6 / fan) ** 0.5
        # The distribution function of a standard normal number is uniform on (0, 1).
        uniform = torch.special.ndtr(randn([sizes[leg] for leg in term.legs]))
        tensors.append(bound * (2 * uniform - 1))
    return tensors


STARTS: dict[str, Start] = {"invariant": invariant, "lorta": lorta, "normal": normal}


def get_start(init: StartLike) -> Start:
    """A start by name, or the callable itself.

    Raises:
        ValueError: a name that no start has.
    """
    if callable(init):
        return init
    if init not in STARTS:
        raise ValueError(
            f"unknown init {init!r}; choose {', '.join(map(repr, STARTS))} or a callable"
        )
    return STARTS[init]


def _orthogonal_slices(tensor: Tensor, n_modes: int) -> Tensor:
    """Unit-variance entries, each slice over the leading axes an (a, b...) matrix with orthogonal
    rows or columns."""
    rows = tensor.shape[n_modes]
    matrix = tensor.reshape(*tensor.shape[:n_modes], rows, -1)
    columns = matrix.shape[-1]
    tall = matrix if rows >= columns else matrix.mT
    q = torch.linalg.qr(tall).Q
    q = q if rows >= columns else q.mT
    scaled: Tensor = q * max(rows, columns) ** 0.5
    return scaled.reshape(tensor.shape)
