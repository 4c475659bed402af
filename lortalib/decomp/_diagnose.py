"""Measures networks: multilinear ranks, components, congruence, core consistency, conditioning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._kinds import Kind
from ._als import condition
from ._arguments import check_finite, check_values, takes_network
from ._canonical import joins_all
from ._environment import gram_parts
from ._inner import check_modes
from ._pieces import Pieces, joined, pieces_of
from ._powers import of_size_one, times_power
from ._refine import on_common_factors
from ._tensor_network import TensorNetwork


@takes_network
def multilinear_ranks(net: TensorNetwork, *, tolerance: float = 1e-6) -> dict[str, int]:
    """Count, for each mode, the dimensions in which the tensor varies along it (the multilinear rank).

    Args:
        net: the network. Only matrices (size, size) of the modes are formed.
        tolerance: singular values below this fraction of the largest one count as zero. Below 1e-7 they
            are rounding errors, since their squares are computed.

    Returns:
        The rank of the unfolding along each mode.

    Example:
        >>> from lortalib.decomp import cp
        >>> net = cp({"layer": 32, "in": 8, "out": 4}, 2, init="normal", dtype=torch.float64)
        >>> multilinear_ranks(net)
        {'layer': 2, 'in': 2, 'out': 2}
    """
    check_values(net.stored, "a rank")
    ranks = {}
    for mode, values in singular_values(net).items():
        ranks[mode] = int((values > tolerance * values.max()).sum())
    return ranks


@takes_network
def singular_values(net: TensorNetwork) -> dict[str, Tensor]:
    """Compute the singular values of the unfolding along each mode.

    Args:
        net: the network. Only matrices (size, size) of the modes are formed.

    Returns:
        For each mode as many values as its size, falling, in float64. Values below 1e-8 of the largest are
        rounding errors, since their squares are computed.

    Example:
        >>> from lortalib.decomp import cp
        >>> net = cp({"layer": 32, "in": 8, "out": 4}, 2, init="normal", dtype=torch.float64)
        >>> values = singular_values(net)["in"]
        >>> values.shape, bool((values[2:] < 1e-7 * values[0]).all())
        (torch.Size([8]), True)
    """
    check_finite(net, "a singular value")
    pieces, exponent = _of_size_one(net)
    found = {}
    for mode in net.modes:
        own = net.legs.open_legs([mode])
        other = pieces.renamed("'", [leg for leg in net.open_legs if leg not in own])
        products = joined(pieces, other).contract((*own, *(leg + "'" for leg in own)))
        size = net.shape[mode]
        squares = torch.linalg.eigvalsh(products.reshape(size, size))
        found[mode] = times_power(squares.clamp(min=0).sqrt().flip(0), exponent)
    return found


@takes_network
def component_norms(net: TensorNetwork, bond: str | None = None) -> Tensor:
    """Compute the norm of each summand of the sum over a bond.

    Args:
        net: the network.
        bond: the bond that numbers the summands; by default the only one that joins the most parameters:
            ``r`` of CP, ``n`` of a block term.

    Returns:
        A vector with an entry for each position of the bond.

    Raises:
        ValueError: no such bond, or several to choose from.

    Example:
        >>> from lortalib.decomp import cp
        >>> component_norms(cp({"layer": 3, "in": 8, "out": 4}, 2, init="normal")).shape
        torch.Size([2])
    """
    bond = _numbering(net, bond)
    pieces, exponent = _of_size_one(net)
    return times_power(_norms(pieces, net, bond), exponent)


@takes_network
def congruence(
    net: TensorNetwork, other: TensorNetwork | None = None, bond: str | None = None
) -> Tensor:
    """Compute the cosines between the summands of the sum over a bond (Tucker 1951).

    For CP a cosine is the product of those of the factors. Two components of one network near -1 cancel
    each other; between two fits, cosines near 1 mean that they found the same components.

    Args:
        net: the network.
        other: the network whose summands are compared; by default ``net`` itself.
        bond: the bond that numbers the summands, as in `component_norms`.

    Returns:
        A matrix (summands of net, summands of other); zero where a summand is zero.

    Raises:
        ValueError: other modes or sizes, or split modes without common factors; no such bond, or several to
            choose from.

    Example:
        >>> from lortalib.decomp import cp
        >>> net = cp({"layer": 3, "in": 8, "out": 4}, 2, init="normal")
        >>> congruence(net).diagonal().allclose(torch.ones(2, dtype=torch.float64))
        True
    """
    other = net if other is None else other
    check_modes(net, other)
    net, other = on_common_factors(net, other)
    one, two = _numbering(net, bond), _numbering(other, bond)
    (pieces, _), (second, _) = _of_size_one(net), _of_size_one(other)
    products = joined(pieces, second.renamed("'", net.modes)).contract((one, two + "'"))
    norms = _norms(pieces, net, one).unsqueeze(1) * _norms(second, other, two)
    return products / torch.where(norms > 0, norms, 1.0)


_TARGET = Kind("a tensor or a network", lambda value: isinstance(value, (Tensor, TensorNetwork)))


@takes_network
def core_consistency(net: TensorNetwork, target: Tensor | TensorNetwork) -> float:
    """Compute the core consistency of a CP: how far the target asks for interactions of components.

    The best core for the factors of the CP is compared with the superdiagonal of ones, in percent (Bro and
    Kiers 2003, CORCONDIA): 100 if they agree; near zero or negative if there are too many components. A
    factor with dependent columns, as one with fewer rows than components, leaves several best cores; the
    one of least norm is taken, which is below 100.

    Args:
        net: a network with one factor for each mode, or each factor of a split mode, and one bond.
        target: what was fitted: a tensor with the axes of ``net.modes``, or a network.

    Returns:
        At most 100.

    Raises:
        ValueError: the network is no CP, or the target has another shape, or splits a mode into factors
            without common ones.

    Example:
        >>> from lortalib.decomp import cp
        >>> net = cp({"layer": 32, "in": 8, "out": 4}, 2, init="normal", dtype=torch.float64)
        >>> f"{core_consistency(net, net):.3f}"
        '100.000'
    """
    check_finite(net, "core consistency")
    _TARGET.check("target", target)
    bond = joins_all(net)
    if bond is None or any(len(term.legs) != 2 for term in net.legs.terms):
        raise ValueError(
            f"core consistency is defined for CP, with one factor for each mode; found\n    {net.legs}"
        )
    if isinstance(target, TensorNetwork):
        check_modes(net, target)
        net, target = on_common_factors(net, target)
        pieces = _wide(target).renamed("*", net.modes)
    else:
        if tuple(target.shape) != tuple(net.shape.values()):
            raise ValueError(f"the target has {tuple(target.shape)}, the network {net.shape}")
        net = net.split
        whole = target.detach().double().reshape(tuple(net.shape.values()))
        pieces = Pieces((net.modes,), (whole,))
    inverses, output = [], []
    for k, (term, tensor) in enumerate(zip(net.legs.terms, net.tensors)):
        factor = tensor.detach().double().movedim(term.legs.index(bond), -1)
        output.append(f"{bond}{k}")
        rows = [leg for leg in term.legs if leg != bond]
        inverse = torch.linalg.pinv(factor.flatten(0, -2)).reshape(-1, *factor.shape[:-1])
        inverses.append(((output[-1], *rows), inverse))
    terms, tensors = zip(*inverses)
    core = joined(pieces, Pieces(tuple(terms), tuple(tensors))).contract(output)
    rank, ideal = net.ranks[bond], torch.zeros_like(core)
    ideal[(torch.arange(rank),) * core.ndim] = 1
    return 100 * (1 - (core - ideal).square().sum().item() / rank)


@takes_network
def conditioning(net: TensorNetwork) -> dict[str, float]:
    """Compute the condition number of each parameter's least-squares problem.

    It is that of the parameter's Gram matrix, scaled to a unit diagonal, so the norms of components do not
    count; the largest one over the slices that the parameter shares. Near 1 the parameter is well
    determined; infinity means that other values give the same tensor.

    Args:
        net: the network.

    Returns:
        By the name of the parameter. A parameter that is used several times is named once, with its
        largest number.

    Example:
        >>> from lortalib.decomp import cp
        >>> sorted(conditioning(cp({"layer": 3, "in": 8, "out": 4}, 1, init="normal")).values())
        [1.0, 1.0, 1.0]
    """
    check_values(net.stored, "a condition number")
    (pieces, _), found = _of_size_one(net), dict[str, float]()
    for k, name in enumerate(net.names):
        value = condition(gram_parts(pieces, k, net.open_legs))
        found[name] = max(value, found.get(name, 0.0))
    return found


def _wide(net: TensorNetwork) -> Pieces:
    return pieces_of(net).wide()


def _of_size_one(net: TensorNetwork) -> tuple[Pieces, Tensor]:
    """Divide a network by a power of two; see `of_size_one`."""
    pieces = _wide(net)
    tensors, exponent = of_size_one(pieces.tensors)
    return Pieces(pieces.terms, tuple(tensors)), exponent


def _norms(pieces: Pieces, net: TensorNetwork, bond: str) -> Tensor:
    """Compute the norm of each summand of the sum over a bond of a network's tensors."""
    squares = joined(pieces, pieces.renamed("'", (*net.open_legs, bond))).contract((bond,))
    return squares.clamp(min=0).sqrt()


def _numbering(net: TensorNetwork, bond: str | None) -> str:
    """Find the bond that numbers the summands."""
    if bond is not None:
        if not isinstance(bond, str) or bond not in net.ranks:
            raise ValueError(f"no bond {bond!r}: the bonds are {', '.join(net.ranks) or 'none'}")
        return bond
    widths = {name: len(net.legs.carriers[name]) for name in net.ranks}
    widest = [name for name in widths if widths[name] == max(widths.values())]
    if len(widest) != 1:
        raise ValueError(
            f"say which bond numbers the summands, bond=: {', '.join(net.ranks) or 'there is none'}, in"
            f"\n    {net.legs}"
        )
    return widest[0]


def knee(costs: list[float], errors: list[float]) -> int:
    """Find the bend of a falling curve: the point farthest below the line from the first to the last.

    Costs are taken as logarithms; both axes run from 0 to 1 (Satopaa et al. 2011).
    """
    x = [math.log(cost) for cost in costs]
    width, height = (x[-1] - x[0]) or 1.0, (errors[0] - errors[-1]) or 1.0
    below = [
        (errors[0] - error) / height - (value - x[0]) / width for value, error in zip(x, errors)
    ]
    return max(range(len(below)), key=below.__getitem__)
