"""Makes adapters on the shared parameters of another adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..decomp import Legs, Network, StartLike, network
from ._adapter import Adapter
from ._group import Group
from ._plan import Plan, share_input_factor


def on_shared(
    planned: Plan, source: Adapter, init: StartLike, generator: torch.Generator | None
) -> Plan:
    """Give a plan the parameters that an adapter marks ``(shared)``, frozen, and a new start for the others.

    Args:
        planned: the plan; it is not changed.
        source: the adapter; its values are copied.
        init: the start of the parameters that are not shared.
        generator: the source of randomness of the start.

    Raises:
        ValueError: the adapter has no shared parameters, or they have another line or other sizes, or the
            dtype of the plan would round them.
    """
    theirs = {group.name: source.network(group) for group in source.groups}
    if not any(term.shared for network in theirs.values() for term in network.legs.terms):
        raise ValueError(
            "the adapter given as shared= has no parameter marked (shared): make it with shared=('in', "
            "'out'), or put it into a bank that is made so, and give the bank"
        )
    networks = {
        group.name: _on_shared(group, planned.networks[group.name], theirs, init, generator)
        for group in planned.groups
    }
    if planned.config.share_residual:
        before = {name: net.stored for name, net in networks.items()}
        share_input_factor(planned.groups, networks)
        for name, net in networks.items():
            for term, old, new in zip(net.legs.terms, before[name], net.stored):
                if term.shared and not torch.equal(old, new):
                    raise ValueError(
                        f"with share_residual=True the networks have one parameter for in; found another in "
                        f"the network {name!r} of the adapter given as shared=. Use share_residual=False"
                    )
    return replace(planned, networks=networks)


def _on_shared(
    group: Group,
    own: Network,
    others: Mapping[str, Network],
    init: StartLike,
    generator: torch.Generator | None,
) -> Network:
    other = others.get(group.name)
    if other is None or other.legs.unmarked != own.legs.unmarked:
        raise ValueError(
            f"the network {group.name!r} has the legs\n    {own.legs}\nand the one whose parameters it is to "
            f"share\n    {other.legs if other else 'no such network'}\nUse its decomposition, targets and gqa"
        )
    marks = [term.shared for term in other.legs.terms]
    legs = Legs(
        tuple(
            replace(
                term, frozen=term.frozen or mark, zero=term.zero and not mark, shared=mark, spans=()
            )
            for term, mark in zip(own.legs.terms, marks)
        )
    )
    like = own.stored[0]
    ranks = {**own.ranks, **own.vectors}
    # The line says what is frozen, so that the parameter that starts at zero is one of the adapter's own.
    started = network(
        legs, own.shape, ranks, init=init, generator=generator, device=like.device, dtype=like.dtype
    )
    stored = []
    for tensor, given, mark in zip(started.stored, other.stored, marks):
        value = given if mark else tensor
        if value.shape != tensor.shape:
            raise ValueError(
                f"a shared parameter of the network {group.name!r} has the shape {tuple(value.shape)}, and "
                f"this adapter's is to have {tuple(tensor.shape)}: use the rank and layers of the other"
            )
        if value.dtype != like.dtype and not torch.equal(
            value, value.to(like.dtype).to(value.dtype)
        ):
            raise ValueError(
                f"dtype={like.dtype} would round the shared parameters of the network {group.name!r}, which "
                f"are {value.dtype}, so the adapter could not go to a bank that has them: use "
                f"dtype={value.dtype}, and bank(..., dtype={like.dtype}) for a small bank"
            )
        stored.append(value.detach().to(like.device, like.dtype).clone())
    first = [stored[holder] for holder in legs.holders]  # a tied parameter is one tensor
    return Network(legs, first, own.modes, sizes=own.sizes)
