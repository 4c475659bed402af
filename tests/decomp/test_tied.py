"""A parameter used twice: one tensor, one gradient, and what cannot be tied."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import dense
from strategies import examples, generator, seeds

from lortalib import decomp
from lortalib.decomp import (
    Legs,
    LegsError,
    Network,
    direct_sum,
    indscal,
    network,
    rescal,
    start_along,
)

SHAPE = {"layer": 2, "matrix": 3, "in": 4, "out": 4}
LINES = [
    "in r, out r (tied), layer matrix r",
    "in p, out q (tied), layer matrix p q",
    "layer in r, layer out r (tied), matrix r",
    "in r (frozen), out r (tied), layer matrix r",
]
over_lines = pytest.mark.parametrize("line", LINES)


def drawn(line, rank=3, seed=0):
    return network(line, SHAPE, rank, init="normal", generator=generator(seed), dtype=torch.float64)


@over_lines
@examples(5)
@given(seed=seeds, rank=st.integers(1, 3))
def test_the_tensor_is_that_of_the_untied_line_with_one_parameter_given_twice(line, seed, rank):
    net = drawn(line, rank, seed)
    untied = Network(line.replace(" (tied)", ""), [t.clone() for t in net.tensors], net.modes)
    torch.testing.assert_close(net.dense(), untied.dense(), rtol=1e-12, atol=1e-12)
    by_index = torch.from_numpy(dense(net))
    torch.testing.assert_close(net.dense().detach(), by_index, rtol=1e-12, atol=1e-12)
    assert net.tensors[0] is net.tensors[1]
    assert net.count(False) == untied.count(False) - net.tensors[0].numel()
    assert len(list(net.parameters())) == len(net.tensors) - 1
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert net.count() == trained


@over_lines
def test_its_gradient_is_the_sum_of_those_of_both_terms(line):
    net = drawn(line)
    untied = Network(
        line.replace(" (tied)", ""), [t.detach().clone() for t in net.tensors], net.modes
    )
    weight = torch.randn(net.dense().shape, generator=generator(1), dtype=torch.float64)
    (net.dense() * weight).sum().backward()
    (untied.dense() * weight).sum().backward()
    one, two, core = (t.grad for t in untied.tensors)
    torch.testing.assert_close(net.tensors[2].grad, core)
    if net.legs.terms[0].frozen:
        assert net.tensors[0].grad is None
    else:
        torch.testing.assert_close(net.tensors[0].grad, one + two)


@over_lines
def test_it_is_saved_moved_and_pickled_once(line):
    net = drawn(line)
    assert len(net.state_dict()) == len(net.tensors) - 1
    again = pickle.loads(pickle.dumps(net))
    assert again.tensors[0] is again.tensors[1]
    again.to(torch.float32)
    assert again.tensors[0] is again.tensors[1]
    assert torch.equal(again.dense(), again.dense())
    other = drawn(line, seed=1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.dense(), net.dense())


def test_an_indscal_slice_is_symmetric_and_a_rescal_slice_need_not_be():
    dense = indscal(SHAPE, 2, init="normal", generator=generator()).dense()
    torch.testing.assert_close(dense, dense.mT)
    dense = rescal(SHAPE, 2, init="normal", generator=generator()).dense()
    assert not torch.allclose(dense, dense.mT)


def test_a_line_is_read_and_written_back():
    legs = Legs.parse(LINES[0])
    assert str(legs) == LINES[0]
    assert legs == Legs.parse(str(legs))
    assert legs.terms[1].tied
    assert legs.owners == (0, 0, 2)
    assert Legs.parse("a, b c, d c (tied), e c (tied)").owners == (0, 1, 1, 1)


def test_the_parameter_that_starts_at_zero_is_one_used_once():
    assert Legs.parse("in r, out r (tied), layer r").zero == 2
    with pytest.raises(ValueError, match="frozen or tied"):
        network("in r, out r (tied)", {"in": 4, "out": 4}, 2)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("in r (tied), out r, layer matrix r", "there has to be one"),
        ("in r, layer out r (tied), layer matrix r", "with as many legs"),
        ("in r, out r (tied) (frozen), layer matrix r", "stands alone"),
        ("in r, out r (tied) (zero), layer matrix r", "stands alone"),
        ("in r (zero), out r (tied), layer matrix r", "cannot be .zero."),
    ],
)
def test_what_cannot_be_tied_is_refused(line, what):
    with pytest.raises(LegsError, match=what):
        network(line, SHAPE, 2)


def test_sides_of_other_sizes_or_numbers_are_refused():
    with pytest.raises(LegsError, match=r"shape \(4, 2\) at \(in r\) and \(5, 2\) here"):
        indscal({**SHAPE, "out": 5}, 2)
    with pytest.raises(LegsError, match="equal sizes"):
        rescal(SHAPE, {"p": 2, "q": 1})
    tensors = [torch.ones(4, 2), torch.zeros(4, 2), torch.ones(2, 3, 2)]
    with pytest.raises(ValueError, match="other numbers"):
        Network(LINES[0], tensors, ["layer", "matrix", "in", "out"])
    tensors[1] = torch.ones(4, 2)
    assert Network(LINES[0], tensors, ["layer", "matrix", "in", "out"]).count() == 8 + 12


def test_a_sum_scales_a_parameter_that_is_used_once():
    one, two = drawn(LINES[1], seed=1), drawn(LINES[1], seed=2)
    total = direct_sum([one, two], [-2.0, 0.5])
    assert total.tensors[0] is total.tensors[1]
    torch.testing.assert_close(total.dense(), -2 * one.dense() + 0.5 * two.dense())
    square = Network("in r, out r (tied)", [torch.ones(3, 1)] * 2, ["in", "out"])
    with pytest.raises(ValueError, match="none can take a weight"):
        direct_sum([square, square], [1.0, 2.0])


def test_it_cannot_start_along_a_tensor():
    dense = drawn(LINES[1]).dense().detach()
    with pytest.raises(ValueError, match="both of its sides"):
        rescal(SHAPE, 2, init=start_along(dense, "layer matrix in out"), dtype=torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.index_select("in", torch.tensor([1, 0, 2, 3])),
        lambda net: net.select({"in": 1}),
        lambda net: net.mode_dot(torch.ones(2, 4, dtype=torch.float64), "in"),
    ],
    ids=["index_select", "select", "mode_dot"],
)
def test_a_slice_of_one_side_is_no_longer_tied(change):
    net = decomp.indscal({"layer": 3, "in": 4, "out": 4}, 2, init="normal", dtype=torch.float64)
    found = change(net)
    assert not any(term.tied for term in found.legs.terms)
    wanted = found.dense().detach()
    twice = decomp.direct_sum([found, found]).dense()
    torch.testing.assert_close(twice, 2 * wanted)
    if not any(
        term.frozen for term in found.legs.terms
    ):  # mode_dot adds a matrix that stays as it is
        torch.testing.assert_close(decomp.canonical(found).dense(), wanted)
    kept = net.index_select("layer", torch.tensor([0, 2]))
    assert any(term.tied for term in kept.legs.terms)
