"""Head alignment: head h of the tensor changes head h of the projection, and nothing else.

Square weights hide heads that stand on the wrong axis, so nothing here is judged by a shape:
entries are compared one by one, and the change is looked for in the forward of the model.
"""

from functools import cache

import pytest
import torch
from adapted import output, put
from models import FAMILIES
from strategies import generator

from lortalib.nn import Site, sites
from lortalib.nn._anatomy import as_stored


@cache
def tiny(name):
    return FAMILIES[name].model()


CASES = [("Bert", "pool"), ("Llama", "pool"), ("Llama", "split"), ("Mistral", "pool")]
CASES += [("T5", "pool"), ("Conv1D", "pool"), ("Conv1D", "split")]
cases = pytest.mark.parametrize(("name", "gqa"), CASES, ids=lambda case: case)


def group_of(adapter, site):
    return next(group for group in adapter.groups if site in group.sites)


def carriers(network):
    """The parameters that carry the heads, each with the position of that axis."""
    pairs = zip(network.legs.terms, network.tensors)
    return [(p, t.legs.index("head")) for t, p in pairs if "head" in t.legs]


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


@pytest.mark.parametrize("decomposition", ["cp", "tucker", "lora"])
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
