"""Takes the network of one adapter, or of all as tasks, out of a network with a mode for adapters."""

from __future__ import annotations

from dataclasses import replace

from ...decomp import Legs, Network, Shape, TensorNetwork, absorb, get_format
from .._task_lines import TASK


def slice_of(network: Network, mode: str, position: int, decomposition: str) -> Network:
    """Take one adapter out: a network over the other modes, with parameters of its own.

    Parameters that are left with bonds alone are absorbed into others. If the line is then that of the
    format over the other modes, its bonds get the format's names.

    Args:
        network: a network.
        mode: the mode that numbers the adapters; empty if there is none.
        position: the position of the adapter in it.
        decomposition: the name of the format, or the line of legs.
    """
    view: TensorNetwork = network
    if mode:
        view = network.select({mode: position})
        for k in reversed(network.legs.carriers[mode]):
            if not set(view.legs.terms[k].legs) & set(view.open_legs):
                view = absorb(view, k)
    legs = _renamed(view.legs, get_format(decomposition).legs(view.shape), view.shape)
    copies = [tensor.detach().clone() for tensor in view.tensors]
    return Network(legs, [copies[owner] for owner in legs.owners], view.modes)


def over_tasks(network: Network, mode: str) -> Network:
    """Take all adapters: a network with parameters of its own, whose mode ``task`` numbers them.

    Args:
        network: a network.
        mode: the mode that numbers the adapters.
    """
    copies = [tensor.detach().clone() for tensor in network.tensors]
    modes = [TASK if name == mode else name for name in network.modes]
    legs = line_over_tasks(network.legs, mode)
    return Network(legs, [copies[owner] for owner in legs.owners], modes)


def line_over_tasks(legs: Legs, mode: str) -> Legs:
    """Write a line with the leg ``task`` in place of another mode.

    Args:
        legs: the line.
        mode: the mode that numbers the adapters.

    Example:
        >>> str(line_over_tasks(Legs.parse("in p, adapter layer p q, out q"), "adapter"))
        'in p, task layer p q, out q'
    """

    def name(leg: str) -> str:
        own, dot, place = leg.partition(".")
        return TASK + dot + place if own == mode else leg

    return Legs(
        tuple(
            replace(
                term,
                legs=tuple(map(name, term.legs)),
                factors=tuple((name(leg), size) for leg, size in term.factors),
                spans=(),
            )
            for term in legs.terms
        )
    )


def _renamed(legs: Legs, wanted: Legs, shape: Shape) -> Legs:
    """Rename the bonds to those of another line, if the lines are then the same; else return them as they
    are."""
    if len(legs.terms) != len(wanted.terms):
        return legs
    names = {mode: mode for mode in shape}
    for term, other in zip(legs.terms, wanted.terms):
        if len(term.legs) != len(other.legs):
            return legs
        for leg, name in zip(term.legs, other.legs):
            names.setdefault(leg, name)
    terms = (replace(t, legs=tuple(names[leg] for leg in t.legs), spans=()) for t in legs.terms)
    found = Legs(tuple(terms))
    return found if str(found) == str(wanted) and len(set(names.values())) == len(names) else legs
