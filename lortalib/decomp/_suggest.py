"""Suggests ranks: by the errors of fits, or by a budget of parameters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._kinds import GENERATOR, LIST, takes
from .._numbers import check_number
from ._canonical import joins_all
from ._diagnose import core_consistency, knee
from ._fit import Fit, fit
from ._rank_table import RankRow, RankTable
from ._ranks import Rank
from ._target import TargetLike, read_target
from ._tensor_network import TensorNetwork
from ._tensorly import Modes


@takes(ranks=LIST, generator=GENERATOR)
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
    check_number("held_out", held_out, least=0)
    if held_out > 0.9:
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
    """Find the suggested row; rows need not rise."""
    order = sorted(range(len(rows)), key=lambda k: rows[k].parameters)
    rising = [rows[k] for k in order]
    # Two points have no bend: the smaller error counts, and of equal ones the smaller number.
    errors = [row.error or 0.0 for row in rising]
    bend = (
        errors.index(min(errors))
        if len(rising) < 3
        else knee([float(row.parameters) for row in rising], errors)
    )
    unseen = [row.held_out for row in rising if row.held_out is not None]
    return order[min(bend, unseen.index(min(unseen))) if unseen else bend]
