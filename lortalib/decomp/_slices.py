"""Takes slices of a network along its modes, whole or split, and multiplies it along a mode."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import is_tracing
from ._einsum import contract
from ._factors import product
from ._legs import Legs
from ._notation import Term, check_bounds


class Slices(NamedTuple):
    """The legs and tensors of a network before or after slicing.

    Attributes:
        legs: the line.
        tensors: one for each term.
        sizes: the size of every leg.
    """

    legs: Legs
    tensors: Sequence[Tensor]
    sizes: Mapping[str, int]

    def at(self, index: Mapping[str, int]) -> tuple[Legs, list[Tensor]]:
        """Fix modes, each at one position; of a split mode, every factor is fixed at its digit."""
        fixed: dict[str, int] = {}
        for mode, position in index.items():
            own = self.legs.open_legs([mode])
            if position < 0:
                position += product([self.sizes[leg] for leg in own])
            for leg in reversed(own):
                position, fixed[leg] = divmod(position, self.sizes[leg])
        tensors = [
            tensor[tuple(fixed.get(leg, slice(None)) for leg in term.legs)]
            for term, tensor in zip(self.legs.terms, self.tensors)
        ]
        terms = self._untied(fixed)
        return Legs(tuple(term.without(fixed) for term in terms)), tensors

    def taken(
        self, mode: str, positions: Tensor, open_legs: Collection[str]
    ) -> tuple[Legs, list[Tensor]]:
        """Keep some positions of a mode. A split mode is whole afterwards, on every parameter that had one of
        its factors: an entry is the product of theirs at the digits of the position. The line can have ``in``
        on one parameter only, so the product of those is formed.

        Args:
            mode: the mode.
            positions: integers of shape (number,).
            open_legs: the legs that are not summed over.
        """
        own = self.legs.open_legs([mode])
        _check_positions(mode, math.prod([self.sizes[leg] for leg in own]), positions)
        if own == (mode,):
            found = [
                tensor.index_select(term.legs.index(mode), positions)
                if mode in term.legs
                else tensor
                for term, tensor in zip(self.legs.terms, self.tensors)
            ]
            untied = self._untied(own)
            return (self.legs if untied is self.legs.terms else Legs(untied)), found
        digits: dict[str, Tensor] = {}
        rest = positions
        for leg in reversed(own[1:]):
            digits[leg], rest = rest % self.sizes[leg], rest // self.sizes[leg]
        digits[own[0]] = rest
        terms: list[Term] = []
        tensors: list[Tensor] = []
        for term, tensor in zip(self._untied(own), self.tensors):
            here = [leg for leg in own if leg in term.legs]
            if here:
                tensor = tensor.movedim(
                    [term.legs.index(leg) for leg in here], list(range(len(here)))
                )
                at = digits[here[0]]
                for leg in here[1:]:
                    at = at * self.sizes[leg] + digits[leg]
                tensor = tensor.flatten(0, len(here) - 1).index_select(0, at)
                left = term.without(here)
                term = replace(left, legs=(mode, *left.legs))
            terms.append(term)
            tensors.append(tensor)
        if mode == "in":
            terms, tensors = _on_one(mode, terms, tensors, open_legs)
        return Legs(tuple(terms)), tensors

    def times(self, mode: str, matrix: Tensor) -> tuple[Legs, list[Tensor]]:
        """Multiply along a mode by a matrix (new size, size) or a vector (size), as one more parameter. Its
        factors become bonds, and the new mode is whole."""
        own = self.legs.open_legs([mode])
        _check_matrix(mode, matrix, product([self.sizes[leg] for leg in own]), self.tensors[0])
        bonds: dict[str, str] = {}
        for leg in own:
            bond = leg.replace(".", "_")
            while bond in self.sizes or bond in bonds.values():
                bond += "_"
            bonds[leg] = bond
        terms = [
            replace(term.without(own), legs=tuple(bonds.get(leg, leg) for leg in term.legs))
            for term in self._untied(own)
        ]
        new = (mode,) if matrix.ndim == 2 else ()
        legs = Legs((*terms, Term((*new, *bonds.values()), frozen=True)))
        check_bounds(legs.terms)
        shape = [*matrix.shape[:-1], *(self.sizes[leg] for leg in own)]
        return legs, [*self.tensors, matrix.reshape(shape)]

    def _untied(self, changed: Collection[str]) -> tuple[Term, ...]:
        """Return the terms, without the mark of tied ones whose tensors differ once some legs are changed."""
        if not any(term.tied for term in self.legs.terms):
            return self.legs.terms
        own = self.legs.owners
        uneven = {
            own[k]
            for k, term in enumerate(self.legs.terms)
            if term.tied and not {*changed}.isdisjoint((*term.legs, *self.legs.terms[own[k]].legs))
        }
        return tuple(
            replace(term, tied=False, spans=()) if term.tied and own[k] in uneven else term
            for k, term in enumerate(self.legs.terms)
        )


def _on_one(
    mode: str, terms: Sequence[Term], tensors: Sequence[Tensor], open_legs: Collection[str]
) -> tuple[list[Term], list[Tensor]]:
    """Contract the parameters that carry a mode into the first of them."""
    here = [k for k, term in enumerate(terms) if mode in term.legs]
    if len(here) == 1:
        return list(terms), list(tensors)
    others = [k for k in range(len(terms)) if k not in here]
    needed = {mode, *open_legs, *(leg for k in others for leg in terms[k].legs)}
    own = tuple(terms[k].legs for k in here)
    legs = tuple(dict.fromkeys(leg for each in own for leg in each if leg in needed))
    pairs = [pair for k in here for pair in zip(terms[k].legs, tensors[k].shape)]
    one = contract(own, tuple(tensors[k] for k in here), legs, dict(pairs))
    frozen = all(terms[k].frozen for k in here)
    line = [(k, terms[k], tensors[k]) for k in others]
    line = sorted([*line, (here[0], Term(legs, frozen=frozen), one)], key=lambda each: each[0])
    return [term for _, term, _ in line], [tensor for _, _, tensor in line]


def _check_matrix(mode: str, matrix: object, size: int, like: Tensor) -> None:
    wanted = f"a matrix of shape (new size, {size}) or a vector"
    found = type(matrix).__name__
    if isinstance(matrix, Tensor):
        if matrix.ndim not in (1, 2) or matrix.shape[-1] != size:
            raise ValueError(
                f"to multiply along {mode!r} of size {size}, {wanted} is needed; found {tuple(matrix.shape)}"
            )
        if (matrix.dtype, matrix.device) == (like.dtype, like.device):
            return
        found = f"one of {matrix.dtype} on {matrix.device}"
    raise TypeError(
        f"to multiply along {mode!r}, {wanted} is needed, as a tensor of {like.dtype} on {like.device} "
        f"like the parameters; found {found}. Try torch.as_tensor(matrix).to(net.tensors[0])"
    )


def _check_positions(mode: str, size: int, positions: object) -> None:
    if isinstance(positions, Tensor) and positions.dtype in (torch.int32, torch.int64):
        if positions.ndim == 1:
            _check_range(mode, size, positions)
            return
        found = f"shape {tuple(positions.shape)}"
    else:
        found = str(getattr(positions, "dtype", type(positions).__name__))
    raise TypeError(
        f"positions of {mode!r} have to be a vector of integers, a tensor of int64 or int32; found {found}. "
        "Of a mask take mask.nonzero()[:, 0]"
    )


def _check_range(mode: str, size: int, positions: Tensor) -> None:
    """Refuse positions outside a mode. On a GPU, which refuses them itself, a look at the numbers would wait;
    while torch traces there are no numbers."""
    if positions.device.type != "cpu" or is_tracing() or not positions.numel():
        return
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= size:
        raise IndexError(
            f"positions of {mode!r} must be from 0 to {size - 1}; found {low if low < 0 else high}"
        )
