"""Multiplies networks by numbers, and by other networks entry by entry."""

from __future__ import annotations

from numbers import Real

from torch import Tensor

from .._kinds import takes
from ._arguments import NETWORK, takes_network
from ._sum import weighted_parameter
from ._tensor_network import NetworkView, TensorNetwork


@takes_network
def scale(net: TensorNetwork, factor: float | Tensor) -> TensorNetwork:
    """Multiply a network by a number; one parameter takes it.

    Args:
        net: the network.
        factor: a number, or a tensor of one entry, through which gradients flow.

    Returns:
        A network with the same line. It shares all other parameters with ``net``, and gradients reach
        all of them.

    Raises:
        TypeError: no number.
        ValueError: every parameter is tied, or a tensor of more than one entry.

    Example:
        >>> import torch
        >>> from lortalib.decomp import cp
        >>> net = cp({"layer": 3, "in": 8, "out": 4}, 2, init="normal")
        >>> torch.allclose(scale(net, -2.0).dense(), -2 * net.dense())
        True
    """
    if isinstance(factor, Tensor) and factor.numel() != 1:
        raise ValueError(
            f"a network is scaled by one number; found a tensor of shape {tuple(factor.shape)}. For a "
            "factor for each position of a mode, use net.mode_dot(torch.diag(factors), mode)"
        )
    if not isinstance(factor, (Real, Tensor)):
        raise TypeError(f"a network is scaled by a number; found {type(factor).__name__}")
    tensors = list(net.tensors)
    k = weighted_parameter(net)
    number = factor.reshape(()) if isinstance(factor, Tensor) else factor
    tensors[k] = tensors[k] * number
    return NetworkView(net.legs, tensors, net.modes)


@takes_network
@takes(other=NETWORK)
def hadamard(one: TensorNetwork, other: TensorNetwork) -> TensorNetwork:
    """Multiply two networks of the same line entry by entry; their ranks multiply.

    Each parameter of the product contains the products of all pairs of slices along the bonds, as in
    the product of two tensor trains (Oseledets 2011, section 4.2). Nothing is approximated.

    Args:
        one, other: networks with the same line, shape and order of modes. Their ranks may differ.

    Returns:
        A network with the same line; differentiable.

    Raises:
        ValueError: different lines or shapes.

    Example:
        >>> import torch
        >>> from lortalib.decomp import cp
        >>> one, other = (cp({"layer": 3, "in": 8, "out": 4}, n, init="normal") for n in (2, 3))
        >>> product = hadamard(one, other)
        >>> product.ranks, torch.allclose(product.dense(), one.dense() * other.dense(), atol=1e-6)
        ({'r': 6}, True)
    """
    if str(one.legs) != str(other.legs) or one.shape != other.shape:
        raise ValueError(
            "networks of different lines have no product of the same line: a mode would stand on two "
            "parameters. Give both the same line first, with `convert` or `fit`; found\n"
            f"    {one.legs}  {one.shape}\n    {other.legs}  {other.shape}"
        )
    tensors = []
    for term, left, right in zip(one.legs.terms, one.tensors, other.tensors):
        is_bond = [leg not in one.open_legs for leg in term.legs]
        shape_left = [part for n, bond in zip(left.shape, is_bond) for part in (n, 1)[: 1 + bond]]
        shape_right = [
            part for n, bond in zip(right.shape, is_bond) for part in ((1, n) if bond else (n,))
        ]
        product = left.reshape(shape_left) * right.reshape(shape_right)
        pairs = zip(left.shape, right.shape, is_bond)
        tensors.append(product.reshape([a * b if bond else a for a, b, bond in pairs]))
    return NetworkView(one.legs, tensors, one.modes)
