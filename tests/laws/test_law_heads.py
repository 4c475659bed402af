"""The law of heads: head h of the tensor is head h of the weight and of the attention, and nothing else."""

import math

import torch
from doors import adapt, over
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, generator
from updates import features


def change_head(network, head):
    """Add noise to the part of every parameter that belongs to one head of the tensor.

    The numbers of a hashed parameter are those of other heads too; there the part changes its signs.
    """
    with torch.no_grad():
        for term, parameter in zip(network.legs.terms, network.stored):
            if "head" in term.legs and term.of:
                part = index_of(network, term).select(term.legs.index("head"), head)
                part.copy_((part + len(parameter)) % (2 * len(parameter)))
            elif "head" in term.legs:
                part = parameter.select(term.legs.index("head"), head)
                part += torch.randn(part.shape, generator=generator(head), dtype=part.dtype)


def index_of(network, term):
    """The entries of a hashed parameter: which number of its vector each is."""
    own = [other for other in network.legs.terms if other.of == term.of]
    shapes = [[network.sizes[leg] for leg in other.legs] for other in own]
    parts = network.get_buffer(f"index_of_{term.of}").split([math.prod(s) for s in shapes])
    return parts[own.index(term)].view(shapes[own.index(term)])


def by_heads(change, site):
    """The change of a whole weight as (head, component, ...), and the rest of the weight."""
    change = change if site.writer == site.transposed else change.mT
    change = change.movedim(-2, 0).flatten(1)
    places = torch.tensor(features(site))
    own = torch.zeros(len(change), dtype=torch.bool).index_fill(0, places, True)
    return change[places].unflatten(0, (site.heads, site.head_dim)), change[~own]


@over("delta", "heads")
@given(data=st.data())
@examples(4)
def test_head_h_of_the_tensor_is_head_h_of_the_weight(door, decomposition, family, data):
    gqa = data.draw(st.sampled_from(["pool", "split"]))
    model = adapt(door, decomposition, family, gqa=gqa)
    site = data.draw(st.sampled_from(model.record.sites))
    group = next(group for group in model.record.groups if site in group.sites)
    head = data.draw(st.integers(0, group.heads - 1))
    before = model.delta(site)
    change_head(model.record.network(group), head)
    moved, rest = by_heads((model.delta(site) - before).detach().abs(), site)
    own = head // (group.heads // site.heads)
    assert (moved[own] > 0).double().mean() > 0.9
    assert moved.amax((1, 2)).count_nonzero() == 1
    assert rest.count_nonzero() == 0
