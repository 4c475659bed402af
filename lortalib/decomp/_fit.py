"""Fits networks to targets: dense tensors, networks, and sums of networks."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._kinds import FUNCTION, GENERATOR, takes
from .._numbers import check_number
from .._stacklevel import outside
from ._als import Progress, Sweeper
from ._build import draw
from ._fit_start import StartOfFit, net_of_start, starts
from ._formats import get_format
from ._legs import Legs
from ._network import Network
from ._objective import Objective
from ._pieces import Pieces, pieces_of
from ._ranks import Rank
from ._target import Target, TargetLike, read_target
from ._tensor_network import NetworkView, TensorNetwork
from ._tensorly import Modes
from ._tensorly_fit import TENSORLY, fit_with_tensorly
from ._tree import is_tree

#: Norms of all terms, relative to the target's, beyond which terms cancel each other: always, and if they
#: still grow at the end. A fit with a smaller error than EXACT has nothing to diverge to.
CANCELLING, GROWING, EXACT = 30.0, 2.0, 1e-6

#: What a relative error may change by though the network is the same up to rounding.
ROUNDING = 8 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Fit:
    """A network fitted to a target, and how that went.

    Attributes:
        network: the fitted network, whose parameters are finite.
        error: ``|target - network| / |target|`` in the Frobenius norm, measured on the network returned;
            with a mask or weights, both norms are weighted. For targets that are networks, errors below
            1e-8 are rounding errors, or below 1e-8 times the norm of the network's terms where these cancel.
        errors: the relative error after every sweep of the best start; empty for algorithms of TensorLy,
            which do not return it.
        seconds: the time that all starts took together.
        conditions: by the name of a parameter, the condition number of its least-squares problem (its
            Gram matrix scaled to a unit diagonal); infinity if directions are left open. Without the
            parameters that are frozen or used several times.
        converged: whether the last sweep changed the error by less than the tolerance.
        how: the name of the algorithm.

    Example:
        >>> import torch
        >>> from lortalib.decomp import fit, tucker
        >>> target = tucker({"layer": 4, "in": 8, "out": 6}, rank=2, init="normal").dense().detach()
        >>> found = fit(target, "tucker", rank=2, modes="layer in out")
        >>> found.error < 1e-5, found.network.count()
        (True, 44)
    """

    network: Network
    error: float
    errors: tuple[float, ...]
    seconds: float
    conditions: dict[str, float]
    converged: bool
    how: str


@takes(generator=GENERATOR, progress=FUNCTION.or_none)
def fit(
    target: TargetLike,
    line: str,
    rank: Rank,
    *,
    modes: Modes | None = None,
    mask: Any = None,
    weights: Any = None,
    start: StartOfFit = "auto",
    tolerance: float = 1e-10,
    ridge: float = 0.0,
    restarts: int = 0,
    sweeps: int = 1000,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Fit a network of any line to a target by alternating least squares.

    Each parameter in turn takes its best values while the others stay (Carroll and Chang 1970, Harshman
    1970 for CP; Holtz, Rohwedder and Schneider 2012 for trains). Frozen parameters stay as they are. If
    a parameter stands several times in the line, the tensor is not linear in it, and every sweep ends
    with steps of L-BFGS. No step raises the error. A target that is a network is never formed.

    TensorLy's own algorithms fit CP (``parafac``), Tucker (``tucker``) and trains (``tensor_train``) to a
    dense target, unless a mask, weights, a ridge, a start, restarts or progress are asked for.

    Args:
        target: a dense tensor with an axis for each mode; a network; or a list of networks, which stands
            for their sum. The LoRA of many projections is a network of the format ``lora``.
        line: the name of a format, or a line of legs.
        rank: as for `network`; ranks larger than the modes can fill are reduced, with a warning.
        modes: names of the axes of a dense target, as in `from_tensorly`.
        mask: a tensor of the target's shape, one where an entry is known and zero where it is missing.
            The target may hold NaN where it is zero.
        weights: weights of the squared errors: a tensor of the target's shape, or a network whose
            parameters are not negative, over the same modes or some of them; along the others the
            weights are constant. Both stand beside a mask.
        start: ``"svd"`` (singular vectors of the target, for a dense target and bonds that form a tree),
            ``"random"``, ``"auto"`` (the first where it exists), or a network of the line, which also says
            what frozen parameters hold.
        tolerance: stop when a sweep lowers the relative error by less. If a parameter stands several times in
            the line, also when the steps of L-BFGS lower it by a smaller share each, on average.
        ridge: weight of the squared parameters, added to the squared relative error.
        restarts: number of further starts, all random; the best one is returned.
        sweeps: the largest number of sweeps of one start.
        generator: the source of random starts; by default one with a fixed seed.
        progress: called after every sweep with its number and the relative error.

    Returns:
        `Fit`. The parameters have the dtype and the device of the target; they are computed in float64.

    Raises:
        ValueError: a target, mask or weights that are not finite, empty or of other shapes; a slice
            without known entries; a line whose parameters are all frozen, or hashed; a start of another
            line or shape; a mode that the line, the target or the weights split into factors without common
            ones; parameters too large for the dtype.
        TypeError: a complex target; an option that is no number.

    Warns:
        RuntimeWarning: the fit diverges: its terms grow and cancel each other.

    Example:
        >>> from lortalib.decomp import lora
        >>> trained = lora((6, 2, 3, 16, 8), 2, init="normal")
        >>> found = fit(trained, "in p, layer matrix p q, head out q", 16)
        >>> found.how, found.error < 0.5
        ('alternating least squares', True)
    """
    _check_options(tolerance, ridge, restarts, sweeps)
    begin = time.perf_counter()
    form = get_format(line)
    ridge = float(ridge)
    read = read_target(target, modes, mask, weights, ridge=ridge, split=form.legs)
    source = generator or torch.Generator().manual_seed(0)
    legs, asked = form.legs(read.shape), form.by_bond(read.shape, rank)
    _check_line(legs)
    made: TensorNetwork
    if isinstance(start, TensorNetwork):
        made = net_of_start(start, legs, asked, read.shape)
    else:
        made = _random_net(legs, asked, read, source)
    net = read.refinement.of(made)
    first = starts(net, read.objective, start, 1 + restarts, source)
    is_plain = ridge == 0 and restarts == 0 and progress is None and start == "auto"
    run = None
    if read.scale == 0:
        run = _zero_run(net, next(first))
    elif is_plain:
        run = _run_of_tensorly(net, read, tolerance, sweeps)
    if run is None:
        scaled = (rescaled(net.legs, tensors, 1.0) for tensors in first)
        if isinstance(start, TensorNetwork):
            scaled = (_divided(net.legs, tensors, read.scale) for tensors in first)
        run = _best_run(net.legs, scaled, read.objective, ridge, tolerance, sweeps, progress)
    conditions = Sweeper(net.legs, run.tensors, read.objective, ridge).conditions()
    network = _finished(made, run.tensors, read)
    error = _error_of(network, read)
    _warn_if_diverged(net, run, error)
    return Fit(
        network,
        error,
        run.errors,
        time.perf_counter() - begin,
        {network.names[k]: value for k, value in conditions.items()},
        run.converged,
        run.how,
    )


