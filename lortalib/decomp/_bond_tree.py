"""Walks the tree that the bonds of a line form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ._notation import Term


class Edge(NamedTuple):
    """A bond between two parameters of a tree.

    Attributes:
        child: the position of the parameter that is farther from the root.
        parent: the position of the other one.
        bond: the name of the bond.
    """

    child: int
    parent: int
    bond: str


def bond_tree(
    terms: Sequence[Term], carriers: Mapping[str, Sequence[int]], bonds: Sequence[str], root: int
) -> tuple[Edge, ...]:
    """List the bonds of a tree, those of children before those of their parents.

    Args:
        terms: the terms of the line.
        carriers: the positions of the terms with each leg.
        bonds: the legs that are summed over.
        root: the position of the root.

    Raises:
        ValueError: the bonds do not form a tree that contains every parameter.
    """
    line = ", ".join(map(str, terms))
    met, edges = [root], list[Edge]()
    for near in met:
        for bond in terms[near].legs:
            if bond not in bonds or any(bond == edge.bond for edge in edges):
                continue
            ends = [k for k in carriers[bond] if k != near]
            if len(ends) > 1 or ends[0] in met:
                raise ValueError(
                    f"the bonds form no tree, such as those of 'tucker', 'tt', 'lotr' or 'lora': {bond!r} "
                    f"closes a loop or joins {len(ends) + 1} parameters, in\n    {line}"
                )
            edges.append(Edge(ends[0], near, bond))
            met.append(ends[0])
    if len(met) < len(terms):
        raise ValueError(f"the parameters fall into pieces without a common bond, in\n    {line}")
    return tuple(reversed(edges))
