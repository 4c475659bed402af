"""Contracts one parameter of a network into another, which leaves the tensor as it is."""

from __future__ import annotations

import math
from dataclasses import replace

from ._arguments import takes_network
from ._einsum import Names, contract
from ._legs import Legs
from ._pieces import position_of
from ._tensor_network import NetworkView, TensorNetwork


@takes_network
def absorb(net: TensorNetwork, parameter: str | int) -> TensorNetwork:
    """Contract one parameter into a neighbour; the tensor stays the same, with one parameter less.

    After a mode was selected, the parameter that carried it alone has only bonds. Once a neighbour has
    absorbed it, the line is again that of the format over the modes that are left.

    Args:
        net: the network.
        parameter: a name of ``net.names``, or a position in the line.

    Returns:
        A network over the same modes, with live gradients. The neighbour is a trainable parameter with a
        common bond: the one that grows least, of several the smallest. If there is none, or the parameter
        stands several times in the line, ``net`` itself is returned.

    Raises:
        KeyError: no such parameter.

    Example:
        >>> from lortalib.decomp import cp, tt
        >>> net = tt({"in": 8, "layer": 3, "task": 2, "out": 4}, 2, init="normal").select(task=1)
        >>> str(net.legs), str(absorb(net, 2).legs)
        ('in a, layer a b, b c, out c', 'in a, layer a b, out b')
        >>> net = cp({"in": 8, "out": 4, "adapter": 2}, 3, init="normal").select(adapter=0)
        >>> str(net.legs), str(absorb(net, 2).legs)
        ('in r, out r, r', 'in r, out r')
    """
    k = position_of(net, parameter)
    own, terms = net.legs.terms[k], net.legs.terms
    once = [j for j in range(len(terms)) if net.legs.owners.count(net.legs.owners[j]) == 1]
    bonds = {leg for leg in own.legs if leg not in net.open_legs}
    found = []
    for j in once:
        if j != k and not terms[j].frozen and bonds.intersection(terms[j].legs):
            legs = _joined_legs(net, k, j)
            size = math.prod(net.sizes[leg] for leg in legs)
            found.append((size - net.tensors[j].numel(), size, j, legs))
    if k not in once or not found:
        return net
    *_, j, legs = min(found)
    both = (terms[j].legs, own.legs)
    tensor = contract(both, (net.tensors[j], net.tensors[k]), legs, net.sizes)
    line = [
        replace(term, legs=legs, spans=()) if at == j else term for at, term in enumerate(terms)
    ]
    tensors = [tensor if at == j else each for at, each in enumerate(net.tensors)]
    del line[k], tensors[k]
    sizes = {leg: net.sizes[leg] for leg in net.open_legs}
    return NetworkView(Legs(tuple(line)).with_factors(sizes), tensors, net.modes)


def _joined_legs(net: TensorNetwork, k: int, j: int) -> Names:
    """Return the legs of parameter j once it has absorbed parameter k: those of k that are new take the
    place of the first bond that is summed."""
    terms = net.legs.terms
    needed = {leg for at, term in enumerate(terms) if at not in (j, k) for leg in term.legs}
    needed.update(net.open_legs)
    fresh = [leg for leg in terms[k].legs if leg in needed and leg not in terms[j].legs]
    legs: list[str] = []
    for leg in terms[j].legs:
        is_summed = leg in terms[k].legs and leg not in needed
        legs += fresh if is_summed else [leg]
        fresh = [] if is_summed else fresh
    return tuple(legs + fresh)