def _random_net(legs: Legs, rank: Rank, read: Target, source: torch.Generator) -> TensorNetwork:
    """Draw a network of a line for a target, in float64."""
    tensors = draw(legs, read.shape, rank, "normal", source, None, torch.float64)[1]
    return NetworkView(legs, [tensor.to(read.device) for tensor in tensors], read.shape.modes)


class _Run(NamedTuple):
    """What one start ended in: the parameters for the target of norm one, and how it went.

    `earlier` are the parameters after half of the sweeps or less, more than a quarter.
    """

    tensors: list[Tensor]
    errors: tuple[float, ...]
    converged: bool
    how: str = "alternating least squares"
    earlier: Sequence[Tensor] = ()


def _best_run(
    legs: Legs,
    firsts: Iterable[list[Tensor]],
    objective: Objective,
    ridge: float,
    tolerance: float,
    sweeps: int,
    progress: Progress | None,
) -> _Run:
    """Sweep from every start; return the run that ends with the least objective."""
    best, lowest = None, math.inf
    for first in firsts:
        sweeper = Sweeper(legs, first, objective, ridge)
        errors, earlier, later = list[float](), list[Tensor](), list[Tensor]()
        before, converged = math.inf, False
        for number in range(1, sweeps + 1):
            errors.append(sweeper.sweep())
            if number.bit_count() == 1:  # after 1, 2, 4, 8 ... sweeps
                earlier, later = later, list(sweeper.tensors)
            if progress is not None:
                progress(number, errors[-1])
            now = math.sqrt(sweeper.penalised(errors[-1]))
            least = max(tolerance, tolerance * now * sweeper.steps, ROUNDING)
            converged = before - now <= least or now <= objective.precision
            if converged or not math.isfinite(now):
                break
            before = now
        if now < lowest:
            best = _Run(sweeper.tensors, tuple(errors), converged, earlier=earlier)
            lowest = now
    if best is None:
        raise ValueError(
            f"every start of the fit ended in NaN or infinity, in\n    {legs}\nTry a smaller rank, or "
            "a ridge such as ridge=1e-6"
        )
    return best


