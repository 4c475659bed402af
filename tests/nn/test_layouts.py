"""Fused projections: head h of T is head h of the fused weight, in every layout, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lortalib import decomp
from lortalib.nn import Adapter, AdapterConfig, Group
from lortalib.nn._anatomy import as_stored
from lortalib.nn._anatomy.rules import LAYOUTS, BlockRule
from lortalib.nn._anatomy.site import FeatureRows, Site, feature_rows
from lortalib.nn._forward import ModuleUpdate
from lortalib.nn._trained_modules import TrainedModules

HEADS_OF = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}


def row(layout, role, head, j, heads, kv_heads, dim):
    """Row of component j of a head, written down again from what the models do."""
    group = heads // kv_heads
    if layout == "contiguous":
        return {"q": 0, "k": heads * dim, "v": (heads + kv_heads) * dim}[role] + head * dim + j
    if layout == "per_head":
        return (head * 3 + "qkv".index(role)) * dim + j
    if layout == "per_group":
        if role == "q":
            return ((head // group) * (group + 2) + head % group) * dim + j
        return (head * (group + 2) + group + "kv".index(role)) * dim + j
    quarter = heads // 4
    return ((head // quarter) * 3 + "qvk".index(role)) * quarter * dim + (head % quarter) * dim + j


@st.composite
def fused_blocks(draw):
    """A layout, sizes that it allows, and the sites of one fused module."""
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    grouped = layout in ("contiguous", "per_group")
    kv_heads = draw(st.integers(1, 3)) if grouped else 4 * draw(st.integers(1, 2))
    heads = kv_heads * (draw(st.integers(1, 3)) if grouped else 1)
    dim, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    counts = {"heads": heads, "kv_heads": kv_heads}
    transposed = draw(st.booleans())
    rows = LAYOUTS[layout](heads, kv_heads, dim, dim)
    sites = [
        Site(
            "s", 0, role, "m", counts[HEADS_OF[role]], heads, dim, width, False, transposed,
            rows=rows[role], fused=(heads + 2 * kv_heads) * dim,
        )
        for role in "qkv"
    ]  # fmt: skip
    return layout, heads, kv_heads, dim, width, sites


@settings(max_examples=60, deadline=None)
@given(block=fused_blocks(), data=st.data())
def test_a_head_of_the_tensor_is_that_head_of_the_fused_weight(block, data):
    layout, heads, kv_heads, dim, _, sites = block
    group = Group("g", heads, tuple(sites), (0,), ("q", "k", "v"))
    net = decomp.cp(group.shape, 2, init="normal", dtype=torch.float64)
    head = data.draw(st.integers(0, heads - 1))
    site = data.draw(st.sampled_from(sites))
    before = as_stored(group.dense(net, site), site).detach()
    with torch.no_grad():
        net.head_r[head] += 1
    moved = as_stored(group.dense(net, site), site).detach() - before
    moved = moved.mT if site.transposed else moved
    own = head if site.heads == heads else head // (heads // kv_heads)
    expected = {row(layout, site.role, own, j, heads, kv_heads, dim) for j in range(dim)}
    assert set(moved.abs().sum(1).nonzero().flatten().tolist()) <= expected
    assert moved.abs().sum() > 0


@settings(max_examples=40, deadline=None)
@given(block=fused_blocks())
def test_rows_of_a_layout_are_those_of_the_reference_and_fill_the_output(block):
    layout, heads, kv_heads, dim, _, sites = block
    taken = []
    for site in sites:
        rows = site.rows.index().tolist()
        pairs = [(h, j) for h in range(site.heads) for j in range(dim)]
        assert rows == [row(layout, site.role, h, j, heads, kv_heads, dim) for h, j in pairs]
        taken += rows
    assert sorted(taken) == list(range((heads + 2 * kv_heads) * dim))


@settings(max_examples=40, deadline=None)
@given(block=fused_blocks(), some=st.booleans())
def test_the_hook_adds_what_the_dense_update_would(block, some):
    _, heads, _, _, width, sites = block
    group = Group("g", heads, tuple(sites), (0,), ("q", "k", "v"))
    net = decomp.tucker(group.shape, 1, init="normal", dtype=torch.float64)
    chosen = sites[::2] if some else sites
    x = torch.randn(5, width, dtype=torch.float64)
    y = torch.randn(5, sites[0].fused, dtype=torch.float64)
    dense = sum(as_stored(group.dense(net, site), site) for site in chosen) * 1.5
    dense = dense.mT if sites[0].transposed else dense
    model = torch.nn.Module()
    model.m = torch.nn.Identity()
    plan = AdapterConfig("tucker", 1.5, 1.5, 0.0, "pool", "normal")
    adapter = Adapter("a", plan, (group,), {"g": net}, TrainedModules())
    adapter.active = True
    added = ModuleUpdate(adapter, chosen)(x, y) - y
    torch.testing.assert_close(added, x @ dense.mT)


def test_rows_join_dimensions_that_touch():
    assert feature_rows(3, (4, 2), (2, 1)) == FeatureRows(3, ((8, 1),))
    assert feature_rows(0, (1, 7), (5, 1)) == FeatureRows(0, ((5, 1),))
    assert FeatureRows(1, ((2, 6), (3, 1))).index().tolist() == [1, 2, 3, 7, 8, 9]


class MyAttention(torch.nn.Module):
    """A fused block of remote code."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv = torch.nn.Linear(8, 24)
        self.proj = torch.nn.Linear(8, 8)


def test_an_unknown_fused_layout_is_refused_until_it_is_declared():
    from lortalib.nn import UnsupportedModelError, sites

    model = torch.nn.Sequential(MyAttention())
    with pytest.raises(UnsupportedModelError, match=r"BlockRule\('MyAttention', fused="):
        sites(model)
    found = sites(model, rules=BlockRule("MyAttention", fused="per_head"))
    assert [site.rows.index().tolist()[:5] for site in found[:3]] == [
        [0, 1, 2, 3, 12], [4, 5, 6, 7, 16], [8, 9, 10, 11, 20],
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"unknown layout 'by_magic'.*'per_head'"):
        BlockRule("MyAttention", fused="by_magic")
    magic = BlockRule("MyAttention", fused=lambda module: "by_magic")
    with pytest.raises(UnsupportedModelError, match=r"unknown layout 'by_magic'.*'per_head'"):
        sites(model, rules=magic)
