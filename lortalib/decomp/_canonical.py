"""Writes a network in a form that is unique up to little: orthonormal trees, normalised components."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import check_finite, takes_network
from ._bond_tree import Edge
from ._legs import Legs
from ._network import Network
from ._pieces import position_of
from ._tensor_network import TensorNetwork
from ._tree import is_tree, orthonormalise, positive_qr, tree_edges


@takes_network
def canonical(net: TensorNetwork, root: str | int | None = None) -> Network:
    """Write the same tensor with parameters that are unique up to signs or order.

    * If the bonds form a tree (trains, Tucker, LoTR, LoRA), every parameter but the root has orthonormal
      columns towards the root, in each slice over modes that it shares with its neighbour. The norm of
      the root is that of the tensor. Ranks larger than a parameter's rows shrink to them. For trains it is
      the left- or right-orthogonal form (Oseledets 2011).
    * If one bond joins all parameters (CP, CaRA), every component has columns of norm one, whose largest
      entry is positive; the root takes norms and signs, and the components are ordered by norm.

    Args:
        net: the network.
        root: the parameter that is not normalised, by name or position; by default the one that starts at
            zero in training.

    Returns:
        A `Network` with parameters of its own. Nothing is approximated.

    Raises:
        ValueError: other bonds, such as those of a ring; a frozen parameter; a parameter used twice
            that would get different values, or is the root.
        KeyError: no such parameter.

    Example:
        >>> import torch
        >>> from lortalib.decomp import tt
        >>> net = tt({"layer": 3, "in": 8, "out": 4}, 2, init="normal")
        >>> same = canonical(net, root="out_b")
        >>> torch.allclose(same.dense(), net.dense(), atol=1e-6)
        True
        >>> torch.allclose(same.tensors[0].T @ same.tensors[0], torch.eye(2), atol=1e-6)
        True
    """
    check_finite(net, "a canonical form")
    refuse_frozen(net.legs, "canonical form")
    top = net.legs.zero if root is None else position_of(net, root)
    tensors = wide_copies(net)
    if is_tree(net.legs, net.modes):
        _orthonormalise_all(net, tensors, tree_edges(net.legs, net.modes, top))
    elif joins_all(net) is not None:
        tensors = _normalised(net, tensors, top)
    else:
        try:
            tree_edges(net.legs, net.modes, top)
        except ValueError as reason:
            raise ValueError(
                f"there is no canonical form: {reason}\nOnly trees and lines with one bond that joins all "
                "parameters have one"
            ) from None
    return rebuilt(net, tensors)


def joins_all(net: TensorNetwork) -> str | None:
    """Return the bond of a CP: the only bond, on every parameter; else None."""
    bonds = tuple(net.ranks)
    whole = len(bonds) == 1 and len(net.legs.carriers[bonds[0]]) == len(net.legs.terms)
    return bonds[0] if whole else None


def refuse_frozen(legs: Legs, what: str) -> None:
    """Refuse a line with frozen parameters.

    Raises:
        ValueError: a parameter is frozen.
    """
    frozen = [str(term) for term in legs.terms if term.frozen and not term.tied]
    if frozen:
        raise ValueError(
            f"a frozen parameter keeps its numbers, so there is no {what} of a network with "
            f"{', '.join(frozen)}, in\n    {legs}\n`absorb` contracts one into a neighbour that trains"
        )


def wide_copies(net: TensorNetwork) -> list[Tensor]:
    """Copy the tensors of a network, in float64."""
    return [tensor.detach().double().clone() for tensor in net.tensors]


def rebuilt(net: TensorNetwork, tensors: Sequence[Tensor]) -> Network:
    """Make a network like another one from tensors in float64."""
    like = net.tensors[0]
    own = [tensor.to(like.device, like.dtype).contiguous() for tensor in tensors]
    return Network(net.legs.unhashed, [own[owner] for owner in net.legs.owners], net.modes)


def _orthonormalise_all(net: TensorNetwork, tensors: list[Tensor], edges: Sequence[Edge]) -> None:
    """Make every parameter orthonormal towards the root."""
    terms = [term.legs for term in net.legs.terms]
    for child, parent, bond in edges:
        orthonormalise(tensors, terms, bond, child, parent, qr=positive_qr)
    for k, owner in enumerate(net.legs.owners):
        if not torch.equal(tensors[k], tensors[owner]):
            raise ValueError(
                f"({net.legs.terms[owner]}) is used twice and would get two values, in\n    {net.legs}"
            )


def _normalised(net: TensorNetwork, tensors: list[Tensor], root: int) -> list[Tensor]:
    """Give the columns of CP norm one; the root takes norms and signs; sort the components."""
    if net.legs.owners.count(net.legs.owners[root]) > 1:
        raise ValueError(f"the root cannot be a parameter that is used twice, in\n    {net.legs}")
    bond = joins_all(net)
    assert bond is not None
    axes = [term.legs.index(bond) for term in net.legs.terms]
    columns = [tensor.movedim(axis, -1) for tensor, axis in zip(tensors, axes)]
    weight = columns[0].new_ones(columns[0].shape[-1])
    for k, column in enumerate(columns):
        flat = column.reshape(-1, column.shape[-1])
        norm = _norms_of_columns(flat)
        if k != root:
            largest = flat.gather(0, flat.abs().argmax(0, keepdim=True))[0]
            norm = torch.where(norm > 0, norm, 1.0) * torch.where(largest < 0, -1.0, 1.0)
            columns[k] = column / norm
            weight = weight * norm
    columns[root] = columns[root] * weight
    sizes = _norms_of_columns(columns[root].reshape(-1, len(weight)))
    order = sizes.argsort(descending=True, stable=True)
    return [column[..., order].movedim(-1, axis) for column, axis in zip(columns, axes)]


def _norms_of_columns(matrix: Tensor) -> Tensor:
    """Compute the norm of each column, also where the squares of its entries are no numbers."""
    peaks = matrix.abs().amax(0)
    norms: Tensor = torch.linalg.vector_norm(matrix / torch.where(peaks > 0, peaks, 1.0), dim=0)
    return norms * peaks
