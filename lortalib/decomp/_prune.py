"""Gives a trained network smaller ranks in coordinates as near as possible to its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._canonical import canonical, wide_copies
from ._inner import distance, norm
from ._network import Network
from ._pieces import joined, pieces_of
from ._projectors import projectors
from ._rank_change import BondMap, RankChange, changed, refuse_fixed
from ._ranks import Rank, read_ranks
from ._sum import direct_sum
from ._tensor_network import NetworkView, TensorNetwork
from ._tree import is_tree


def prune(net: Network, rank: Rank) -> RankChange:
    """Give a network smaller ranks, and say how the state of an optimiser follows.

    * If the bonds form a tree and no parameter is tied, each bond is projected onto its largest singular
      values. The error is at most the root of the number of bonds times the best possible one, as for
      `round`; but the parameters keep their scales, where those of `round` become orthonormal.
    * On other lines (CP, rings, block terms, tied parameters) each bond loses components, one after the
      other: always the one whose removal adds least to the error. The first is that of least norm; later
      ones take into account that components overlap. The components that stay are unchanged. The error
      depends on no data. AdaLoRA (arXiv 2303.10512, section 3.2) also weighs entries by their gradients,
      which are noisy and have to be averaged over many steps.

    Args:
        net: the network; it stays as it is, and its whole tensor is not formed.
        rank: ranks as for `network`, or a mapping with some bonds. Larger ones than those of the network stay
            as they are. Bonds of a tree that the smaller ones leave no use for shrink with them.

    Returns:
        `RankChange`, with the error that was made. On trees it is exact; elsewhere an error below 1e-8 is a
        rounding error.

    Raises:
        ValueError: a frozen or hashed parameter, whose numbers are not free; numbers that are not finite; a
            rank below 1, a wrong number of ranks or an unknown bond; different ranks for bonds that one tied
            parameter has in one place.

    Example:
        >>> import torch
        >>> from lortalib.decomp import cp
        >>> found = prune(cp({"layer": 3, "in": 8, "out": 4}, 5, init="normal"), 2)
        >>> found.network.ranks, 0 < found.error < 1
        ({'r': 2}, True)
        >>> momentum = torch.ones(8, 5)  # of the first parameter, which carries in and r
        >>> found.gradient(0, momentum).shape
        torch.Size([8, 2])
    """
    refuse_fixed(net, "lower")
    wanted = read_ranks(net.legs, net.modes, rank, net.ranks)
    ranks = {bond: min(wanted[bond], size) for bond, size in net.ranks.items()}
    is_plain_tree = is_tree(net.legs, net.modes) and not any(t.tied for t in net.legs.terms)
    if is_plain_tree:
        ranks = net.legs.limits({**net.sizes, **ranks}, net.modes)
        maps = _projected(net, ranks)
    else:
        maps = _selected(net, ranks)
    if not any(maps):
        return RankChange(changed(net, wide_copies(net)), 0.0, maps)
    # Until the parameters are there, the old network tells the legs.
    draft = RankChange(net, 0.0, maps)
    tensors = [draft.value(k, tensor) for k, tensor in enumerate(wide_copies(net))]
    network = changed(net, tensors)
    return RankChange(network, _error(net, tensors, is_plain_tree), maps)


def _projected(net: Network, ranks: Mapping[str, int]) -> tuple[dict[str, BondMap], ...]:
    """Map the bonds of a tree by their projectors."""
    maps: tuple[dict[str, BondMap], ...] = tuple({} for _ in net.legs.terms)
    for edge, columns, rows, batch in projectors(net, ranks):
        maps[edge.child][edge.bond] = BondMap(columns.mT, rows, batch)
        maps[edge.parent][edge.bond] = BondMap(rows, columns.mT, batch)
    return maps


def _selected(net: Network, ranks: Mapping[str, int]) -> tuple[dict[str, BondMap], ...]:
    """Keep some components at every bond; tied bonds keep the same ones."""
    maps: tuple[dict[str, BondMap], ...] = tuple({} for _ in net.legs.terms)
    for bonds in _tied_bonds(net):
        sizes = {ranks[bond] for bond in bonds}
        if len(sizes) > 1:
            raise ValueError(
                f"the bonds {', '.join(bonds)} are one axis of a tied parameter and need one rank; found "
                f"{', '.join(str(ranks[bond]) for bond in bonds)}, in\n    {net.legs}"
            )
        size = sizes.pop()
        if size == net.sizes[bonds[0]]:
            continue
        products = torch.stack([_component_products(net, bond) for bond in bonds]).sum(0)
        rows = torch.eye(len(products)).to(products)[_kept(products, size)]
        for bond in bonds:
            for k in net.legs.carriers[bond]:
                maps[k][bond] = BondMap(rows, rows)
    return maps


def _component_products(net: TensorNetwork, bond: str) -> Tensor:
    """Compute the inner products of the summands of the sum over a bond: (rank, rank)."""
    pieces = pieces_of(net).wide()
    return joined(pieces, pieces.renamed("'", net.open_legs)).contract((bond, f"{bond}'")).detach()


def _kept(products: Tensor, size: int) -> list[int]:
    """Choose the components that stay. The squared norm of the sum of all that are gone is the squared error,
    so one more adds its own square and twice its products with those."""
    kept, gone = list(range(len(products))), torch.zeros_like(products[0])
    while len(kept) > size:
        added = products.diagonal() + 2 * products @ gone
        least = kept.pop(int(added[kept].argmin()))
        gone[least] = 1.0
    return kept


def _tied_bonds(net: TensorNetwork) -> list[tuple[str, ...]]:
    """Divide the bonds into sets that are one axis of a tied parameter; most bonds are alone."""
    sets: dict[str, tuple[str, ...]] = {bond: (bond,) for bond in net.ranks}
    for term, owner in zip(net.legs.terms, net.legs.owners):
        for one, other in zip(term.legs, net.legs.terms[owner].legs):
            if one in sets and other in sets and sets[one] is not sets[other]:
                both = (*sets[other], *sets[one])
                sets |= dict.fromkeys(both, both)
    return list(dict.fromkeys(sets.values()))


def _error(net: Network, tensors: list[Tensor], is_plain_tree: bool) -> float:
    """Compute the relative error of a network in float64. The difference of two trees is a tree, whose norm
    is that of one parameter, without the cancellation of inner products."""
    old = NetworkView(net.legs, wide_copies(net), net.modes)
    new = NetworkView(net.legs, tensors, net.modes)
    if is_plain_tree:
        difference = canonical(direct_sum([old, new], [1.0, -1.0])).tensors[net.legs.zero].norm()
        difference = difference.detach()
    else:
        difference = distance(old, new)
    return float(difference) / (float(norm(old)) or 1.0)
