"""Many slices at once: cut over modes, take, mode_dot, and the contractions beneath them."""

import math
from itertools import combinations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import close, factors
from strategies import KINDS, build, examples, generator, networks, seeds, selections, small
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

from lortalib.decomp import Cut, LegsError, Network
from lortalib.decomp._einsum import COST_OF_ONE_PASS, contract, contract_along, contraction_path

over_kinds = pytest.mark.parametrize("kind", KINDS)
ENDS = ("in", "head", "out")
FEW = ["cp", "tucker", "ring", "lora", "lora_xs"]


def free_modes(net):
    return [mode for mode in net.modes if mode not in ENDS]


def normal(*size, seed=0):
    return torch.randn(size, generator=generator(seed), dtype=torch.float64)


@st.composite
def cuttable(draw, kind):
    """A network, after selecting at some modes, and the rest of them in any order."""
    net = draw(networks(kind))
    view = net.select(**draw(selections(net, keep=ENDS)))
    return net, view, tuple(draw(st.permutations(free_modes(view))))


def each(view, over):
    """Every index of these modes, and the matrix of the dense tensor there."""
    dense = reference.dense(view)
    for place in np.ndindex(*(view.shape[mode] for mode in over)):
        index = dict(zip(over, place))
        at = tuple(index.get(mode, slice(None)) for mode in view.modes)
        left = [mode for mode in view.modes if mode not in over]
        yield place, index, reference.matrix(dense[at], left)


def dense_matrices(net, over):
    """The dense tensor as (*over, head*out, in), with autograd."""
    order = [*over, *(mode for mode in ("head", "out", "in") if mode in net.modes)]
    dense = net.dense().permute([net.modes.index(mode) for mode in order])
    return dense.reshape(*(net.shape[mode] for mode in over), -1, net.shape["in"])


def same_gradients(one, other, tensors):
    """Whether two tensors of equal shape depend alike on these, through a random functional."""
    assert one.shape == other.shape
    weight, found = normal(*one.shape, seed=5), []
    for value in (one, other):
        found.append(
            torch.autograd.grad(
                (weight * value).sum(), tensors, materialize_grads=True, allow_unused=True
            )
        )
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def trainable(net):
    return [p for p in net.parameters() if p.requires_grad]


# --- cut over modes -------------------------------------------------------------------------------


@over_kinds
@examples(10)
@given(data=st.data())
def test_each_slice_of_a_cut_is_a_matrix_of_the_dense_tensor(kind, data):
    _, view, over = data.draw(cuttable(kind))
    cut = view.cut(*over)
    assert isinstance(cut, Cut)
    rows, p = view.shape.get("head", 1) * view.shape["out"], cut.A.shape[-2]
    sizes = [view.shape[mode] for mode in over]
    lead = cut.A.shape[:-2], cut.B.shape[:-2]
    assert (cut.A.shape[-1], cut.B.shape[-2:]) == (view.shape["in"], (rows, p))
    assert all(len(axes) == len(over) for axes in lead)
    assert all(n in (1, size) for axes in lead for n, size in zip(axes, sizes))
    products = (cut.B @ cut.A).expand(*sizes, rows, -1)
    for place, index, expected in each(view, over):
        close(products[place], expected)
        alone = view.select(**index).cut()
        assert alone.A.shape[-2] == p
        close(alone.B @ alone.A, expected)
    assert p == reference.smallest_crossing(view.select(**dict.fromkeys(over, 0)))


@over_kinds
@examples(5)
@given(data=st.data())
def test_a_side_that_does_not_carry_a_mode_has_size_one_there(kind, data):
    _, view, over = data.draw(cuttable(kind))
    division, cut = view.cut_plan(*over), view.cut(*over)
    for positions, side in zip(division.partition, cut):
        legs = {leg for k in positions for leg in view.legs.terms[k].legs}
        carried = [legs.intersection(factors(view, mode)) for mode in over]
        wide = [view.shape[mode] if own else 1 for mode, own in zip(over, carried)]
        assert list(side.shape[:-2]) == wide