def _zero_run(net: TensorNetwork, first: list[Tensor]) -> _Run:
    """Make the zero network, which is exact for a zero target; frozen parameters stay."""
    terms = net.legs.terms
    zeros = [t if term.frozen else torch.zeros_like(t) for t, term in zip(first, terms)]
    return _Run(zeros, (0.0,), True)


def _run_of_tensorly(
    net: TensorNetwork, read: Target, tolerance: float, sweeps: int
) -> _Run | None:
    """Run TensorLy's algorithm; None if there is none, or if it meets a singular matrix or ends in NaN."""
    if read.dense is None or len(net.modes) < 2:
        return None
    kinds = (kind for kind in TENSORLY if get_format(kind).legs(net.shape) == net.legs)
    kind = next(kinds, None)
    if kind is None:
        return None
    found = fit_with_tensorly(kind, read.dense, net, tolerance, sweeps)
    how = f"TensorLy {TENSORLY[kind]}"
    return None if found is None else _Run(list(found), (), True, how)


def rescaled(legs: Legs, tensors: Sequence[Tensor], factor: float) -> list[Tensor]:
    """Multiply the tensor of a line by a positive number, through one trainable parameter."""
    trainable = [k for k, term in enumerate(legs.terms) if not (term.frozen or term.tied)]
    k = min(trainable, key=lambda k: (legs.owners.count(k), tensors[k].numel()))
    share = factor ** (1 / legs.owners.count(k))
    return [t * share if owner == k else t for t, owner in zip(tensors, legs.owners)]


def _divided(legs: Legs, tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Divide the tensor of a line by a positive number, also by one whose inverse is infinite."""
    half = 1 / math.sqrt(scale)
    return rescaled(legs, rescaled(legs, tensors, half), half)


def _finished(net: TensorNetwork, tensors: Sequence[Tensor], read: Target) -> Network:
    """Give the fitted parameters the norm, the dtype and the device of the target."""
    scaled = rescaled(net.legs, tensors, read.scale) if read.scale else list(tensors)
    whole = read.refinement.undone(scaled, net.legs, net.sizes)
    own = [t.detach().to(read.device, read.dtype).contiguous() for t in whole]
    if not all(bool(tensor.isfinite().all()) for tensor in own):
        raise ValueError(
            f"the fitted parameters are too large for {read.dtype}; give the target in a wider dtype, or "
            "divided by its norm"
        )
    return Network(net.legs, [own[owner] for owner in net.legs.owners], net.modes)


def _error_of(network: TensorNetwork, read: Target) -> float:
    """Measure the error of the parameters that are returned, after they were rounded to their dtype."""
    network = read.refinement.of(network)
    pieces = pieces_of(network)
    wide = [tensor.detach().double() for tensor in pieces.tensors]
    divided = _divided(network.legs, wide, read.scale or 1.0)
    return read.objective.relative_error(Pieces(pieces.terms, tuple(divided)))


def _warn_if_diverged(net: TensorNetwork, run: _Run, error: float) -> None:
    """Warn if the terms of the sum over the bonds cancel each other, ever more or to a large part.

    Their norm is relative to that of the target. Trees have a best network of every rank, so there large
    terms only mean an unusual basis.
    """
    if error < EXACT:
        return
    now, sweeps = Sweeper.growth(net.legs, run.tensors), len(run.errors)
    is_large = now > GROWING and sweeps >= 20
    grows = is_large and now > 1.05 * Sweeper.growth(net.legs, run.earlier)
    if (now > CANCELLING or grows) and not is_tree(net.legs, net.modes):
        warnings.warn(
            f"the fit diverges: terms {now:.1f} times as large as the target cancel each other, so "
            "a best network of these ranks may not exist. Try a ridge such as 1e-6, another rank, or "
            f"another format; the line is\n    {net.legs}",
            RuntimeWarning,
            stacklevel=outside(),
        )


def _check_line(legs: Legs) -> None:
    """Refuse a line that nothing can be fitted with."""
    if legs.vectors:
        raise ValueError(
            "hashed parameters share numbers, so they cannot be fitted one after the other; fit the line "
            f"without its vectors,\n    {legs.unhashed}"
        )
    if all(term.frozen for term in legs.terms):
        raise ValueError(f"every parameter is frozen, so there is nothing to fit, in\n    {legs}")


def _check_options(tolerance: float, ridge: float, restarts: int, sweeps: int) -> None:
    check_number("tolerance", tolerance, least=0)
    check_number("ridge", ridge, least=0)
    check_number("restarts", restarts, least=0, is_integer=True)
    check_number("sweeps", sweeps, least=1, is_integer=True)
