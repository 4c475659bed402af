"""Head alignment: head h of the tensor changes head h of the projection, and nothing else.

Square weights hide heads that stand on the wrong axis, so nothing here is judged by a shape:
entries are compared one by one, and the change is looked for in the forward of the model.
"""

from functools import cache

import pytest
import torch
from harness import close, each_format, examples, generator, output, put, weight
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES

from lortalib.nn import Site, sites
from lortalib.nn._anatomy import as_stored


@cache
def tiny(name):
    return FAMILIES[name].model()


@cache
def adapted(name, decomposition, gqa):
    """An adapter on the model of its own family, all its parameters random."""
    return put(FAMILIES[name].model(), decomposition, 2, gqa=gqa, alpha=0.7)


CASES = [("Bert", "pool"), ("Llama", "pool"), ("Llama", "split"), ("Mistral", "pool")]
CASES += [("T5", "pool"), ("Conv1D", "pool"), ("Conv1D", "split")]
cases = pytest.mark.parametrize(("name", "gqa"), CASES, ids=lambda case: case)


def group_of(adapter, site):
    return next(group for group in adapter.groups if site in group.sites)


def carriers(network):
    """The parameters that carry the heads, each with the position of that axis."""
    pairs = zip(network.legs.terms, network.tensors)
    return [(p, t.legs.index("head")) for t, p in pairs if "head" in t.legs]


def change_head(network, head, seed):
    """Add noise to the part of every parameter that belongs to one head of the tensor."""
    with torch.no_grad():
        for parameter, axis in carriers(network):
            part = parameter.select(axis, head)
            part += torch.randn(part.shape, generator=generator(seed))


def by_heads(dense, site):
    """A weight (or its change) as (head, component, residual), whatever way it is stored."""
    out_first = dense if site.writer == site.transposed else dense.T
    rows = [out_first[h * site.head_dim : (h + 1) * site.head_dim] for h in range(site.heads)]
    return torch.stack(rows)


@each_format
@cases
@given(data=st.data())
@examples(6)
def test_head_h_of_the_tensor_is_head_h_of_the_weight(name, gqa, decomposition, data):
    adapter = adapted(name, decomposition, gqa)
    site = data.draw(st.sampled_from(adapter.sites))
    network = adapter.network(group := group_of(adapter, site))
    head = data.draw(st.integers(0, group.heads - 1))
    before = adapter.delta(site)
    change_head(network, head, data.draw(st.integers(0, 99)))
    after = adapter.delta(site)
    assert before.shape == weight(tiny(name), site).shape

    own_head = head // (group.heads // site.heads)
    moved = (by_heads(after, site) - by_heads(before, site)).abs()
    for other in range(site.heads):
        if other == own_head:
            assert (moved[other] > 0).float().mean() > 0.9
        else:
            assert moved[other].max() == 0


@each_format
@cases
def test_delta_is_the_dense_tensor_entry_by_entry(name, gqa, decomposition):
    adapter = adapted(name, decomposition, gqa)
    for site in adapter.sites:
        group = group_of(adapter, site)
        dense = adapter.network(group).dense() * adapter.config.alpha
        tensor = dense[group.layers.index(site.layer), :, group.roles.index(site.role)].tolist()
        share = group.heads // site.heads
        expected = torch.full((site.heads * site.head_dim, site.width), float("nan"))
        for h in range(site.heads):
            for j in range(site.head_dim):
                for i in range(site.width):
                    members = [tensor[h * share + k][i][j] for k in range(share)]
                    expected[h * site.head_dim + j, i] = sum(members) / share
        stored_out_in = site.role in "qkv" and name != "Conv1D"
        stored_out_in |= site.role == "o" and name == "Conv1D"
        expected = expected if stored_out_in else expected.T
        assert close(adapter.delta(site), expected, 1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("role", list("qo"))
def test_dense_share_of_a_square_site(role, transposed):
    """Two heads of two at width 4: every axis could be mistaken for another."""
    site = Site("s", 0, role, "p", 2, 2, 2, 4, writer=role == "o", transposed=transposed)
    a, b = torch.randn(3, 4, generator=generator(1)), torch.randn(4, 3, generator=generator(2))
    dense = as_stored(b @ a, site)
    for row in range(4):
        for column in range(4):
            entry = sum(b[row, p] * a[p, column] for p in range(3))
            place = (row, column) if (role == "q") != transposed else (column, row)
            assert torch.isclose(dense[place], entry)


# The same in the forward, which knows nothing of delta


def only_head(adapter, head):
    """Make the tensor zero in all heads but one."""
    with torch.no_grad():
        for group in adapter.groups:
            for parameter, axis in carriers(adapter.network(group)):
                for other in set(range(parameter.shape[axis])) - {head}:
                    parameter.select(axis, other).zero_()


@each_format
@cases
def test_the_hook_moves_one_head_only(name, gqa, decomposition):
    model = tiny(name)
    kept = [site for site in sites(model) if site.layer == 1]
    adapter = put(model, decomposition, 2, gqa=gqa, layers=1)
    head = 1
    only_head(adapter, head)
    try:
        for site in kept:
            group, projection = group_of(adapter, site), model.get_submodule(site.path)
            own_head = head // (group.heads // site.heads)
            mine = slice(own_head * site.head_dim, (own_head + 1) * site.head_dim)
            if site.writer:  # each feature of its input alone
                x = torch.eye(site.heads * site.head_dim)
            else:
                x = torch.randn(5, site.width, generator=generator(3))
            with torch.no_grad():
                adapted_output = projection(x)
                with adapter.disabled():
                    moved = (adapted_output - projection(x)).abs() > 1e-7
            per_feature = moved.any(1) if site.writer else moved.any(0)
            assert per_feature[mine].all()
            assert per_feature.sum() == site.head_dim
    finally:
        adapter.remove()


def context(model, inputs, path):
    """What the output projection at ``path`` reads: the heads of the attention side by side."""
    seen = []
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output(model, inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("role", list("qkv"))
@cases
def test_the_models_own_attention_agrees_which_head_it_is(name, gqa, role, head):
    """Head h of the tensor moves head h of what the model's attention computes, as it lays it out.

    With pooled keys and values it moves the whole group that shares them.
    """
    model = tiny(name)
    inputs = FAMILIES[name].inputs()
    site = next(site for site in sites(model) if site.role == role)
    output_path = next(site for site in sites(model) if site.role == "o").path
    if gqa == "split":
        head = head % site.heads
    before = context(model, inputs, output_path)
    adapter = put(model, "cp", 2, gqa=gqa, targets=[site.path])
    try:
        only_head(adapter, head)
        moved = (context(model, inputs, output_path) - before).abs()
    finally:
        adapter.remove()
    per_head = moved.unflatten(-1, (site.query_heads, -1)).amax((0, 1, 3))
    group = site.query_heads // site.heads
    first = head * group if gqa == "split" else head // group * group
    expected = {head} if group == 1 else set(range(first, first + group))
    assert {h for h, change in enumerate(per_head.tolist()) if change > 1e-6} == expected