@over_kinds
@examples(5)
@given(data=st.data())
def test_a_division_has_every_parameter_on_one_side(kind, data):
    _, view, over = data.draw(cuttable(kind))
    division = view.cut_plan(*over)
    in_side, out_side, bonds = division.partition
    assert sorted(in_side + out_side) == list(range(len(view.tensors)))
    assert division.rank == view.cut(*over).A.shape[-2]
    assert division.rank == math.prod(view.sizes[bond] for bond in bonds)
    legs = [{leg for k in side for leg in view.legs.terms[k].legs} for side in (in_side, out_side)]
    own = [{*factors(view, mode)} for mode in ("in", "head", "out") if mode in view.modes]
    assert legs[1] >= set().union(*own[1:])
    if in_side:
        assert own[0] - {*bonds} <= legs[0] - legs[1]
        shared = legs[0] & legs[1] - {leg for mode in over for leg in factors(view, mode)}
        assert shared | own[0] & legs[1] == {*bonds}
    else:
        assert {*bonds} == own[0]


@over_kinds
@examples(8)
@given(data=st.data())
def test_gradients_through_all_slices_are_those_through_dense(kind, data):
    net, view, over = data.draw(cuttable(kind))
    a, b = view.cut(*over)
    dense = dense_matrices(view, over)
    same_gradients((b @ a).expand(dense.shape), dense, trainable(net))


