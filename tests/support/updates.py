"""What an adapter adds to each weight, by definition: entry by entry, with gradients.

Slow, and sharing no code with the library: a network is the sum over its bonds of products of entries, and
every feature of a weight is looked up by its head, its component and, in a fused weight, its place.
"""

from itertools import product
from math import prod

import torch
from reference import factors


def dense_tensor(network):
    """The tensor of a network over `network.modes`: one axis for each leg, summed over the bonds.

    A mode that is no leg is the row-major product of its factors, as ``in`` is of ``in.1`` and ``in.2``.
    """
    terms = [(term.legs, tensor) for term, tensor in zip(network.legs.terms, network.tensors)]
    legs_of = {mode: factors(network, mode) for mode in network.modes}
    modes = [leg for legs in legs_of.values() for leg in legs]
    bonds = dict.fromkeys(leg for legs, _ in terms for leg in legs if leg not in modes)
    axes = [*modes, *bonds]
    total = torch.ones((), dtype=terms[0][1].dtype)
    for legs, tensor in terms:
        order = sorted(range(len(legs)), key=lambda k: axes.index(legs[k]))
        sizes = [network.sizes[leg] if leg in legs else 1 for leg in axes]
        total = total * tensor.permute(order).reshape(sizes)
    total = total.sum(tuple(range(len(modes), len(axes)))) if bonds else total
    shape = [prod(network.sizes[leg] for leg in legs) for legs in legs_of.values()]
    return total.reshape(shape)


def features(site):
    """Where each feature of a site lies on the feature axis of its weight: by head, then by component."""
    if site.rows is None:
        return list(range(site.heads * site.head_dim))
    places = product(*(range(size) for size, _ in site.rows.dims))
    strides = [stride for _, stride in site.rows.dims]
    return [site.rows.offset + sum(k * s for k, s in zip(place, strides)) for place in places]


def stream_update(group, network, site, weight):
    """The unscaled change of a weight whose module reads x + x S, or writes y + y S, as it is stored."""
    sizes = ("layer", "expert", "matrix", "in", "out")
    order = [network.modes.index(mode) for mode in sizes if mode in network.modes]
    tensor = dense_tensor(network).permute(order)
    if "expert" not in network.modes:
        tensor = tensor.unsqueeze(1)
    changes = tensor[group.layers.index(site.layer), :, group.roles.index(site.role)]
    weight = weight.detach().to(tensor.dtype)
    found = []
    for change, own in zip(changes, weight if site.experts else [weight]):
        by_output = own.mT if site.transposed else own  # (features written, features read)
        moved = change.mT @ by_output if site.writer else by_output @ change.mT
        found.append(moved.mT if site.transposed else moved)
    return torch.stack(found) if site.experts else found[0]


def update(group, network, site):
    """The unscaled change of the whole weight of a site, as it is stored."""
    sizes = ("layer", "expert", "head", "matrix", "out", "in")
    order = [network.modes.index(mode) for mode in sizes if mode in network.modes]
    tensor = dense_tensor(network).permute(order)
    if "expert" not in network.modes:
        tensor = tensor.unsqueeze(1)
    tensor = tensor[group.layers.index(site.layer), :, :, group.roles.index(site.role)]
    share, places = group.heads // site.heads, features(site)
    rows = [tensor.new_zeros(len(tensor), site.width)] * (site.fused or len(places))
    for h in range(site.heads):
        for j in range(site.head_dim):
            own = [tensor[:, h * share + k, j] for k in range(share)]
            rows[places[h * site.head_dim + j]] = sum(own) / share
    whole = torch.stack(rows, dim=1)
    features_first = site.writer == site.transposed
    whole = whole if features_first else whole.mT
    return whole if site.experts else whole[0]


def updates(adapter, plain):
    """What an adapter adds to each weight of a bare model, by the parameter's name in it."""
    found = {}
    for group in adapter.groups:
        for site in group.sites:
            name = f"{site.path}.{site.parameter}"
            network = adapter.network(group)
            if group.on_stream:
                own = stream_update(group, network, site, plain.get_parameter(name))
            else:
                own = update(group, network, site)
            own = adapter.scaling * own
            found[name] = found[name] + own if name in found else own
    return found


def dense_output(plain, added, inputs):
    """The first output of a bare model whose weights have these updates."""
    weights = {name: plain.get_parameter(name) + update for name, update in added.items()}
    return torch.func.functional_call(plain, weights, (), inputs)[0]
