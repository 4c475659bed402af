"""Divides the scale of a network evenly between its parameters, which leaves the tensor as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import takes_network
from ._tensor_network import NetworkView, TensorNetwork

#: Rounds over all bonds: CP is even after at most three; a train whose parameters differ by 10^12 to 0.3 %
#: after these.
_ROUNDS = 20


@takes_network
def balance(net: TensorNetwork) -> TensorNetwork:
    """Give the parameters at each bond slices of equal size: the same root mean square for each position.

    Factors that a fit leaves can differ in size by orders of magnitude, because only their product
    matters. Optimisers such as Adam move every entry by about the same amount, so they train balanced
    factors evenly. Each round multiplies the slices at one position of one bond by numbers whose product
    is one, as in the balancing of matrices (Osborne 1960).

    Args:
        net: the network. Frozen parameters and parameters that stand several times keep their values.

    Returns:
        A network with the same line, without gradients.

    Example:
        >>> import torch
        >>> from lortalib.decomp import Network
        >>> net = Network("in r, out r", [torch.full((4, 1), 100.0), torch.full((9, 1), 0.01)], ["in", "out"])
        >>> found = balance(net)
        >>> [round(tensor.mean().item(), 4) for tensor in found.tensors]
        [1.0, 1.0]
    """
    owners = net.legs.owners
    free = [
        k
        for k, term in enumerate(net.legs.terms)
        if not term.frozen and owners.count(owners[k]) == 1
    ]
    # In float64, because every round would add a rounding error, and terms of a fit can cancel.
    tensors = [tensor.detach().to(torch.float64, copy=True) for tensor in net.tensors]
    for _ in range(_ROUNDS):
        for bond in net.ranks:
            carriers = [k for k in net.legs.carriers[bond] if k in free]
            _even(tensors, {k: net.legs.terms[k].legs.index(bond) for k in carriers})
    found = [tensor.to(old.dtype) for tensor, old in zip(tensors, net.tensors)]
    return NetworkView(net.legs, found, net.modes)


def _even(tensors: list[Tensor], axes: dict[int, int]) -> None:
    """Even out the slices of several parameters along one axis of each, in place."""
    sizes = {k: _slice_sizes(tensors[k], axis) for k, axis in axes.items()}
    if len(sizes) < 2:
        return
    logs = torch.stack([size.log() for size in sizes.values()])
    mean = logs.mean(0)
    for (k, axis), own in zip(axes.items(), logs):
        # A slice of zeros makes its term of the sum zero, whatever the others are.
        factor = torch.where(logs.isfinite().all(0), mean - own, 0.0).exp()
        shape = [-1 if at == axis else 1 for at in range(tensors[k].ndim)]
        tensors[k] *= factor.reshape(shape)


def _slice_sizes(tensor: Tensor, axis: int) -> Tensor:
    """Compute the root mean square of each slice along an axis."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1).square().mean(1).sqrt()
