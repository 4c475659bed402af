"""Hashes parameters: every entry is a number of one short vector, up to its sign and a common factor.

An entry is ``theta[number] * sign / sqrt(count)``, where ``count`` is how many entries are that number. So
the map from the vector to the entries keeps norms (Uni-LoRA, arXiv 2506.00799, without its signs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from .._torch import is_tracing
from ._notation import LegsError, Term, vectors_of


class Part(NamedTuple):
    """Some parameters and the numbers of the vector that their entries are; no other entry is one of them.

    Attributes:
        terms: positions among the parameters of the hash.
        start, size: the numbers are those from ``start`` on, so many.
        entries: how many entries the parameters have.
    """

    terms: tuple[int, ...]
    start: int
    size: int
    entries: int


@dataclass(frozen=True)
class Hash:
    """The map from one vector to all parameters that are hashed from it.

    Attributes:
        vector: the name of the vector.
        size: how many numbers it has.
        positions: the positions in the line of the parameters; a tied term is none of its own.
        shapes: their shapes.
        key: the key of the random numbers, out of the seed and the place of the vector in the line.
        parts: the parameter marked ``(zero)`` has numbers of its own, so that it can start at zero while
            the others do not; all others are one part.
    """

    vector: str
    size: int
    positions: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    key: int
    parts: tuple[Part, ...]

    @property
    def entries(self) -> list[int]:
        """The number of entries of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw which number every entry is.

        Within a part every number is used equally often, up to one.

        Returns:
            The index, with a number in 0, ..., 2 size - 1 for every entry (from ``size`` on its sign is
            minus); and how many entries each number of the vector has.
        """
        total = sum(self.entries)
        # NumPy keeps the stream of a bit generator for ever, and lets the methods of a Generator
        # (permutation, integers) change; torch.randperm promises neither versions nor devices. So the
        # order is found here, by sorting the raw numbers.
        raw = np.random.Philox(key=self.key).random_raw(total)
        minus = (raw & np.uint64(1)).astype(np.int64)
        ends = np.cumsum([0, *self.entries])
        index = np.empty(total, np.int64)
        for part in self.parts:
            own = np.concatenate([np.arange(ends[k], ends[k + 1]) for k in part.terms])
            order = np.argsort(raw[own] >> np.uint64(1), kind="stable")
            index[own[order]] = part.start + np.arange(part.entries) % part.size
        counts = np.bincount(index, minlength=self.size)
        return torch.from_numpy(index + self.size * minus), torch.from_numpy(counts)

    def spread(self, theta: Tensor, index: Tensor, counts: Tensor) -> list[Tensor]:
        """Compute the parameters.

        Args:
            theta: the vector, (..., size).
            index, counts: what `draw` returned, on the device of the vector.

        Returns:
            A tensor for each parameter, with the leading axes of the vector.
        """
        if is_tracing() or not (torch.is_grad_enabled() and theta.requires_grad):
            entries = _entries(theta, index, counts)
        else:
            entries = _Spread.apply(theta, index, counts)
        lead = theta.shape[:-1]
        parts = entries.split(self.entries, -1)
        return [part.reshape(*lead, *shape) for part, shape in zip(parts, self.shapes)]

    def start(
        self, tensors: Sequence[Tensor], uses: Sequence[int], index: Tensor, counts: Tensor
    ) -> Tensor:
        """Make the vector that starts parameters as given ones do: as large, and zero where they are.

        Parameters of one part have one vector, so their entries get one root mean square. It is the
        geometric mean of those asked for, which keeps the product over all parameters.

        Args:
            tensors: one for each parameter, from a start.
            uses: how many terms of the line use each.
            index, counts: what `draw` returned.
        """
        sizes = [tensor.square().mean().sqrt() for tensor in tensors]
        units = [tensor / size if size else tensor for tensor, size in zip(tensors, sizes)]
        theta = _gather(torch.cat([unit.reshape(-1) for unit in units]), index, counts)
        for part in self.parts:
            own = theta[part.start : part.start + part.size]
            logs = [uses[k] * sizes[k].log() for k in part.terms if sizes[k]]
            if logs:
                if not own.any():  # signs can cancel
                    own.fill_(1)
                total = sum(uses[k] for k in part.terms if sizes[k])
                mean = (torch.stack(logs).sum() / total).exp()
                own *= mean * part.entries**0.5 / torch.linalg.vector_norm(own)
        return theta

    def repeats(self, position: int) -> float:
        """How many entries a number has in the part of the parameter at this position of the line."""
        place = self.positions.index(position)
        part = next(part for part in self.parts if place in part.terms)
        return part.entries / part.size


def _entries(theta: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    scaled = theta * _scale(counts, theta.dtype)
    return torch.cat([scaled, -scaled], -1).index_select(-1, index)


def _gather(entries: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """The transpose of `_entries`; also its inverse from the left, since the map keeps norms."""
    size = len(counts)
    both = entries.new_zeros(*entries.shape[:-1], 2 * size).index_add(-1, index, entries)
    return (both[..., :size] - both[..., size:]) * _scale(counts, entries.dtype)


def _scale(counts: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)  # a count can be too large for float16
    return counts.to(wide).rsqrt().to(dtype)


class _Spread(Function):
    """The entries of a vector as a node that saves no tensor.

    The map is linear, so its gradient needs no number of the vector. So the slices of one network serve
    several backwards, as they do where nothing is hashed.
    """

    @staticmethod
    def forward(ctx: Any, theta: Tensor, index: Tensor, counts: Tensor) -> Tensor:
        ctx.index, ctx.counts = index, counts
        return _entries(theta, index, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradient, ctx.index, ctx.counts), None, None


def make_hashes(
    terms: Sequence[Term], sizes: Mapping[str, int], line: str = ""
) -> tuple[Hash, ...]:
    """Make the hash of every vector of a line, in order of first appearance.

    Args:
        terms: the terms of the line.
        sizes: the size of every leg and every vector.
        line: the line, for error messages.

    Raises:
        LegsError: a vector with more numbers than entries, or with too few for a part of its own for
            the parameter marked ``(zero)``.
    """
    hashes = []
    for place, vector in enumerate(vectors_of(terms)):
        positions = tuple(k for k, term in enumerate(terms) if term.of == vector)
        shapes = tuple(tuple(sizes[leg] for leg in terms[k].legs) for k in positions)
        zero = [terms[k].zero for k in positions]
        groups = [[k for k, own in enumerate(zero) if own is side] for side in (False, True)]
        groups = [group for group in groups if group]
        entries = [sum(math.prod(shapes[k]) for k in group) for group in groups]
        size, total = sizes[vector], sum(entries)
        if not len(groups) <= size <= total:
            raise LegsError(
                f"the vector {vector!r} has {size} numbers for {total} entries; it can have "
                f"{len(groups)} to {total}, in",
                line,
            )
        # Numbers are divided as entries are; each part has at least one.
        last = max(1, min(size - 1, round(size * entries[-1] / total)))
        counts = [size] if len(groups) == 1 else [size - last, last]
        starts = [0, size - last]
        parts = tuple(
            Part(tuple(group), start, count, number)
            for group, start, count, number in zip(groups, starts, counts, entries)
        )
        key = terms[positions[0]].seed + (place << 64)
        hashes.append(Hash(vector, size, positions, shapes, key, parts))
    return tuple(hashes)


def start_vectors(
    hashes: Sequence[Hash], owners: Sequence[int], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Replace the starting values of hashed parameters by those of their vectors.

    Args:
        hashes: the hashes of the line.
        owners: for each term of the line the position of its parameter; see `Legs.owners`.
        tensors: the starting values, one for each term.

    Returns:
        One tensor for each term; a hashed one has its vector.
    """
    stored = list(tensors)
    for hash_ in hashes:
        own = [tensors[k] for k in hash_.positions]
        if own[0].is_meta:
            theta = own[0].new_empty(hash_.size)
        else:
            index, counts = (t.to(own[0].device) for t in hash_.draw())
            theta = hash_.start(own, [owners.count(k) for k in hash_.positions], index, counts)
        for k in hash_.positions:
            stored[k] = theta
    return stored
