"""Arithmetic of networks against dense tensors: inner products, norms, products, Gram matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from reference import dense
from strategies import KINDS, build, examples, generator, networks, ranks_of, seeds, small

from lortalib import decomp
from lortalib.decomp import (
    Network,
    NetworkView,
    absorb,
    balance,
    cp,
    direct_sum,
    distance,
    environment,
    fit,
    formats,
    gram,
    hadamard,
    inner,
    network,
    norm,
    scale,
    tt,
)
from lortalib.decomp._environment import gram_parts
from lortalib.decomp._pieces import pieces_of

over_kinds = pytest.mark.parametrize("kind", KINDS)
over_formats = pytest.mark.parametrize("name", [kind for kind in KINDS if kind in formats])


def array(net):
    return torch.as_tensor(dense(net))


def assert_same(found, expected):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-10 * scale)


@st.composite
def partners(draw, net):
    """A network over the same shape, of a format that it can have or the network's own line."""
    shape, order = net.shape, draw(st.permutations(net.modes))
    tensors = [torch.randn(t.shape, generator=generator(draw(seeds))).double() for t in net.tensors]
    if any(term.tied for term in net.legs.terms):
        return build("tt", {mode: shape[mode] for mode in order}, 2, generator=generator(1))
    return Network(net.legs.unhashed, tensors, order)


@over_kinds
@examples(15)
@given(data=st.data())
def test_inner_products_are_those_of_the_dense_tensors(kind, data):
    one = data.draw(networks(kind))
    other = data.draw(partners(one))
    a, b = array(one), array(other).permute([other.modes.index(mode) for mode in one.modes])
    over = data.draw(st.lists(st.sampled_from(one.modes), unique=True, max_size=2))
    axes = [one.modes.index(mode) for mode in over]
    summed = [axis for axis in range(a.ndim) if axis not in axes]

    def total(x):
        found = x.sum(summed) if summed else x
        return found.permute([sorted(axes).index(axis) for axis in axes])

    assert_same(inner(one, other, over=over), total(a * b))
    assert_same(norm(one, over=over).square(), total(a * a))
    assert_same(distance(one, other, over=over).square(), total((a - b) ** 2))


def test_modes_that_stay_may_be_named_in_one_text():
    net, other = small("cp"), small("tt", generator=generator(4))
    modes = ("matrix", "layer")
    expected = torch.einsum("lhmio,lhmio->ml", *(torch.as_tensor(dense(n)) for n in (net, other)))
    order = "".join(mode[0] for mode in net.modes)
    assert order == "lhmio", "the einsum above is written for this order"
    for over in ("matrix layer", modes, list(modes), " matrix  layer "):
        assert_same(inner(net, other, over=over), expected)
    squares = array(net).square().sum((1, 2, 3, 4)).sqrt()
    assert_same(norm(net, over="layer"), squares)  # one name is a name, and not its letters
    assert_same(net.norm(over="layer"), squares)
    assert_same(net.norm(), array(net).norm())
    assert_same(
        net.select(layer=1).norm(over=("matrix",)), array(net)[1].square().sum((0, 2, 3)).sqrt()
    )


@over_formats
def test_gradients_of_inner_norm_and_gram(name):
    net, other = small(name), build("tt", small(name).shape, 2, generator=generator(5))
    legs = net.legs

    def values(*parameters):
        tensors = [parameters[legs.owners[k]] for k in range(len(legs.terms))]
        own = with_tensors(net, tensors)
        total = gram(own, 0).sum() if len(tensors) > 1 else 0.0
        return inner(own, other), norm(own), distance(own, other), total

    parameters = [t.detach().clone().requires_grad_() for t in net.tensors]
    assert torch.autograd.gradcheck(values, parameters)


def with_tensors(net, tensors):
    """The same network over other tensors."""
    return NetworkView(net.legs, tensors, net.modes)


