"""Suggests ranks: by the errors of fits, or by a budget of parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._build import Rank
from ._canonical import joins_all
from ._diagnose import core_consistency, knee
from ._fit import Fit, fit
from ._formats import formats, get_format
from ._legs import Legs
from ._modes import Shape, ShapeLike
from ._notation import LegsError
from ._rank_table import RankRow, RankTable
from ._target import TargetLike, read_target
from ._tensor_network import TensorNetwork
from ._tensorly import Modes


def suggest_rank(
    target: TargetLike,
    line: str,
    ranks: Sequence[Rank] = (1, 2, 3, 4, 6, 8),
    *,
    modes: Modes | None = None,
    held_out: float = 0.1,
    generator: torch.Generator | None = None,
    **options: Any,
) -> RankTable:
    """Fit rising ranks and suggest the one at the bend of the error over the number of parameters.

    Args:
        target: as for `fit`.
        line: the name of a format, or a line of legs.
        ranks: the ranks to try, rising; at least two.
        modes: names of the axes of a dense target.
        held_out: the fraction of entries that a second fit of a dense target does not see; 0 for none.
            An error there that rises means that the rank fits noise.
        generator: the source of the held-out entries; by default one with a fixed seed.
        options: passed to `fit`; no mask or weights.

    Returns:
        `RankTable`, a row for each of the ranks with the error, the held-out error, and for CP the core
        consistency. ``table.suggested`` is the bend, or the lowest held-out error if that comes first.

    Raises:
        ValueError: fewer than two ranks, a fraction outside 0 to 0.9; as `fit`.

    Example:
        >>> from lortalib.decomp import tucker
        >>> shape = {"layer": 4, "in": 8, "out": 8}
        >>> truth = tucker(shape, 2, init="normal", dtype=torch.float64)
        >>> table = suggest_rank(truth, "tucker", (1, 2, 3))
        >>> table.suggested.rank
        2
    """
    if len(ranks) < 2:
        raise ValueError(f"give at least two ranks to compare; found {list(ranks)}")
    if not 0 <= held_out <= 0.9:
        raise ValueError(f"held_out is a fraction from 0 to 0.9; found {held_out!r}")
    if "mask" in options or "weights" in options:
        raise ValueError(
            "suggest_rank holds entries out by a mask of its own; leave out mask, weights"
        )
    dense = _dense(target, modes) if held_out else None
    mask = None if dense is None else _mask(dense, held_out, generator)
    rows = []
    for rank in ranks:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ranks larger than the modes can fill")
            found = fit(target, line, rank, modes=modes, **options)
            seen = None
            if dense is not None:
                seen = _unseen_error(dense, mask, line, rank, modes, options)
        rows.append(_row(found, target, line, rank, seen))
    return RankTable(tuple(rows), _best(rows))


def _dense(target: TargetLike, modes: Modes | None) -> Tensor | None:
    return read_target(target, modes, None, None, ridge=0.0).dense


def _mask(dense: Tensor, held_out: float, generator: torch.Generator | None) -> Tensor:
    """Draw the entries that are seen; every slice keeps its first entry along the diagonal."""
    source = generator or torch.Generator().manual_seed(0)
    seen = torch.rand(dense.shape, generator=source, device=source.device) >= held_out
    longest = torch.arange(max(dense.shape))
    seen[tuple(longest % size for size in dense.shape)] = True
    return seen.to(dense.device)


def _unseen_error(
    dense: Tensor,
    mask: Tensor | None,
    line: str,
    rank: Rank,
    modes: Modes | None,
    options: Mapping[str, Any],
) -> float:
    """Fit the seen entries; measure the relative error over the others."""
    assert mask is not None
    found = fit(dense, line, rank, modes=modes, mask=mask, **options).network
    gap = (found.dense().detach().double() - dense)[~mask]
    size = dense[~mask].norm().item()
    return float(gap.norm().item() / (size or 1.0))


def _row(found: Fit, target: TargetLike, line: str, rank: Rank, held_out: float | None) -> RankRow:
    consistency = None
    net = found.network
    is_cp = joins_all(net) is not None and all(len(term.legs) == 2 for term in net.legs.terms)
    if is_cp and isinstance(target, (Tensor, TensorNetwork)):
        consistency = core_consistency(net, target)
    return RankRow(line, rank, net.count(), found.error, held_out, consistency)


def _best(rows: Sequence[RankRow]) -> int:
    bend = knee([float(row.parameters) for row in rows], [row.error or 0.0 for row in rows])
    unseen = [row.held_out for row in rows if row.held_out is not None]
    return min(bend, unseen.index(min(unseen))) if unseen else bend


def budget(shape: ShapeLike, parameters: int) -> RankTable:
    """List, for each registered format, the ranks whose trainable parameters come closest from below.

    All bonds first get the largest equal rank; then single bonds are raised, in the order of the line.

    Args:
        shape: five sizes, or a mapping from mode names to sizes.
        parameters: the largest number of trainable parameters.

    Returns:
        `RankTable`, the closest format first. Formats that do not fit the modes are left out, as are those
        that take more parameters at rank 1, and hashed ones, which take any number.

    Raises:
        ValueError: a number of parameters below 1.

    Example:
        >>> table = budget((12, 12, 4, 768, 64), 10_000)
        >>> [(row.format, row.rank, row.parameters) for row in table if row.format in ("cp", "vera")]
        [('vera', {'r': 208}, 9984), ('cp', {'r': 11}, 9460)]
    """
    if parameters < 1:
        raise ValueError(f"a budget is at least 1 parameter; found {parameters}")
    sizes = shape if isinstance(shape, Shape) else Shape(shape)
    rows = []
    for name in formats:
        try:
            legs = get_format(name).legs(sizes)
            legs.check(sizes.modes)
            if legs.vectors:
                continue
            split = legs.split(sizes)
            legs.check_tied_sizes({**split, **dict.fromkeys(legs.bonds(sizes.modes), 1)})
        except LegsError:
            continue
        ranks = _ranks_within(legs, split, parameters)
        if ranks is not None:
            rows.append(RankRow(name, ranks, _count(legs, split, ranks)))
    return RankTable(tuple(sorted(rows, key=lambda row: -row.parameters)))


def _ranks_within(legs: Legs, shape: Shape, parameters: int) -> dict[str, int] | None:
    bonds = legs.bonds(shape.modes)

    def limited(ranks: Mapping[str, int]) -> dict[str, int]:
        return legs.limits({**shape, **ranks}, shape.modes)

    def fits(ranks: Mapping[str, int]) -> bool:
        return _count(legs, shape, limited(ranks)) <= parameters

    if not fits(dict.fromkeys(bonds, 1)):
        return None
    equal = _largest(lambda size: fits(dict.fromkeys(bonds, size)), parameters)
    ranks = limited(dict.fromkeys(bonds, equal))
    if not any(term.tied for term in legs.terms):  # bonds of a tied parameter have equal sizes
        before = None
        while ranks != before:  # a bond that grew can let one before it grow
            before = ranks
            for bond in bonds:
                most = _largest(partial(_fits_with, fits, ranks, bond), parameters)
                ranks = limited({**ranks, bond: max(most, ranks[bond])})
    return ranks


def _fits_with(
    fits: Callable[[Mapping[str, int]], bool], ranks: Mapping[str, int], bond: str, size: int
) -> bool:
    return fits({**ranks, bond: size})


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Find the largest integer from 1 to ``most`` that fits, if all smaller ones do."""
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _count(legs: Legs, shape: Shape, ranks: Mapping[str, int]) -> int:
    """Count the trainable parameters of a line."""
    sizes = {**shape, **ranks}
    own = (term for term in legs.terms if not (term.frozen or term.tied))
    return sum(math.prod(sizes[leg] for leg in term.legs) for term in own)
