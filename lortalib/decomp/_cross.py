"""Approximates a tensor that is only evaluated, entry by entry, by a train (cross approximation)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._kinds import FUNCTION, GENERATOR, takes
from .._numbers import check_number
from ._legs import Legs
from ._lines import train_line
from ._maxvol import maxvol
from ._modes import Shape, ShapeLike
from ._network import Network

#: Entries that are drawn to measure the error.
_SAMPLES = 1000


@dataclass(frozen=True)
class Cross:
    """A train through entries of a tensor, and how that went.

    Attributes:
        network: the train.
        error: ``|tensor - train| / |tensor|`` over entries drawn at random, which the train was not made
            from; an estimate of the whole error, blind to what few entries hold.
        errors: this error after every sweep.
        evaluations: the number of entries that the function was asked for.
        converged: whether the last sweep met the tolerance.

    Example:
        >>> import torch
        >>> from lortalib.decomp import cross
        >>> found = cross(lambda at: 1.0 / (1.0 + at.sum(1)), {"a": 8, "b": 8, "c": 8}, rank=4)
        >>> found.error < 1e-2, list(found.network.ranks.values())
        (True, [4, 4])
    """

    network: Network
    error: float
    errors: tuple[float, ...]
    evaluations: int
    converged: bool


@takes(function=FUNCTION, generator=GENERATOR)
def cross(
    function: Callable[[Tensor], Tensor],
    shape: ShapeLike,
    rank: int,
    *,
    tolerance: float = 1e-8,
    sweeps: int = 10,
    generator: torch.Generator | None = None,
) -> Cross:
    """Approximate a tensor by a train from few of its entries (TT-cross, Oseledets and Tyrtyshnikov 2010).

    A sweep asks for fibres through the tensor, at most ``2 * rank**2 * size`` entries for a mode, and
    chooses the positions of the next ones by `maxvol`. The train agrees with the tensor on its last
    crosses; if the tensor is a train of these ranks, it agrees everywhere. `round` makes its ranks as small
    as an error allows, and `convert` writes it in another line.

    Args:
        function: returns the entries at positions (n, number of modes), integers on the CPU, in one call. It
            is called with up to ``rank**2`` times the largest size positions at once, and once with 1,000
            random ones.
        shape: two or more modes, as for `network`; their order is that of the train.
        rank: the largest size of a bond.
        tolerance: stop when the relative error over random entries is at most this; entries in float32
            allow about 1e-6.
        sweeps: the largest number of sweeps, each forth and back.
        generator: the source of the first positions and of the random entries; by default one with a
            fixed seed.

    Returns:
        `Cross`. The parameters have the dtype and the device of what the function returns; they are
        computed in float64.

    Raises:
        ValueError: fewer than two modes; a rank, tolerance or number of sweeps that is not positive; the
            function returns other than n finite, real numbers.
        TypeError: a rank or number of sweeps that is no integer, a tolerance that is no number.
        LegsError: more than 26 modes.

    Example:
        >>> def entry(at):
        ...     return 1 / (1 + at.sum(1).double())
        >>> found = cross(entry, {"a": 50, "b": 60, "c": 70}, rank=12)
        >>> found.error < 1e-8, found.evaluations < 50 * 60 * 70 / 2
        (True, True)
    """
    sizes = shape if isinstance(shape, Shape) else Shape(shape)
    if len(sizes) < 2:
        raise ValueError(f"a train joins at least two modes; found {', '.join(sizes)}")
    check_number("rank", rank, least=1, is_integer=True)
    check_number("sweeps", sweeps, least=1, is_integer=True)
    check_number("tolerance", tolerance, least=0, above=True)
    legs = Legs.parse(train_line(list(sizes), sizes))
    source = generator or torch.Generator().manual_seed(0)
    tensor = _Entries(function, list(sizes.values()))
    samples = tensor.draw(_SAMPLES, source)
    known = tensor(samples)
    crosses = _Crosses(tensor, rank, source)
    errors: list[float] = []
    best, cores = math.inf, list[Tensor]()
    while len(errors) < sweeps and best > tolerance:
        for found in (crosses.forth(), crosses.back()):
            error = _relative(_values(found, samples) - known, known)
            if error < best or not cores:
                best, cores = error, found
        errors.append(error)
    parameters = [
        cores[0][0],
        *(core.transpose(0, 1) for core in cores[1:-1]),
        cores[-1][:, :, 0].mT,
    ]
    own = [p.to(tensor.device, tensor.dtype).contiguous() for p in parameters]
    network = Network(legs, own, tuple(sizes))
    return Cross(network, best, tuple(errors), tensor.count, best <= tolerance)


class _Entries:
    """The function, with checks of what it returns and a count of the entries that were asked for."""

    def __init__(self, function: Callable[[Tensor], Tensor], sizes: list[int]) -> None:
        self._function = function
        self.sizes = sizes
        self.count = 0
        self.dtype, self.device = torch.float64, torch.device("cpu")

    def __call__(self, positions: Tensor) -> Tensor:
        """Return the entries at positions (n, modes) in float64."""
        found = self._function(positions)
        if not isinstance(found, Tensor) or found.shape != positions.shape[:1]:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the function has to return a tensor of {len(positions)} entries for positions "
                f"{tuple(positions.shape)}; it returned {what}"
            )
        if found.is_complex() or not bool(found.isfinite().all()):
            bad = positions[0] if found.is_complex() else positions[~found.isfinite()][0]
            raise ValueError(
                "the function has to return finite, real numbers; it does not at the position "
                f"{tuple(bad.tolist())}"
            )
        self.count += len(found)
        self.dtype = found.dtype if found.is_floating_point() else torch.get_default_dtype()
        self.device = found.device
        return found.detach().cpu().double()

    def draw(self, count: int, source: torch.Generator) -> Tensor:
        """Draw positions (count, modes), each mode by itself."""
        columns = [torch.randint(size, (count,), generator=source) for size in self.sizes]
        return torch.stack(columns, 1)


class _Crosses:
    """The positions that the fibres of the next sweep go through.

    ``left[k]`` has positions (r, k) on the modes before bond k, and ``right[k]`` positions (r, modes - k) on
    those behind it. Each set extends one of the set before, so that the train agrees with the tensor there.
    """

    def __init__(self, tensor: _Entries, rank: int, source: torch.Generator) -> None:
        sizes = tensor.sizes
        self._tensor = tensor
        order = len(sizes)
        ranks = [
            min(rank, math.prod(sizes[:k]), math.prod(sizes[k:])) if 0 < k < order else 1
            for k in range(order + 1)
        ]
        none = torch.empty(1, 0, dtype=torch.int64)
        self._left = [none] * (order + 1)
        self._right = [none] * (order + 1)
        for k in range(1, order):
            self._right[k] = _distinct(sizes[k:], ranks[k], source)

    def forth(self) -> list[Tensor]:
        """Choose the left positions of every bond anew; return the cores (r, size, r)."""
        cores = []
        order = len(self._tensor.sizes)
        for k in range(order):
            fibres, positions = self._fibres(k)
            if k == order - 1:
                cores.append(fibres)
                break
            matrix = fibres.flatten(0, 1)
            rows, coefficients = maxvol(torch.linalg.qr(matrix).Q)
            cores.append(coefficients.view(*fibres.shape[:2], -1))
            self._left[k + 1] = positions.flatten(0, 1)[rows, 0, : k + 1]
        return cores

    def back(self) -> list[Tensor]:
        """Choose the right positions of every bond anew; return the cores (r, size, r)."""
        cores = []
        for k in reversed(range(len(self._tensor.sizes))):
            fibres, positions = self._fibres(k)
            if k == 0:
                cores.append(fibres)
                break
            matrix = fibres.flatten(1, 2)
            rows, coefficients = maxvol(torch.linalg.qr(matrix.mT).Q)
            cores.append(coefficients.mT.reshape(-1, *fibres.shape[1:]))
            self._right[k] = positions[0].flatten(0, 1)[rows, k:]
        return cores[::-1]

    def _fibres(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the fibres along mode k through all crosses: entries (r, size, r), and their positions."""
        left, right = self._left[k], self._right[k + 1]
        size = self._tensor.sizes[k]
        grid = (len(left), size, len(right))
        positions = torch.cat(
            [
                left[:, None, None].expand(*grid, -1),
                torch.arange(size)[None, :, None, None].expand(*grid, 1),
                right[None, None].expand(*grid, -1),
            ],
            -1,
        )
        entries = self._tensor(positions.flatten(0, 2))
        return entries.view(grid), positions


def _distinct(sizes: list[int], count: int, source: torch.Generator) -> Tensor:
    """Draw distinct positions (count, modes); there are at least ``count`` of them."""
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        rows = torch.stack([torch.randint(n, (count,), generator=source) for n in sizes], 1)
        drawn.update(dict.fromkeys(map(tuple, rows.tolist())))
    return torch.tensor(list(drawn)[:count])


def _values(cores: list[Tensor], positions: Tensor) -> Tensor:
    """Evaluate a train with cores (r, size, r) at positions (n, modes)."""
    row = cores[0].new_ones(len(positions), 1, 1)
    for core, at in zip(cores, positions.unbind(1)):
        row = row @ core[:, at].transpose(0, 1)
    return row.flatten()


def _relative(gap: Tensor, known: Tensor) -> float:
    size, error = float(known.norm()), float(gap.norm())
    return error / size if size else error
