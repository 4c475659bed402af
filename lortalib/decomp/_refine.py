"""Splits the modes of several networks into common factors, so that all have the same open legs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ._legs import Legs
from ._tensor_network import NetworkView, TensorNetwork


class Refinement(NamedTuple):
    """How finely each mode is split: the sizes of its factors, one if it is whole.

    Splitting a leg further is a reshape of one axis, so tensors go both ways without loss.
    """

    factors: Mapping[str, tuple[int, ...]]

    @property
    def open_legs(self) -> tuple[str, ...]:
        """The open legs of all networks after the refinement."""
        return tuple(leg for mode in self.factors for leg in self._names(mode))

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the open legs."""
        return tuple(size for own in self.factors.values() for size in own)

    def _names(self, mode: str) -> list[str]:
        number = len(self.factors[mode])
        return [mode] if number == 1 else [f"{mode}.{k}" for k in range(1, number + 1)]

    def legs(self, legs: Legs, sizes: Mapping[str, int], modes: Sequence[str]) -> Legs:
        """Split the open legs of a line.

        Args:
            legs: the line.
            sizes: the size of every open leg.
            modes: the modes of the tensor.
        """
        runs: dict[str, list[str]] = {}
        for mode in modes:
            parts, own = list(zip(self._names(mode), self.factors[mode])), legs.open_legs([mode])
            for leg in own:
                runs[leg], product = [], 1
                while product < sizes[leg]:
                    name, size = parts.pop(0)
                    runs[leg].append(name)
                    product *= size
            runs[own[-1]] += [name for name, _ in parts]  # none, or the whole mode if its size is 1
        terms = [
            replace(
                term,
                legs=tuple(name for leg in term.legs for name in runs.get(leg, [leg])),
                factors=(),
                spans=(),
            )
            for term in legs.terms
        ]
        return Legs(tuple(terms)).with_factors(dict(zip(self.open_legs, self.shape)))

    def of(self, net: TensorNetwork) -> TensorNetwork:
        """Split the open legs of a network; its modes become the open legs."""
        split = dict(zip(self.open_legs, self.shape))
        if all(split.get(leg) == net.sizes[leg] for leg in net.open_legs):
            return net.split
        legs = self.legs(net.legs, net.sizes, net.modes)
        sizes = {**net.ranks, **split}
        tensors = [
            tensor.reshape([sizes[leg] for leg in term.legs])
            for term, tensor in zip(legs.terms, net.tensors)
        ]
        return NetworkView(
            legs, tensors, tuple(leg for mode in net.modes for leg in self._names(mode))
        )

    def undone(
        self, tensors: Sequence[Tensor], legs: Legs, sizes: Mapping[str, int]
    ) -> list[Tensor]:
        """Give tensors over a refined line the axes of the line that it was made of.

        Args:
            tensors: one for each term.
            legs: the line.
            sizes: the size of every leg.
        """
        return [
            tensor.reshape([sizes[leg] for leg in term.legs])
            for tensor, term in zip(tensors, legs.terms)
        ]


def common_factors(
    shape: Mapping[str, int], several: Iterable[tuple[Legs, Mapping[str, int]]]
) -> Refinement:
    """Find the coarsest factors of each mode into which all lines can be split further.

    Args:
        shape: the modes and their sizes.
        several: lines, each with the size of every leg.

    Raises:
        ValueError: a mode has no common factors, as 8 x 12 and 12 x 8 have none.
    """
    found: dict[str, tuple[int, ...]] = {}
    splits = list(several)
    for mode, size in shape.items():
        marks = {1, size}  # where the products of the first factors of any line end
        own: list[list[int]] = []
        for legs, sizes in splits:
            factors = [sizes[leg] for leg in legs.open_legs([mode]) if leg in sizes]
            own += [factors] * bool(factors)  # none, if the line does not have the mode
            marks |= {size // math.prod(factors[:k]) for k in range(len(factors))}
        ends = sorted(marks, reverse=True)
        if any(one % other for one, other in pairwise(ends)):
            texts = dict.fromkeys(" x ".join(map(str, factors)) for factors in own)
            raise ValueError(
                f"{mode!r} is split into {' and into '.join(texts)}, which have no common factors; split "
                "both alike, or fit the dense tensor of one: fit(net.dense(), line, modes=net.modes)"
            )
        found[mode] = tuple(one // other for one, other in pairwise(ends)) or (1,)
    return Refinement(found)


def on_common_factors(*nets: TensorNetwork) -> tuple[TensorNetwork, ...]:
    """Split the modes of networks of equal shape until all have the same open legs.

    Returns:
        The networks, over the open legs; the very same ones if no mode is split.

    Raises:
        ValueError: a mode has no common factors.
    """
    if all(net.split is net for net in nets):
        return nets
    refinement = common_factors(nets[0].shape, [(net.legs, net.sizes) for net in nets])
    return tuple(refinement.of(net) for net in nets)