@over_formats
@examples(10)
@given(data=st.data())
def test_products_of_one_line_multiply_entries_and_ranks(name, data):
    shape = data.draw(networks(name)).shape
    one = build(name, shape, data.draw(ranks_of(name, shape).filter(lambda r: r != 4)))
    other = build(name, shape, 2, generator=generator(3))
    product = hadamard(one, other)
    assert_same(product.dense(), array(one) * array(other))
    assert product.ranks == {bond: one.ranks[bond] * other.ranks[bond] for bond in one.ranks}
    assert str(product.legs) == str(one.legs.unhashed)
    again = Network(
        product.legs, product.tensors, product.modes
    )  # a whole network, tied where it was
    assert_same(again.dense(), product.dense().detach())


@over_kinds
@examples(10)
@given(data=st.data(), factor=st.floats(-3, 3))
def test_a_number_scales_every_entry(kind, data, factor):
    net = data.draw(networks(kind))
    assert_same(scale(net, factor).dense(), factor * array(net))
    number = torch.tensor([factor], dtype=torch.float64, requires_grad=True)
    scale(net, number).dense().sum().backward()
    assert_same(number.grad[0], array(net).sum())


@over_kinds
@examples(15)
@given(data=st.data())
def test_a_vector_sums_over_a_mode(kind, data):
    net = data.draw(networks(kind))
    mode = data.draw(st.sampled_from(net.modes))
    vector = torch.randn(net.shape[mode], generator=generator(2), dtype=torch.float64)
    found = net.mode_dot(vector, mode)
    assert found.modes == tuple(other for other in net.modes if other != mode)
    assert_same(found.dense(), torch.tensordot(array(net), vector, ([net.modes.index(mode)], [0])))


@over_kinds
@examples(20)
@given(data=st.data())
def test_a_parameter_times_its_environment_is_the_tensor(kind, data):
    net = data.draw(networks(kind).filter(lambda net: len(net.names) > 1))
    k = data.draw(st.integers(0, len(net.names) - 1))
    rest = environment(net, k)
    if not net.legs.vectors:  # else they are computed from the vector each time
        assert all(one is other for one, other in zip(rest.tensors, net.tensors[:k]))
    letter = dict(zip(net.sizes, "abcdefghijklmnopqrstuvwxyz", strict=False))
    word = ["".join(letter[leg] for leg in legs) for legs in (net.legs.terms[k].legs, rest.modes)]
    equation = f"{word[0]},{word[1]}->{''.join(letter[leg] for leg in net.open_legs)}"
    assert_same(torch.einsum(equation, net.tensors[k], rest.dense()), array(net.split))


@over_kinds
@examples(20)
@given(data=st.data())
def test_the_gram_matrix_is_that_of_the_environment(kind, data):
    net = data.draw(networks(kind).filter(lambda net: len(net.names) > 1))
    k = data.draw(st.integers(0, len(net.names) - 1))
    rest, legs = environment(net, k), net.legs.terms[k].legs
    bonds = [leg for leg in legs if leg not in net.open_legs]
    shared = [leg for leg in legs if leg in net.open_legs and leg in rest.modes]
    others = [mode for mode in rest.modes if mode not in legs]
    order = [rest.modes.index(leg) for leg in (*shared, *bonds, *others)]
    room = math.prod(net.sizes[bond] for bond in bonds)
    columns = array(rest).permute(order).reshape(*(net.sizes[m] for m in shared), room, -1)
    assert_same(gram(net, k), columns @ columns.mT)
    assert torch.equal(gram(net, net.names[k]), gram(net, net.names.index(net.names[k])))


@over_kinds
@examples(15)
@given(data=st.data())
def test_an_absorbed_parameter_leaves_the_tensor_as_it_is(kind, data):
    net = data.draw(networks(kind))
    k = data.draw(st.integers(0, len(net.names) - 1))
    found = absorb(net, k)
    assert found.modes == net.modes
    assert found is net or len(found.names) == len(net.names) - 1
    assert_same(found.dense(), array(net))
    for term, tensor in zip(net.legs.terms, net.tensors):  # what is frozen or tied is left alone
        if term.frozen and tensor is not net.tensors[k]:
            assert any(tensor is each for each in found.tensors)