class Value(nn.Module):
    """A function of a network as a module, so that its parameters can be given from outside."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self):
        return self.function(self.net)


def slices(net):
    a, b = net.cut("layer", "matrix")
    return b @ a


def changed(net):
    """The slices of a network whose heads are mixed and whose matrices are chosen."""
    return slices(net.mode_dot(MIX, "head").index_select("matrix", torch.tensor([1, 0, 1])))


MIX = normal(3, 2)
VALUES = pytest.mark.parametrize("function", [Network.dense, slices, changed])


@VALUES
@pytest.mark.parametrize("name", FEW)
def test_first_and_second_derivatives_are_those_of_finite_differences(name, function):
    module = Value(build(name, (2, 2, 2, 2, 2), 2), function)
    names, tensors = zip(*module.named_parameters())
    given = tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)

    def value(*given):
        return functional_call(module, dict(zip(names, given)), ())

    assert gradcheck(value, given, fast_mode=True)
    assert gradgradcheck(value, given, fast_mode=True)


def test_cut_refuses_modes_that_it_cannot_cut_over():
    net = small("cp")
    for over in (
        ["task"], ["r"], ["layer", "layer"], ["in"], ["head"], ["out"], ["layer", "matrix", "in"]
    ):  # fmt: skip
        names = ", ".join(map(repr, over))
        for act in (net.cut, net.cut_plan):
            with pytest.raises(LegsError, match=rf"cannot cut over {names}: these are to be diff"):
                act(*over)
    with pytest.raises(LegsError, match="cannot cut over 'layer'"):
        net.select(layer=0).cut("layer", "matrix")
    with pytest.raises(
        LegsError, match=r"net\.select\(matrix=0\)\.cut\(\).*net\.cut\('layer', 'matrix'\)"
    ):
        net.cut("layer")
    for gone in ("in", "out"):
        with pytest.raises(LegsError, match="a cut needs the modes in, out"):
            net.select(**{gone: 0}).cut("layer", "matrix")


# --- take -----------------------------------------------------------------------------------------


@st.composite
def taken(draw, kind):
    """A network, one of its modes, and positions there in any order, some of them repeated."""
    net = draw(networks(kind))
    mode = draw(st.sampled_from(net.modes))
    at = st.lists(st.integers(0, net.shape[mode] - 1), min_size=1, max_size=5)
    return net, mode, torch.tensor(draw(at))


@over_kinds
@examples(8)
@given(data=st.data())
def test_take_keeps_those_positions_of_the_dense_tensor(kind, data):
    net, mode, at = data.draw(taken(kind))
    view, axis = net.index_select(mode, at), net.modes.index(mode)
    expected = reference.dense(net).take(at.numpy(), axis)
    assert view.modes == net.modes
    assert tuple(view.shape.values()) == expected.shape
    close(view.dense(), expected)
    same_gradients(view.dense(), net.dense().index_select(axis, at), trainable(net))
    for _, index, matrix in each(view, free_modes(view)):
        a, b = view.select(**index).cut()
        close(b @ a, matrix)


def test_take_refuses_what_it_cannot_find():
    net = small("cp")
    for mode in ("task", "r"):
        with pytest.raises(KeyError, match=rf"cannot take from '{mode}': the modes .* layer, head"):
            net.index_select(mode, torch.tensor([0]))
    for position in (2, -1):
        with pytest.raises(IndexError):
            net.index_select("layer", torch.tensor([0, position]))


# --- mode_dot -------------------------------------------------------------------------------------


@st.composite
def multiplied(draw, kind):
    """A network, one of its modes, and a matrix that fits it."""
    net = draw(networks(kind))
    mode = draw(st.sampled_from(net.modes))
    matrix = normal(draw(st.integers(1, 4)), net.shape[mode], seed=draw(seeds))
    return net, mode, matrix.requires_grad_()


def dot(dense, matrix, axis):
    return torch.tensordot(matrix, dense, ([1], [axis])).movedim(0, axis)


@over_kinds
@examples(8)
@given(data=st.data())
def test_mode_dot_is_the_product_along_the_mode(kind, data):
    net, mode, matrix = data.draw(multiplied(kind))
    view, axis = net.mode_dot(matrix, mode), net.modes.index(mode)
    dense = reference.dense(net)
    expected = np.zeros([*dense.shape[:axis], len(matrix), *dense.shape[axis + 1 :]])
    for new, old in np.ndindex(*matrix.shape):
        at = (slice(None),) * axis
        expected[(*at, new)] += matrix[new, old].item() * dense[(*at, old)]
    assert view.modes == net.modes
    assert tuple(view.shape.values()) == expected.shape
    close(view.dense(), expected)
    same_gradients(view.dense(), dot(net.dense(), matrix, axis), [*trainable(net), matrix])
    twice = view.mode_dot(matrix.mT, mode)
    close(twice.dense(), dot(dot(net.dense(), matrix, axis), matrix.mT, axis).detach())


@over_kinds
@examples(8)
@given(data=st.data())
def test_slices_of_a_product_are_cut_like_any_other(kind, data):
    net, mode, matrix = data.draw(multiplied(kind))
    view = net.mode_dot(matrix, mode)
    over = tuple(data.draw(st.permutations(free_modes(view))))
    a, b = view.cut(*over)
    products = (b @ a).expand(*(view.shape[mode] for mode in over), -1, -1)
    for place, _, expected in each(view, over):
        close(products[place], expected)
    same_gradients(products, dense_matrices(view, over), [*trainable(net), matrix])
    before, rank = net.cut_plan(*over), view.cut_plan(*over).rank
    assert rank == reference.smallest_crossing(view.select(**dict.fromkeys(over, 0)))
    if before.in_side:
        assert rank <= before.rank * (1 if mode in ENDS else net.shape[mode])


@pytest.mark.parametrize("line", ["in r head, out r head", "in head out", "in r, out r head"])
def test_a_mode_of_several_parameters_is_multiplied_once(line):
    sizes = {"in": 3, "out": 2, "head": 4, "r": 2}
    dims = [[sizes[leg] for leg in term.split()] for term in line.split(", ")]
    net = Network(line, [normal(*size, seed=k) for k, size in enumerate(dims)], ENDS)
    matrix = normal(5, 4, seed=9)
    view = net.mode_dot(matrix, "head")
    close(view.dense(), np.einsum("ihj,gh->igj", reference.dense(net), matrix.numpy()))
    assert view.cut().A.shape[-2] == reference.smallest_crossing(view)


def test_mode_dot_refuses_what_does_not_fit():
    net = small("cp")
    with pytest.raises(KeyError, match=r"cannot multiply along 'r': the modes .* layer, head"):
        net.mode_dot(torch.ones(2, 2), "r")
    for shape in ((2, 3), (3,), (1, 2, 2)):
        with pytest.raises(
            ValueError, match=r"'head' of size 2, .*\(new size, 2\) or a vector is needed"
        ):
            net.mode_dot(torch.ones(shape), "head")


# --- the order of contractions --------------------------------------------------------------------


@st.composite
def contractions(draw, least, most):
    """Terms, output and sizes as a network has them: a leg that is summed is on several terms."""
    number = draw(st.integers(least, most))
    terms = [[] for _ in range(number)]
    output = []
    for leg in "abcdefgh"[: draw(st.integers(1, 8))]:
        kept = number == 1 or draw(st.booleans())
        at = st.sets(st.integers(0, number - 1), min_size=1 if kept else 2, max_size=3)
        for k in draw(at):
            terms[k].append(leg)
        output += [leg] * kept
    terms = tuple(tuple(draw(st.permutations(term))) for term in terms)
    sizes = {leg: draw(st.integers(1, 4)) for leg in "abcdefgh"}
    return terms, tuple(draw(st.permutations(output))), sizes


def tensors_of(terms, sizes, trained=()):
    found = [normal(*(sizes[leg] for leg in term), seed=k) for k, term in enumerate(terms)]
    return [tensor.requires_grad_(k in trained) for k, tensor in enumerate(found)]


def whole(terms, tensors, output):
    """One einsum over everything."""
    return torch.einsum(f"{','.join(map(''.join, terms))}->{''.join(output)}", *tensors)


def cost_of_path(path, tensors):
    """What a path costs: for each step its multiplications, and passes over what it reads and writes."""
    values, total = list(tensors), 0
    for i, j, equation in path:
        words = equation.split("->")[0].split(",")
        pair = [values[i]] if i == j else [values[i], values[j]]
        size = {leg: n for word, t in zip(words, pair) for leg, n in zip(word, t.shape)}
        values.append(torch.einsum(equation, *pair))
        moved = sum(tensor.numel() for tensor in (*pair, values[-1]))
        total += (math.prod(size.values()) + COST_OF_ONE_PASS * moved) * (i != j)
    return total


def cost_of(order, terms, output, sizes):
    """The same for an order of pairs in a shrinking list, from the legs alone."""
    left, total = [set(term) for term in terms], 0
    for pair in order:
        both = [left[k] for k in pair]
        joined = set().union(*both)
        left = [term for k, term in enumerate(left) if k not in pair]
        left.append(joined & set(output).union(*left))
        moved = sum(math.prod(sizes[leg] for leg in term) for term in (*both, left[-1]))
        total += math.prod(sizes[leg] for leg in joined) + COST_OF_ONE_PASS * moved
    return total


def orders(number):
    """Every order of pairs."""
    if number == 1:
        yield ()
    for pair in combinations(range(number), 2):
        for rest in orders(number - 1):
            yield (pair, *rest)


@examples(60)
@given(case=contractions(1, 8), data=st.data())
def test_no_order_of_up_to_eight_tensors_costs_less(case, data):
    terms, output, sizes = case
    tensors = tensors_of(terms, sizes)
    path = contraction_path(terms, output, tuple(sizes.items()))
    close(contract_along(path, tensors), whole(terms, tensors, output))
    cost = cost_of_path(path, tensors)
    if len(terms) <= 4:
        assert cost == min(cost_of(order, terms, output, sizes) for order in orders(len(terms)))
        return
    counts = range(len(terms), 1, -1)
    from_the_left = [(0, 1), *((0, n - 1) for n in counts[1:])]
    assert cost <= cost_of(from_the_left, terms, output, sizes)
    for _ in range(5):
        order = [data.draw(st.sampled_from([*combinations(range(n), 2)])) for n in counts]
        assert cost <= cost_of(order, terms, output, sizes)


@examples(15)
@given(case=contractions(9, 10))
def test_more_tensors_are_contracted_rightly_too(case):
    terms, output, sizes = case
    tensors = tensors_of(terms, sizes)
    close(contract(terms, tensors, output, sizes), whole(terms, tensors, output))


# --- gradients of a contraction -------------------------------------------------------------------


@examples(40)
@given(case=contractions(1, 5), data=st.data())
def test_gradients_of_a_contraction_are_those_of_one_einsum(case, data):
    """First ones and second ones, of any choice of the tensors; the others are frozen."""
    terms, output, sizes = case
    trained = data.draw(st.sets(st.sampled_from(range(len(terms))), min_size=1))
    tensors = tensors_of(terms, sizes, trained)
    wanted = [tensors[k] for k in trained]
    weight = normal(*(sizes[leg] for leg in output), seed=7).requires_grad_()
    found = []
    for value in (contract(terms, tensors, output, sizes), whole(terms, tensors, output)):
        assert value.requires_grad
        # The square makes second derivatives depend on everything.
        loss = (weight * value).sum() + value.square().sum()
        first = torch.autograd.grad(loss, [*wanted, weight], create_graph=True)
        total = sum((g * normal(*g.shape, seed=8)).sum() for g in first)
        second = torch.autograd.grad(
            total, [*wanted, weight], materialize_grads=True, allow_unused=True
        )
        found.append((*first, *second))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_contraction_of_frozen_tensors_has_no_graph():
    net = small("tucker").requires_grad_(False)
    assert not net.dense().requires_grad
    net.requires_grad_(True)
    with torch.no_grad():
        assert not net.dense().requires_grad
    assert net.dense().requires_grad


# --- transformed functions ------------------------------------------------------------------------


@VALUES
@pytest.mark.parametrize("name", FEW)
def test_torch_func_sees_plain_operations(name, function):
    module = Value(small(name), function)
    params = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}

    def loss(params):
        return functional_call(module, params, ()).square().sum()

    expected = torch.autograd.grad(function(module.net).square().sum(), trainable(module))
    found = grad(loss)(params)
    for one, other in zip(found.values(), expected):
        torch.testing.assert_close(one, other)
    stacked = {n: torch.stack([p, 2 * p, -p]) for n, p in params.items()}
    mapped = vmap(grad(loss))(stacked)
    for k, factor in enumerate((1, 2, -1)):
        alone = grad(loss)({n: factor * p for n, p in params.items()})
        torch.testing.assert_close({n: g[k] for n, g in mapped.items()}, alone)
    step = {n: normal(*p.shape, seed=3) for n, p in params.items()}
    slope = jvp(loss, (params,), (step,))[1]
    torch.testing.assert_close(slope, sum((found[n] * step[n]).sum() for n in params))


@pytest.mark.parametrize("name", ["cp", "tucker", "lora_xs"])
def test_compiled_without_a_break_it_has_the_same_gradients(name):
    torch.compiler.reset()
    net = small(name)
    compiled = torch.compile(lambda: changed(net), fullgraph=True, backend="aot_eager")
    same_gradients(compiled(), changed(net), trainable(net))
    torch.compiler.reset()


def test_dual_tensors_carry_their_tangents():
    net = small("cp")
    with forward_ad.dual_level():
        params = {
            name: forward_ad.make_dual(p.detach().requires_grad_(), torch.ones_like(p))
            for name, p in net.named_parameters()
        }
        tangent = forward_ad.unpack_dual(functional_call(net, params, ())).tangent
    values = dict(net.named_parameters())
    ones = {name: torch.ones_like(p) for name, p in values.items()}
    _, expected = jvp(lambda some: functional_call(net, some, ()), (values,), (ones,))
    torch.testing.assert_close(tangent, expected)
