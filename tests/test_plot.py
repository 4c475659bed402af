"""Plots show the numbers that the library computes, in the axes that they are given."""

import math
import sys

import pytest
import torch
from adapted import put
from matplotlib import pyplot
from models import FAMILIES

from lortalib import decomp, plot

SHAPE = {"layer": 3, "in": 6, "out": 5}


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def colours(ax):
    return torch.as_tensor(ax.images[0].get_array().filled(math.nan))


def test_layers_shows_the_norm_of_each_update(llama):
    adapter = put(llama)
    shown = colours(plot.layers(adapter))
    group = adapter.groups[0]
    for site in group.sites:
        row, column = group.roles.index(site.role), group.layers.index(site.layer)
        assert math.isclose(shown[row, column], adapter.delta(site).norm().item(), rel_tol=1e-4)


def test_heads_shows_the_norm_of_each_head(llama):
    adapter = put(llama)
    for role, count in (("q", 4), ("k", 2)):
        shown = colours(plot.heads(adapter, role))
        assert shown.shape[1] == count
        for site in adapter.sites:
            if site.role == role:
                heads = adapter.delta(site).reshape(count, -1).norm(dim=1)
                assert torch.allclose(shown[site.layer].float(), heads.float(), rtol=1e-4)


def test_sites_that_are_not_adapted_stay_empty():
    model = FAMILIES["Llama"].model("ForCausalLM")
    adapter = put(model, targets=lambda site: (site.role, site.layer) != ("k", 1))
    shown = colours(plot.layers(adapter))
    assert shown.isnan().sum() == 1
    assert plot.heads(adapter, "k").images


def test_several_groups_are_told_apart():
    model = FAMILIES["T5"].model("ForConditionalGeneration")
    adapter = put(model)
    assert len(adapter.groups) > 1
    with pytest.raises(ValueError, match=f"{adapter.groups[1].name}"):
        plot.layers(adapter)
    assert plot.layers(adapter, group=adapter.groups[1].name).images
    with pytest.raises(ValueError, match="'nowhere'"):
        plot.layers(adapter, group="nowhere")
    with pytest.raises(ValueError, match="matrix 'x'"):
        plot.heads(adapter, "x")


def test_singular_values_are_relative():
    net = decomp.cp(SHAPE, 2, init="normal", dtype=torch.float64)
    ax = plot.singular_values(net)
    for line, mode in zip(ax.lines, SHAPE):
        axis = list(SHAPE).index(mode)
        unfolded = net.dense().detach().movedim(axis, 0).flatten(1)
        exact = torch.linalg.svdvals(unfolded)
        found = torch.as_tensor(line.get_ydata()).double()
        assert torch.allclose(found[: len(exact)], exact / exact[0], atol=1e-7)


def test_singular_values_of_a_zero_network():
    assert plot.singular_values(decomp.cp(SHAPE, 2)).lines


def test_congruence_is_from_minus_one_to_one():
    net = decomp.cp(SHAPE, 3, init="normal")
    ax = plot.congruence(net)
    assert torch.allclose(colours(ax), decomp.congruence(net), atol=1e-6)
    assert ax.images[0].get_clim() == (-1, 1)
    assert plot.congruence(net, net).get_xlabel() == "component of the other"


def test_ranks_shows_every_row_and_the_suggested_one():
    table = decomp.suggest_rank(torch.randn(4, 5, 6), "cp", (1, 2, 3), modes=("layer", "in", "out"))
    ax = plot.ranks(table)
    assert list(ax.lines[0].get_ydata()) == [row.error for row in table]
    assert list(ax.lines[1].get_ydata()) == [row.held_out for row in table]
    assert ax.lines[2].get_xdata()[0] == table.suggested.parameters
    with pytest.raises(ValueError, match="suggest_rank"):
        plot.ranks(decomp.budget(SHAPE, 100))


def test_given_axes_are_used():
    _, ax = pyplot.subplots()
    assert plot.congruence(decomp.cp(SHAPE, 2, init="normal"), ax=ax) is ax


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(ImportError, match=r'pip install "lortalib\[plots\]"'):
        plot.congruence(decomp.cp(SHAPE, 2, init="normal"))