@over_kinds
@examples(10)
@given(data=st.data())
def test_balanced_parameters_leave_the_tensor_as_it_is(kind, data):
    net = data.draw(networks(kind))
    found = balance(net)
    assert str(found.legs) == str(net.legs.unhashed)
    assert_same(found.dense(), array(net))
    for k, term in enumerate(net.legs.terms):
        if term.frozen or net.legs.owners.count(net.legs.owners[k]) > 1:
            assert torch.equal(found.tensors[k], net.tensors[k])


@pytest.mark.parametrize("name", ["cp", "tucker", "tt", "ring", "lotr"])
def test_balanced_slices_are_of_one_size(name):
    net = small(name, rank=3)
    uneven = with_tensors(net, [t * 10.0 ** (3 * k) for k, t in enumerate(net.tensors)])
    found = balance(uneven)
    assert_same(found.dense() / uneven.dense().norm(), uneven.dense() / uneven.dense().norm())
    for bond in net.ranks:
        sizes = [
            tensor.movedim(term.legs.index(bond), 0).flatten(1).square().mean(1).sqrt()
            for term, tensor in zip(net.legs.terms, found.tensors)
            if bond in term.legs
        ]
        for other in sizes[1:]:
            torch.testing.assert_close(other, sizes[0], rtol=1e-2, atol=0)


def test_a_term_that_is_zero_stays_finite_when_balanced():
    net = cp({"in": 4, "out": 3}, 2, init="normal", dtype=torch.float64)
    with torch.no_grad():
        net.tensors[0][:, 1] = 0.0
    found = balance(net)
    assert all(tensor.isfinite().all() for tensor in found.tensors)
    assert_same(found.dense(), array(net))


@pytest.mark.parametrize("name", ["cp", "tucker", "tt", "ring", "block_term", "cara"])
def test_a_selected_mode_is_absorbed_into_the_line_without_it(name):
    shape = {"layer": 3, "head": 2, "matrix": 2, "in": 5, "out": 4}
    net = build(name, {"adapter": 3, **shape}, 2, generator=generator(2))
    carriers = net.legs.carriers["adapter"]
    view = net.select(adapter=1)
    for k in sorted(carriers, reverse=True):
        if not set(view.legs.terms[k].legs) & set(view.modes):
            view = absorb(view, k)
    shorter = formats[name].legs(view.shape)
    # The bonds may have other names, and a train without its last mode has one bond less.
    assert [len(term.legs) for term in view.legs.terms] == [len(t.legs) for t in shorter.terms]
    assert_same(view.dense(), array(net)[1])
    view.dense().sum().backward()
    assert all(tensor.grad is not None for tensor in net.stored)


def test_the_whole_tensor_is_never_formed():
    shape = {"layer": 12, "head": 12, "matrix": 4, "in": 96, "out": 48}  # 2,654,208 entries
    nets = [cp(shape, 8, init="normal"), tt(shape, 8, init="normal")]
    nets += [formats[name](shape, 4, init="normal") for name in ("tucker", "lotr", "lora", "ring")]
    for one in nets:
        for other in nets:
            with LargestTensor() as made:
                inner(one, other)
            assert made.entries < 200_000, (str(one.legs), str(other.legs))
        with LargestTensor() as made:
            for k in range(len(one.names)):
                if one.legs.terms[k].legs != ("p", "q", "s", "t", "u"):  # asked for: 4**5 squared
                    gram(one, k)
        assert made.entries < 200_000, str(one.legs)


