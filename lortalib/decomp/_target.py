"""Reads what a network is fitted to: a dense tensor, a network, or a sum of networks, with weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from ._arguments import check_values
from ._inner import check_modes
from ._legs import Legs
from ._modes import Shape
from ._objective import Objective
from ._pieces import Pieces, pieces_of
from ._refine import Refinement, common_factors
from ._tensor_network import TensorNetwork
from ._tensorly import Modes, axis_names, real

TargetLike = Union[Tensor, TensorNetwork, Sequence[TensorNetwork]]


class Target(NamedTuple):
    """A target divided by its norm.

    Attributes:
        objective: the distance to the target of norm one, in float64.
        shape: the modes and their sizes.
        refinement: how the modes are split in the objective.
        scale: the norm of the target; zero for a zero target, whose objective is not scaled.
        dtype, device: dtype and device of the target; of a sum, the widest dtype.
        dense: the dense target of norm one, if it is dense and has no weights; else None.
    """

    objective: Objective
    shape: Shape
    refinement: Refinement
    scale: float
    dtype: torch.dtype
    device: torch.device
    dense: Tensor | None


def read_target(
    target: TargetLike,
    modes: Modes | None,
    mask: Any,
    weights: Any,
    *,
    ridge: float,
    split: Callable[[Shape], Legs] | None = None,
) -> Target:
    """Check a target, its mask and its weights, and divide it by its norm; see `fit` for the errors.

    Args:
        target, modes, mask, weights, ridge: as for `fit`.
        split: writes the line that is fitted, for a shape; the target's modes are split as those of the line.
    """
    if isinstance(target, (TensorNetwork, list, tuple)) and _are_networks(target):
        nets = [target] if isinstance(target, TensorNetwork) else list(target)
        if modes is not None:
            raise TypeError("the modes of a network are its own; leave out modes=")
        for net in nets:
            check_modes(nets[0], net)
        shape, first = nets[0].shape, nets[0].tensors[0]
        dtype = reduce(torch.promote_types, (net.tensors[0].dtype for net in nets))
    else:
        nets, first = [], real(target, "a tensor")
        dtype = first.dtype
        shape = Shape(dict(zip(axis_names(modes, tuple(first.shape)), first.shape)))
    parts = [tensor for net in nets for tensor in net.stored] if nets else [first]
    check_values(parts, "a fit")
    refinement = _refinement(shape, [*nets, weights], split)
    legs = refinement.open_legs
    weight = _read_weight(shape, refinement, mask, weights, first.device)
    if nets:
        summands = [pieces_of(refinement.of(net)).wide() for net in nets]
    else:
        summands = [Pieces((legs,), (first.detach().double().reshape(refinement.shape),))]
    if weight is not None and weight.terms == (legs,):  # as large as the whole tensor
        _check_observed(shape, weight.tensors[0], ridge)
        whole = reduce(torch.add, [summand.contract(legs) for summand in summands])
        whole = torch.where(weight.tensors[0] > 0, whole, torch.zeros_like(whole))
        summands = [Pieces((legs,), (whole,))]
    objective, scale = _normalised(summands, legs, weight)
    is_plain = objective.is_dense and weight is None
    dense = objective.summands[0].tensors[0] if is_plain else None
    return Target(objective, shape, refinement, scale, dtype, first.device, dense)


def _refinement(
    shape: Shape, several: Sequence[Any], split: Callable[[Shape], Legs] | None
) -> Refinement:
    """Find the factors that the line, the target and the weights have in common."""
    nets = [net for net in several if isinstance(net, TensorNetwork)]
    lines: list[tuple[Legs, Mapping[str, int]]]
    lines = [
        (net.legs, {leg: net.sizes[leg] for leg in net.open_legs})
        for net in nets
        if net.shape.items() <= shape.items()
    ]
    if split is not None:
        legs = split(shape)
        lines.append((legs, legs.split(shape)))
    return common_factors(shape, lines)


def _are_networks(target: Any) -> bool:
    nets = [target] if isinstance(target, TensorNetwork) else list(target)
    if any(isinstance(net, TensorNetwork) for net in nets):
        others = [type(net).__name__ for net in nets if not isinstance(net, TensorNetwork)]
        if others:
            raise TypeError(f"a sum consists of networks; found also {', '.join(others)}")
        return True
    return False


def _normalised(
    summands: Sequence[Pieces], modes: tuple[str, ...], weight: Pieces | None
) -> tuple[Objective, float]:
    """Divide the target by its norm. Squares of huge or tiny entries are no numbers, so every tensor is
    divided by its largest entry first.

    Raises:
        ValueError: a target that is not finite, or whose entries are too large.
    """
    peaks = [[torch.linalg.vector_norm(t, math.inf).item() for t in s.tensors] for s in summands]
    if not all(math.isfinite(each) for own in peaks for each in own):
        where = " where its weight is not zero" if weight is not None else ""
        raise ValueError(f"the target holds NaN or infinity{where}; there is nothing near it")
    wholes = [math.prod(own) for own in peaks]
    peak = max(wholes)
    if not math.isfinite(peak):
        raise ValueError("the entries of the target are too large for float64; divide it first")
    if peak == 0:
        return Objective(summands, modes, weight), 0.0
    small = []
    for summand, own, whole in zip(summands, peaks, wholes):
        if whole == 0:
            continue
        first, *rest = (tensor / each for tensor, each in zip(summand.tensors, own))
        small.append(Pieces(summand.terms, (first * (whole / peak), *rest)))
    objective = Objective(small, modes, weight)
    norm = math.sqrt(max(0.0, objective.squared_norm))
    if norm == 0:
        return objective, 0.0
    return objective.scaled(1 / norm), norm * peak


def _read_weight(
    shape: Shape, refinement: Refinement, mask: Any, weights: Any, device: torch.device
) -> Pieces | None:
    if isinstance(weights, TensorNetwork):
        if not weights.modes or not weights.shape.items() <= shape.items():
            raise ValueError(f"the weights have {weights.shape}, the target {shape}")
        if mask is not None:
            weights = _spread(weights, shape)
    if isinstance(weights, TensorNetwork):
        wide = pieces_of(refinement.of(weights)).wide()
        if not all(bool(((t >= 0) & t.isfinite()).all()) for t in wide.tensors):
            raise ValueError("the parameters of a network of weights are to be finite and >= 0")
        return wide.renamed("#", refinement.open_legs)
    found = None
    for values, what in ((mask, "mask"), (weights, "weights")):
        if values is None:
            continue
        tensor = real(values, f"the {what}").detach().to(device).double()
        if tuple(tensor.shape) != tuple(shape.values()):
            raise ValueError(
                f"the {what} has shape {tuple(tensor.shape)}, the target {tuple(shape.values())}; they "
                "are to be the same"
            )
        if what == "mask" and not ((tensor == 0) | (tensor == 1)).all():
            raise ValueError(
                "a mask holds ones where an entry is known and zeros where it is missing; found other "
                "values. Other weights go into weights="
            )
        if not ((tensor >= 0) & tensor.isfinite()).all():
            raise ValueError("weights are to be finite and not negative; found others")
        found = tensor if found is None else found * tensor
    if found is None:
        return None
    return Pieces((refinement.open_legs,), (found.reshape(refinement.shape),))


def _spread(weights: TensorNetwork, shape: Shape) -> Tensor:
    """Write weights that are constant along some modes as a tensor over all modes."""
    order = [weights.modes.index(mode) for mode in shape.modes if mode in weights.modes]
    sizes = [n if mode in weights.modes else 1 for mode, n in shape.items()]
    return weights.dense().detach().permute(order).reshape(sizes).expand(*shape.values())


def _check_observed(shape: Shape, weight: Tensor, ridge: float) -> None:
    if not weight.any():
        raise ValueError("the mask says that every entry is missing; there is nothing to fit")
    weight = weight.reshape(tuple(shape.values()))
    for axis, mode in enumerate(shape):
        seen = weight.movedim(axis, 0).flatten(1).any(1)
        if not ridge and not seen.all():
            unseen = int((~seen).nonzero()[0])
            raise ValueError(
                f"no entry is known at {mode}={unseen}, so nothing says what the network is there; "
                f"leave that position out of the tensor, or give ridge=1e-6, which makes it zero"
            )
