"""Makes adapters from the parameters of another adapter: on those that are shared, or at all their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..decomp import Legs, Network, StartLike, network
from ._adapter import Adapter
from ._group import Group
from ._plan import Plan, share_input_factor


def start_from(planned: Plan, source: Adapter) -> Plan:
    """Give a plan the values of an adapter as its start.

    Args:
        planned: the plan; it is not changed.
        source: the adapter; its values are copied.

    Raises:
        ValueError: the adapter has another scaling, updates other projections, or has another line or other
            sizes.
    """
    scaling = planned.config.scaling
    if source.scaling != scaling:
        raise ValueError(
            f"the adapter given as init= multiplies its tensor by {source.scaling:g}, and the new one by "
            f"{scaling:g}, which would be another update: use alpha={source.scaling!r}"
        )
    theirs = {group.name: (group, source.network(group)) for group in source.groups}
    networks = {}
    for group in planned.groups:
        own = planned.networks[group.name]
        other, found = theirs.get(group.name, (None, None))
        if other is None or other.meaning != group.meaning:
            raise ValueError(
                f"the adapter given as init= has no network {group.name!r} for the same projections: use its "
                "targets, layers, gqa and acts_on"
            )
        found = _of_line(group, own, found)
        values = [tensor.detach().to(like) for like, tensor in zip(own.stored, found.stored)]
        for like, value in zip(own.stored, values):
            if like.shape != value.shape:
                raise ValueError(
                    f"a parameter of the network {group.name!r} of the adapter given as init= has the shape "
                    f"{tuple(value.shape)}, and this adapter's is to have {tuple(like.shape)}: use its rank"
                )
        first = [values[holder].clone() for holder in own.legs.holders]
        networks[group.name] = Network(own.legs, first, own.modes, sizes=own.sizes)
    _share_residual(planned, networks, "init", shared_only=False)
    return replace(planned, networks=networks, config=replace(planned.config, init="adapter"))


def on_shared(
    planned: Plan, source: Adapter, init: StartLike | None, generator: torch.Generator | None
) -> Plan:
    """Give a plan the parameters that an adapter marks ``(shared)``, frozen.

    Args:
        planned: the plan; it is not changed.
        source: the adapter; its values are copied.
        init: a new start of the parameters that are not shared. None leaves them at the values of the plan,
            which belong to the very parameters that are shared.
        generator: the source of randomness of the start.

    Raises:
        ValueError: the adapter has no shared parameters, or they have another line or other sizes, the
            dtype of the plan would round them, or the plan has other values for them.
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
    _share_residual(planned, networks, "shared", shared_only=True)
    return replace(planned, networks=networks)


def _share_residual(
    planned: Plan, networks: Mapping[str, Network], word: str, *, shared_only: bool
) -> None:
    """Let the networks of a plan share their factor for in, if the plan says so; refuse to change a value."""
    if not planned.config.share_residual:
        return
    before = {name: net.stored for name, net in networks.items()}
    share_input_factor(planned.groups, networks)
    for name, net in networks.items():
        for term, old, new in zip(net.legs.terms, before[name], net.stored):
            if (term.shared or not shared_only) and not torch.equal(old, new):
                raise ValueError(
                    f"with share_residual=True the networks have one parameter for in; found another in "
                    f"the network {name!r} of the adapter given as {word}=. Use share_residual=False"
                )


def _of_line(group: Group, own: Network, other: Network | None) -> Network:
    """Return the other network, or refuse it if it has another line."""
    if other is None or other.legs.unmarked != own.legs.unmarked:
        raise ValueError(
            f"the network {group.name!r} has the legs\n    {own.legs}\nand the one whose parameters it is to "
            f"have\n    {other.legs if other else 'no such network'}\nUse its decomposition, targets and gqa"
        )
    return other


def _on_shared(
    group: Group,
    own: Network,
    others: Mapping[str, Network],
    init: StartLike | None,
    generator: torch.Generator | None,
) -> Network:
    other = _of_line(group, own, others.get(group.name))
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
    started = own
    if init is not None:
        # The line says what is frozen, so that the parameter that starts at zero is one of the adapter's own.
        started = network(
            legs,
            own.shape,
            {**own.ranks, **own.vectors},
            init=init,
            generator=generator,
            device=like.device,
            dtype=like.dtype,
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
        value = value.detach().to(like.device, like.dtype).clone()
        if init is None and mark and not torch.equal(value, tensor):
            raise ValueError(
                f"the adapters given as init= and shared= have different shared parameters in the network "
                f"{group.name!r}: start from one that was trained on those of shared=, such as an adapter of "
                "the bank"
            )
        stored.append(value)
    first = [stored[holder] for holder in legs.holders]  # a tied parameter is one tensor
    return Network(legs, first, own.modes, sizes=own.sizes)