def test_what_has_no_result_is_refused():
    one, other = cp({"layer": 2, "in": 4, "out": 3}, 2), cp({"layer": 3, "in": 4, "out": 3}, 2)
    with pytest.raises(ValueError, match="same modes and sizes"):
        inner(one, other)
    with pytest.raises(ValueError, match="has to name different modes"):
        norm(one, over="layer layer")
    with pytest.raises(ValueError, match="different lines"):
        hadamard(one, other)
    with pytest.raises(ValueError, match="one number"):
        scale(one, torch.ones(2))
    square = Network("in r, out r (tied)", [torch.ones(3, 1)] * 2, ["in", "out"])
    with pytest.raises(ValueError, match="none can take a weight"):
        scale(square, 2.0)
    with pytest.raises(KeyError, match="no parameter 'r'"):
        environment(one, "r")
    with pytest.raises(KeyError, match="no parameter 3"):
        gram(one, 3)
    single = network("layer in out", {"layer": 2, "in": 4, "out": 3}, 1)
    with pytest.raises(ValueError, match="nothing surrounds"):
        environment(single, 0)
    assert gram(single, 0).tolist() == [[1.0]]
    with pytest.raises(KeyError, match="no parameter 5"):
        absorb(one, 5)
    assert absorb(single, 0) is single


@pytest.mark.parametrize(
    "line", ["in r, r", "in r, r, out r", "in p q, out p, layer q, p q", "in a, layer a b, out b"]
)
def test_the_parts_of_a_gram_matrix_multiply_to_it(line):
    modes = [mode for mode in ("layer", "in", "out") if mode in line]
    net = network(line, dict.fromkeys(modes, 4), 2, init="normal", dtype=torch.float64)
    for k in range(len(net.names)):
        parts = gram_parts(pieces_of(net), k, net.modes)
        bonds = [leg for leg in net.legs.terms[k].legs if leg not in net.modes]
        assert sorted(bond for part in parts for bond in part.bonds) == sorted(bonds)
        if all(not part.modes for part in parts) and bonds:
            order = [bonds.index(bond) for part in parts for bond in part.bonds]
            total = torch.ones(1, 1, dtype=torch.float64)
            for part in parts:
                total = torch.kron(total, part.matrices.detach())
            whole = gram(net, k).detach().reshape(2 * [net.sizes[bond] for bond in bonds])
            whole = whole.permute([*order, *(len(bonds) + axis for axis in order)])
            assert_same(total, whole.reshape(total.shape))


@pytest.mark.parametrize("size", [0.03, 20.0])
def test_norms_of_half_precision_neither_overflow_nor_vanish(size):
    shape = {"layer": 3, "in": 8, "out": 4}
    net = decomp.cp(shape, 2, init="normal", generator=torch.Generator().manual_seed(0))
    half = decomp.Network(net.legs, [t.detach().mul(size).half() for t in net.tensors], net.modes)
    exact = decomp.Network(net.legs, [t.detach().double() for t in half.tensors], net.modes)
    for found, wanted in (
        (decomp.norm(half), decomp.norm(exact)),
        (decomp.distance(half, decomp.scale(half, -1.0)), 2 * decomp.norm(exact)),
    ):
        assert found.dtype == torch.float16
        assert found.item() == pytest.approx(wanted.item(), rel=2e-2)


def test_networks_of_two_dtypes_meet_in_the_wider_one():
    shape = {"layer": 3, "in": 5, "out": 4}
    narrow = cp(shape, 2, init="normal")
    wide = cp(shape, 3, init="normal", dtype=torch.float64)
    dense = [
        NetworkView(net.legs, [t.detach().double() for t in net.tensors], net.modes).dense()
        for net in (narrow, wide)
    ]
    for one, other in ((narrow, wide), (wide, narrow)):
        found = inner(one, other)
        assert found.dtype == hadamard(one, other).tensors[0].dtype == torch.float64
        torch.testing.assert_close(found, (dense[0] * dense[1]).sum())
        total = direct_sum([one, other])
        assert total.tensors[0].dtype == torch.float64
        torch.testing.assert_close(total.dense(), dense[0] + dense[1], rtol=1e-12, atol=1e-12)
        fitted = fit([one, other], "cp", 5, sweeps=2).network
        assert fitted.tensors[0].dtype == torch.float64
