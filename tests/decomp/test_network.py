"""The laws of a network, over every registered format and over random lines of legs."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import close
from strategies import (
    KINDS,
    build,
    examples,
    indices,
    networks,
    numel,
    selections,
    slices,
    small,
)
from torch.func import functional_call

from lortalib.decomp import Cut, LegsError

over_kinds = pytest.mark.parametrize("kind", KINDS)


def loss_gradients(value, net):
    trainable = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(value, trainable, materialize_grads=True, allow_unused=True)


# --- dense, select, cut against the definition ----------------------------------------------------


@over_kinds
@examples(20)
@given(data=st.data())
def test_dense_is_the_sum_over_all_bonds(kind, data):
    net = data.draw(networks(kind))
    dense = net.dense()
    assert dense.shape == tuple(net.shape.values())
    close(dense, reference.dense(net))
    if numel(net) < 2000:
        index = {
            mode: k % net.shape[mode] for mode, k in data.draw(indices(net, net.modes)).items()
        }
        at = tuple(index[mode] for mode in net.modes)
        assert dense[at].item() == pytest.approx(reference.entry(net, index), rel=1e-9, abs=1e-9)


@over_kinds
@examples(20)
@given(data=st.data())
def test_select_then_dense_is_dense_then_index(kind, data):
    net = data.draw(networks(kind))
    index = data.draw(selections(net))
    view = net.select(**index)
    at = tuple(index.get(mode, slice(None)) for mode in net.modes)
    assert view.modes == tuple(mode for mode in net.modes if mode not in index)
    close(view.dense(), reference.dense(net)[at])
    again = data.draw(selections(view))
    both = tuple({**index, **again}.get(mode, slice(None)) for mode in net.modes)
    close(view.select(**again).dense(), reference.dense(net)[both])


@over_kinds
@examples(25)
@given(data=st.data())
def test_cut_is_the_slice_as_a_matrix(kind, data):
    net = data.draw(networks(kind))
    index = data.draw(slices(net))
    view = net.select(**index)
    at = tuple(index.get(mode, slice(None)) for mode in net.modes)
    cut = view.cut()
    assert isinstance(cut, Cut)
    close(cut.B @ cut.A, reference.matrix(reference.dense(net)[at], view.modes))
    rows = view.shape.get("head", 1) * view.shape["out"]
    assert cut.A.shape == (cut.A.shape[0], view.shape["in"])
    assert cut.B.shape == (rows, cut.A.shape[0])


@over_kinds
@examples(25)
@given(data=st.data())
def test_rank_of_the_cut_is_the_smallest_product_of_crossing_bonds(kind, data):
    net = data.draw(networks(kind))
    view = net.select(**data.draw(slices(net)))
    p = view.cut().A.shape[0]
    assert p == reference.smallest_crossing(view)

    def bonds_of(sides):
        return math.prod(
            view.sizes[leg] for leg in set().union(*sides) if leg not in view.open_legs
        )

    terms = [set(term.legs) for term in view.legs.terms]
    outs = {leg for mode in ("head", "out") for leg in reference.factors(view, mode)}
    at_in = [term for term in terms if term.intersection(reference.factors(view, "in"))]
    at_out = [term for term in terms if term & outs]
    if not any(term in at_out for term in at_in):
        assert p <= bonds_of(at_in)
        assert p <= bonds_of(at_out)


def test_cut_takes_the_side_of_smaller_rank():
    ranks = {"p": 4, "q": 2, "s": 2, "t": 1, "u": 1}
    wide = build("tucker", (2, 2, 2, 8, 8), ranks | {"p": 8, "q": 2, "t": 2, "u": 2})
    assert wide.select(layer=0, matrix=0).cut().A.shape[0] == 2 * 2  # q s, not p = 8
    narrow = build("tucker", (2, 2, 2, 8, 8), ranks | {"p": 3, "q": 4, "t": 2, "u": 2})
    assert narrow.select(layer=0, matrix=0).cut().A.shape[0] == 3  # p, not q s = 8


def test_changing_one_head_changes_the_rows_of_that_head_only():
    net = build("cp", (2, 3, 2, 5, 4), 2)
    before = net.select(layer=1, matrix=0).cut()
    with torch.no_grad():
        net.head_r[1] += 1
    after = net.select(layer=1, matrix=0).cut()
    changed = (after.B @ after.A != before.B @ before.A).all(dim=1)
    assert changed.tolist() == [4 <= row < 8 for row in range(12)]


# --- gradients ------------------------------------------------------------------------------------


@over_kinds
@examples(20)
@given(data=st.data())
def test_gradients_through_cut_are_those_through_dense(kind, data):
    net = data.draw(networks(kind))
    index = data.draw(slices(net))
    view = net.select(**index)
    a, b = view.cut()
    weight = torch.randn(b.shape[0], a.shape[1], dtype=torch.float64)
    at = tuple(index.get(mode, slice(None)) for mode in net.modes)
    order = [view.modes.index(mode) for mode in ("head", "out", "in") if mode in view.modes]
    dense = net.dense()[at].permute(order).reshape(weight.shape)
    through_cut = loss_gradients((weight * (b @ a)).sum(), net)
    through_dense = loss_gradients((weight * dense).sum(), net)
    trained = {net.legs.holders[k] for k, t in enumerate(net.legs.terms) if not t.frozen}
    assert len(through_cut) == len(trained) > 0
    for found, expected in zip(through_cut, through_dense):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Slice(torch.nn.Module):
    """The product of one cut, as a module, so that its parameters can be given from outside."""

    def __init__(self, net, **index):
        super().__init__()
        self.net, self.index = net, index

    def forward(self):
        a, b = self.net.select(**self.index).cut()
        return b @ a


@pytest.mark.parametrize("name", ["cp", "tucker", "ring", "lora", "lora_xs"])
def test_gradcheck_of_dense_and_cut(name):
    net = build(name, (2, 2, 1, 3, 2), 2)
    for module in (net, Slice(net, layer=1, matrix=0)):
        names, tensors = zip(*module.named_parameters())
        trainable = tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)

        def value(*given, names=names, module=module):
            return functional_call(module, dict(zip(names, given)), ())

        assert torch.autograd.gradcheck(value, trainable)


@pytest.mark.parametrize("name", ["lora_xs", "vera"])
def test_frozen_parameters_get_no_gradient_and_are_not_counted(name):
    net = small(name)
    a, b = net.select(layer=0, matrix=0).cut()
    (net.dense().sum() + (b @ a).sum()).backward()
    frozen = [term.frozen for term in net.legs.terms]
    assert [tensor.grad is None for tensor in net.tensors] == frozen
    assert any(frozen)
    sizes = [tensor.numel() for tensor in net.tensors]
    assert net.count() == sum(size for size, f in zip(sizes, frozen) if not f)
    assert net.count(trainable_only=False) == sum(sizes)


@over_kinds
@examples(10)
@given(data=st.data())
def test_count_is_the_number_of_trainable_parameters(kind, data):
    net = data.draw(networks(kind))
    assert net.count() == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert net.count(trainable_only=False) == sum(p.numel() for p in net.parameters())
    # The slices of a hashed parameter have entries, not numbers of its vector.
    most = sum(t.numel() for t in net.tensors) if net.vectors else net.count()
    assert net.select(**data.draw(slices(net))).count() <= most


# --- errors ---------------------------------------------------------------------------------------


def test_select_refuses_what_it_cannot_find():
    net = small("cp")
    with pytest.raises(KeyError, match=r"cannot select 'task': the modes .* layer, head, matrix"):
        net.select(task=0)
    with pytest.raises(KeyError, match="cannot select 'r'"):
        net.select(r=0)
    for position in (2, -3):
        with pytest.raises(
            IndexError, match=f"layer={position} is outside the mode 'layer' of size"
        ):
            net.select(layer=position)
    with pytest.raises(KeyError, match="cannot select 'layer'"):
        net.select(layer=0).select(layer=0)


def test_cut_says_which_modes_are_left():
    net = small("cp")
    with pytest.raises(LegsError, match=r"net\.select\(layer=0, matrix=0\)\.cut\(\)"):
        net.cut()
    with pytest.raises(LegsError, match=r"net\.select\(matrix=0\)\.cut\(\)"):
        net.select(layer=0).cut()
    for gone in ({"in": 0}, {"out": 0}):
        with pytest.raises(LegsError, match="a cut needs the modes in, out"):
            net.select(layer=0, matrix=0, **gone).cut()


@over_kinds
@examples(10)
@given(data=st.data())
def test_a_selection_is_the_same_as_a_mapping_as_keywords_and_as_both(kind, data):
    net = data.draw(networks(kind))
    index = data.draw(selections(net))
    named = data.draw(st.sets(st.sampled_from([*index]))) if index else set()
    expected = net.select(**index).dense()
    assert net.select(index).dense().equal(expected)
    mapping = {mode: at for mode, at in index.items() if mode not in named}
    assert net.select(mapping, **{mode: index[mode] for mode in named}).dense().equal(expected)


def test_in_is_selected_by_a_mapping():
    net = small("cp")
    found = net.select({"in": 1}, layer=0)
    assert "in" not in found.modes
    close(found.dense(), reference.dense(net)[0, ..., 1, :])
    assert net.select().dense().equal(net.dense())
    with pytest.raises(TypeError, match="'layer' twice, in the mapping and as a keyword"):
        net.select({"layer": 0}, layer=1)
    with pytest.raises(TypeError, match=r"select takes a mapping .*; found int. Try select\("):
        net.select(0)
    with pytest.raises(KeyError, match="cannot select 'task': the modes of this network are"):
        net.select({"task": 0})


@over_kinds
@examples(5)
@given(data=st.data())
def test_autocast_changes_neither_values_nor_gradients(kind, data):
    net = data.draw(networks(kind)).float()
    part = data.draw(selections(net))
    found = []
    for on in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            dense, cut = net.dense(), net.select(**part).dense()
            values = dense.square().sum() + cut.sum()
        assert dense.dtype == cut.dtype == torch.float32
        found.append([values, *loss_gradients(values, net)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
