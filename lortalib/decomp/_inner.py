"""Computes inner products, norms and distances of networks without the whole tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._kinds import NAMES, takes
from ._arguments import NETWORK, takes_network
from ._pieces import Pieces, joined, pieces_of
from ._powers import of_size_one, times_power
from ._refine import on_common_factors
from ._tensor_network import NetworkView, TensorNetwork


@takes_network
def inner(one: TensorNetwork, other: TensorNetwork, *, over: str | Sequence[str] = ()) -> Tensor:
    """Compute the inner product of two networks: the sum of the products of their entries.

    Both networks are contracted together, so the whole tensor of neither is formed.

    Args:
        one, other: networks with the same modes and sizes. Lines, ranks and orders of modes may differ.
        over: modes that are not summed over; each gets an axis of the result, in this order.

    Returns:
        A tensor with an axis for each mode of ``over``, a scalar without any; differentiable, in the wider of
        the two dtypes.

    Raises:
        ValueError: other modes or sizes, or a name in ``over`` that is no mode; a mode that both split, into
            factors that cannot be split further into common ones.

    Example:
        >>> from lortalib.decomp import cp, tt
        >>> shape = {"layer": 3, "in": 8, "out": 4}
        >>> one, other = cp(shape, 2, init="normal"), tt(shape, 2, init="normal")
        >>> inner(one, other, over="layer").shape
        torch.Size([3])
    """
    check_modes(one, other)
    NAMES.check("over", over)
    modes = tuple(over.split()) if isinstance(over, str) else tuple(over)
    absent = [mode for mode in modes if mode not in one.modes]
    if absent or len(set(modes)) < len(modes):
        raise ValueError(
            f"over={' '.join(modes)!r} has to name different modes; the networks have "
            f"{', '.join(one.modes)}"
        )
    sizes = [one.shape[mode] for mode in modes]
    dtype = torch.promote_types(one.tensors[0].dtype, other.tensors[0].dtype)
    one, other = on_common_factors(_cast(one, dtype), _cast(other, dtype))
    found = pair(pieces_of(one), pieces_of(other), one.modes, one.legs.open_legs(modes))
    return found.reshape(sizes)


def pair(one: Pieces, other: Pieces, modes: Sequence[str], output: Sequence[str]) -> Tensor:
    """Contract two collections over their common modes, except those in ``output``."""
    return joined(one, other.renamed("'", modes)).contract(output)


@takes_network
def norm(net: TensorNetwork, *, over: str | Sequence[str] = ()) -> Tensor:
    """Compute the Frobenius norm of a network: the root of the sum of its squared entries.

    Args:
        net: the network.
        over: modes that get an axis of the result, as in `inner`: the norm of every slice.

    Returns:
        A tensor with an axis for each mode of ``over``, a scalar without any; differentiable where the
        norm is not zero.

    Raises:
        ValueError: a name in ``over`` that is no mode.

    Example:
        >>> import torch
        >>> from lortalib.decomp import tucker
        >>> net = tucker({"layer": 3, "in": 8, "out": 4}, 2, init="normal")
        >>> torch.allclose(norm(net), net.dense().norm())
        True
    """
    wide, exponent = _of_size_one(net)
    found = inner(wide, wide, over=over).clamp(min=0).sqrt()
    return times_power(found, exponent).to(net.tensors[0].dtype)


@takes_network
@takes(other=NETWORK)
def distance(one: TensorNetwork, other: TensorNetwork, *, over: str | Sequence[str] = ()) -> Tensor:
    """Compute the Frobenius norm of the difference of two networks.

    It is the root of ``|a|^2 - 2 <a, b> + |b|^2``, computed in float64, so distances below 1e-8 of the norms
    are rounding errors.

    Args:
        one, other, over: as for `inner`.

    Returns:
        A tensor with an axis for each mode of ``over``, a scalar without any; differentiable where the
        distance is not zero.

    Raises:
        ValueError: as `inner`.

    Example:
        >>> import torch
        >>> from lortalib.decomp import cp, tt
        >>> shape = {"layer": 3, "in": 8, "out": 4}
        >>> one, other = cp(shape, 2, init="normal"), tt(shape, 2, init="normal")
        >>> torch.allclose(distance(one, other), (one.dense() - other.dense()).norm(), atol=1e-5)
        True
    """
    dtype = torch.promote_types(one.tensors[0].dtype, other.tensors[0].dtype)
    (one, first), (other, second) = _of_size_one(one), _of_size_one(other)
    top = torch.maximum(first, second)
    a, b = (first - top).exp2(), (second - top).exp2()
    cross = inner(one, other, over=over) * a * b
    squares = inner(one, one, over=over) * a**2 + inner(other, other, over=over) * b**2
    return times_power((squares - 2 * cross).clamp(min=0).sqrt(), top).to(dtype)


def _of_size_one(net: TensorNetwork) -> tuple[TensorNetwork, Tensor]:
    """Divide a network by a power of two, in float64; see `of_size_one`."""
    tensors, exponent = of_size_one(tensor.double() for tensor in net.tensors)
    return NetworkView(net.legs, tensors, net.modes), exponent


def _cast(net: TensorNetwork, dtype: torch.dtype) -> TensorNetwork:
    """Return the network in a dtype."""
    if net.tensors[0].dtype == dtype:
        return net
    return NetworkView(net.legs, [tensor.to(dtype) for tensor in net.tensors], net.modes)


def check_modes(one: TensorNetwork, other: TensorNetwork) -> None:
    """Refuse two networks whose modes or sizes differ; the order of the modes does not matter.

    Raises:
        TypeError: the second is no network.
        ValueError: the modes or their sizes differ.
    """
    NETWORK.check("the other", other)
    if dict(one.shape) != dict(other.shape):
        raise ValueError(
            f"the networks need the same modes and sizes; found {one.shape} and {other.shape}"
        )
