"""Makes the starting values of a fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Union

import torch
from torch import Tensor

from ._hosvd import start_along
from ._legs import Legs
from ._modes import Shape
from ._network import Network
from ._objective import Objective
from ._ranks import Rank, read_ranks
from ._start import Randn
from ._tensor_network import TensorNetwork

#: ``"auto"``, ``"svd"``, ``"random"``, or a network of the line that is fitted.
StartOfFit = Union[str, TensorNetwork]

_NAMES = ("auto", "svd", "random")


def starts(
    net: TensorNetwork,
    objective: Objective,
    start: StartOfFit,
    number: int,
    generator: torch.Generator,
) -> Iterator[list[Tensor]]:
    """Make the tensors of each start: the first as asked, all others random.

    Args:
        net: a network of the line in float64, random or the start; its frozen parameters are kept.
        objective: the target.
        start: what the first one is.
        number: how many starts.
        generator: the source of random numbers.

    Raises:
        ValueError: an unknown name, or ``"svd"`` where there are no singular vectors to follow.
    """
    first = _first(net, objective, start, generator)
    yield first
    for _ in range(number - 1):
        yield _random(net, first, generator)


def net_of_start(start: TensorNetwork, legs: Legs, rank: Rank, shape: Shape) -> Network:
    """Copy a network that a fit starts from, in float64, after checking that it is what is fitted.

    Raises:
        ValueError: another line, shape or rank.
    """
    ranks, asked = start.ranks, read_ranks(legs, shape.modes, rank)
    if dict(start.shape) != dict(shape):
        raise ValueError(f"the start has {start.shape}, the target {shape}")
    if str(start.legs) != str(legs) or ranks != asked:
        raise ValueError(
            "a start has to be of the line and the ranks that are fitted; asked for\n"
            f"    {legs}  {asked}\nfound\n    {start.legs}  {ranks}"
        )
    copies = [tensor.detach().double() for tensor in start.tensors]
    return Network(legs, [copies[owner].clone() for owner in legs.owners], shape.modes)


def _first(
    net: TensorNetwork, objective: Objective, start: StartOfFit, generator: torch.Generator
) -> list[Tensor]:
    if isinstance(start, TensorNetwork):
        return [tensor.detach().clone() for tensor in net.tensors]
    if start not in _NAMES:
        raise ValueError(
            f"unknown start {start!r}; choose {', '.join(map(repr, _NAMES))} or a network"
        )
    is_free = not any(term.frozen for term in net.legs.terms)
    if start == "svd" or (start == "auto" and is_free and objective.is_dense):
        try:
            return _along(net, objective, generator)
        except ValueError:
            if start == "svd":
                raise
    return _random(net, net.tensors, generator)


def _random(net: TensorNetwork, kept: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Draw normal numbers for the trainable parameters. Signs, which short modes have in the start of an
    adapter, would give components equal factors, which least squares cannot tell apart."""
    randn, tensors = _randn(kept[0].device, generator), list[Tensor]()
    for old, term in zip(kept, net.legs.terms):
        if term.tied:
            tensors.append(tensors[-1])
        elif term.frozen:
            tensors.append(old.detach().clone())
        else:
            bonds = math.prod(net.sizes[leg] for leg in term.legs if leg not in net.open_legs)
            tensors.append(randn(old.shape) / math.sqrt(old.numel() / bonds))
    return tensors


def _along(net: TensorNetwork, objective: Objective, generator: torch.Generator) -> list[Tensor]:
    if not objective.is_dense:
        raise ValueError(
            "start='svd' takes singular vectors of a dense target, and a network is never formed; give "
            "'random' or a network of the line as the start"
        )
    dense = objective.summands[0].tensors[0]
    along = start_along(dense, objective.modes)
    return along(net.legs, net.sizes, net.modes, _randn(dense.device, generator))


def _randn(device: torch.device, generator: torch.Generator) -> Randn:
    return lambda size: torch.randn(
        tuple(size), generator=generator, device=generator.device, dtype=torch.float64
    ).to(device)
