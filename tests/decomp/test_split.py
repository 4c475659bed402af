"""Split modes: ``in`` is the row-major product of ``in.1``, ``in.2``, ...; published formulas and counts.

The laws of all networks run over lines with split modes too (``"split"`` in `strategies.KINDS`).
"""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import close
from strategies import build, examples, factorings, generator, registered, seeds

from lortalib import decomp
from lortalib.decomp import (
    Legs,
    LegsError,
    Network,
    Shape,
    canonical,
    convert,
    core_consistency,
    direct_sum,
    distance,
    fit,
    formats,
    from_tensorly,
    hadamard,
    inner,
    network,
    round,
    start_along,
)
from lortalib.decomp._factors import balanced, usual_factors

TRAIN = "layer in.1 a, layer in.2 a b, out.1 b c, out.2 c"
SHAPE = {"layer": 2, "in": (2, 3), "out": (2, 2)}
OPTIONS = {"init": "normal", "dtype": torch.float64}
quiet = pytest.mark.filterwarnings("ignore:ranks larger than the modes can fill")


def made(line, shape, rank, seed=0):
    return network(line, shape, rank, generator=generator(seed), **OPTIONS)


def refused(line, shape, rank=2):
    with pytest.raises(LegsError) as caught:
        network(line, shape, rank)
    return str(caught.value)


# --- the notation ---------------------------------------------------------------------------------


def test_a_line_says_how_its_modes_are_split():
    net = made("in.1 a, in.2 a b, in.3 b c, out c", {"in": (8, 12, 8), "out": 5}, 2)
    assert str(net.legs) == "in.1:8 a, in.2:12 a b, in.3:8 b c, out c"
    assert (net.modes, net.open_legs) == (("in", "out"), ("in.1", "in.2", "in.3", "out"))
    assert (net.shape, net.shape.factors) == (Shape({"in": 768, "out": 5}), {})
    again = network(str(net.legs), {"in": 768, "out": 5}, 2)
    assert again.legs == net.legs == Legs.parse(str(net.legs))
    assert net.names == ("in_1_a", "in_2_a_b", "in_3_b_c", "out_c")


def test_sizes_are_given_by_the_line_by_the_shape_or_balanced():
    def split(line, shape):
        return [*network(line, shape, 1).split.shape.values()]

    line = "in.1 a, in.2 a b, in.3 b c, out c"
    assert split(line, {"in": 768, "out": 5}) == [8, 8, 12, 5]
    assert split(line, {"in": (64, 4, 3), "out": 5}) == [64, 4, 3, 5]
    assert split("in.1:64 a, in.2 a b, in.3:3 b c, out c", {"in": 768, "out": 5}) == [64, 4, 3, 5]
    assert split("in.1:6 a, in.2 a b, in.3 b c, out c", {"in": 768, "out": 5}) == [6, 8, 16, 5]


@examples(60)
@given(st.integers(1, 400), st.integers(1, 4))
def test_balanced_factors_have_the_smallest_sum(size, number):
    best = [f for f in _products(size, number) if min(f) > 1 or number == 1]
    found = balanced(size, number)
    if not best:
        assert found is None
    else:
        assert (math.prod(found), len(found)) == (size, number)
        assert sum(found) == min(map(sum, best))
        assert list(found) == sorted(found)
    assert math.prod(usual_factors(size)) == size


def _products(size, number):
    if number == 1:
        return [(size,)]
    firsts = (n for n in range(1, size + 1) if size % n == 0)
    return [(n, *rest) for n in firsts for rest in _products(size // n, number - 1)]


@pytest.mark.parametrize(
    ("line", "shape", "says"),
    [
        ("in.1 a, in.2 a b, in.3 b, out a", {"in": 766}, "766 = 2 x 383, which has no 3 factors above 1"),
        ("in.1 a, in.2 a b, in.3 b, out a", {"in": 766}, r"in\.1:2 in\.2:383 in\.3:1\. Nothing is padded"),
        ("in.1 a, in.2 a, out a", {"in": 7}, "split it into at most 1"),
        ("in.1:5 a, in.2 a, out a", {"in": 12}, r"multiply to its size 12 = 2 x 2 x 3; found 5\. Nothing"),
        ("in.1:3 a, in.2:5 a, out a", {"in": 12}, "found 3 x 5 = 15"),
        ("in.1:3 a, in.2 a, out a", {"in": (4, 3)}, "line gives 'in.1' the size 3, the shape 4"),
        ("in.1 a, in.2 a, out a", {"in": (2, 3, 2)}, "'in' into 2 x 3 x 2, and the line has in.1 in.2"),
        ("in a, out a", {"in": (3, 4)}, r"write in\.1 in\.2 in the line"),
        ("in.1 a, in.3 a, out a", {"in": 12}, r"numbered in\.1, in\.2 and so on"),
        ("in.1 a, in a, out a", {"in": 12}, "'in' stands whole, and split as 'in.1'"),
        ("in a, out a, foo.1 a", {"in": 12}, "'foo.1' is a factor of 'foo', which is no mode"),
        ("in.1 a, in.2 a, in.2 a, out a", {"in": 12}, "'in.2' stands on several parameters"),
        ("in.0 a, out a", {"in": 12}, "'in.0' is no leg name"),
        ("in:12 a, out a", {"in": 12}, r"'in:12' is no leg name .* a factor of a mode is in\.1"),
        ("in.1.2 a, out a", {"in": 12}, r"'in\.1\.2' is no leg name"),
    ],
)  # fmt: skip
def test_a_wrong_split_is_refused_with_what_to_try(line, shape, says):
    with pytest.raises(LegsError, match=says) as caught:
        network(line, {**shape, "out": 4}, 1)
    assert line in str(caught.value)


def test_a_factor_of_another_size_than_the_line_says_is_refused():
    with pytest.raises(LegsError, match=r"'in\.1' has size 3 here but 4 in the line"):
        Network("in.1:4 a, in.2 a", [torch.ones(3, 2), torch.ones(4, 2)], ["in"])


def test_a_start_or_sum_needs_the_same_factors():
    one, other = made(TRAIN, SHAPE, 2), made(TRAIN, {**SHAPE, "in": (3, 2)}, 2)
    with pytest.raises(ValueError, match="different lines"):
        hadamard(one, other)
    with pytest.raises(ValueError, match="of the line and the ranks"):
        fit(one, str(one.legs), 2, start=other)


# --- a cut of full rank ---------------------------------------------------------------------------


def test_a_kronecker_product_is_refused_unless_it_is_marked():
    line, shape = "in.1 out.1, in.2 out.2", {"in": (2, 3), "out": (2, 2)}
    message = refused(line, shape)
    assert "low-rank pair has rank 6, for an input of 6" in message
    assert "'in.1 out.1 (full)'" in message
    assert line in message
    net = made("in.1 out.1 (full), in.2 out.2 (full)", shape, 1)
    close(net.dense(), torch.kron(*net.tensors).detach().numpy())
    a, b = net.cut()
    assert a.shape == (6, 6)
    close(b @ a, net.dense().T.detach().numpy())


@examples(40)
@given(st.integers(1, 3), st.integers(1, 4), seeds)
def test_only_the_legs_that_share_a_parameter_cross(rank, size, seed):
    shape = {"in": (2, size, 3), "out": (2, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = made("in.1 out.1 a (full), in.2 a b, in.3 b, out.2 a", shape, rank, seed)
    a, b = net.cut()
    assert a.shape == (min(2 * net.ranks["a"], 6 * size), 6 * size)
    close(b @ a, reference.matrix(reference.dense(net), net.modes))


def test_a_train_with_in_first_has_the_rank_of_its_bond():
    net = made(TRAIN, SHAPE, {"a": 2, "b": 3, "c": 2})
    plan = net.cut_plan("layer")
    assert (plan.partition.in_side, plan.partition.bonds, plan.rank) == ((0, 1), ("b",), 3)
    a, _ = net.cut("layer")
    first, second = net.tensors[:2]
    close(a, torch.einsum("lia,ljab->lbij", first, second).flatten(2).detach().numpy())


# --- arithmetic between differently split networks -----------------------------------------------------


def ways(size):
    return st.sampled_from(
        [factors for factors in factorings(size) if min(factors) > 1 or size == 1]
    )


@st.composite
def refinable(draw):
    """Two shapes of equal sizes, each with modes split in its own way, that can be split further alike."""
    one, two = {}, {}
    for mode, size in {"in": 12, "out": 8, "layer": 2}.items():
        one[mode], two[mode] = (draw(ways(size)) for _ in range(2))
        ends = sorted(
            {math.prod(f[:k]) for f in (one[mode], two[mode]) for k in range(1, len(f) + 1)}
        )
        assume(all(b % a == 0 for a, b in pairwise(ends)))
    return Shape(one), Shape(two)


@quiet
@examples(40)
@given(refinable(), st.sampled_from(["cp", "tt", "tucker"]), st.sampled_from(["cp", "tt"]), seeds)
def test_inner_products_split_both_further(shapes, kind, other_kind, seed):
    one = build(kind, shapes[0], 2, generator=generator(seed))
    other = build(other_kind, shapes[1], 2, generator=generator(seed + 1))
    left, right = (reference.dense(net) for net in (one, other))
    close(inner(one, other), (left * right).sum())
    close(inner(one, other, over=("out", "layer")), np.einsum("iol,iol->ol", left, right))
    assert distance(one, other).item() == pytest.approx(np.linalg.norm(left - right), rel=1e-6)


def test_factors_that_cannot_be_split_alike_are_refused():
    one, other = (made(TRAIN, {**SHAPE, "in": split}, 2) for split in ((2, 3), (3, 2)))
    with pytest.raises(
        ValueError, match="'in' is split into 2 x 3 and into 3 x 2, which have no common"
    ):
        inner(one, other)


@quiet
@pytest.mark.parametrize("target", ["cp", "tt", "folded"])
@pytest.mark.parametrize("line", ["cp", "tt", TRAIN, "in p, layer p q, out q"])
def test_a_fit_of_a_line_to_a_differently_split_target_says_its_error(line, target):
    shape = (
        {"layer": 2, "in": (2, 3), "out": (2, 2)}
        if target == "folded"
        else {**SHAPE, "in": 6, "out": 4}
    )
    goal = build("tt" if target == "folded" else target, Shape(shape), 2)
    found = fit(goal, line, 3, start="random", restarts=1)
    gap = np.linalg.norm(reference.dense(found.network) - reference.dense(goal))
    assert found.error == pytest.approx(
        gap / np.linalg.norm(reference.dense(goal)), rel=1e-4, abs=1e-7
    )
    dense = fit(goal.dense().detach(), line, 3, modes=goal.modes, start="random", restarts=1)
    gap = np.linalg.norm(reference.dense(dense.network) - reference.dense(goal))
    assert dense.error == pytest.approx(
        gap / np.linalg.norm(reference.dense(goal)), rel=1e-4, abs=1e-7
    )
    assert str(dense.network.legs) == str(found.network.legs)


def test_a_train_over_folded_matrices_is_fitted_by_tensorly():
    goal = made(
        "in.1:2 a, in.2:3 a b, layer b c, out.1:2 c d, out.2:2 d",
        {"layer": 2, "in": 6, "out": 4},
        2,
    )
    found = fit(goal.dense().detach(), str(goal.legs), goal.ranks, modes=goal.modes)
    assert found.how == "TensorLy tensor_train"
    assert found.error < 1e-12


def test_a_masked_fit_over_folded_modes():
    goal = made(TRAIN, SHAPE, {"a": 2, "b": 1, "c": 1})
    mask = torch.ones(2, 6, 4)
    mask[0, 1, 2] = mask[1, 5, 0] = 0
    holes = goal.dense().detach().where(mask > 0, torch.nan)
    found = fit(holes, str(goal.legs), goal.ranks, modes=goal.modes, mask=mask, restarts=3)
    assert found.error < 1e-6
    with pytest.raises(ValueError, match="no entry is known at in=3"):
        fit(
            holes,
            str(goal.legs),
            1,
            modes=goal.modes,
            mask=torch.ones(2, 6, 4).index_fill(1, torch.tensor(3), 0),
        )


def test_components_over_factors_are_components_of_the_whole():
    net = build("folded_cp", Shape({"layer": 3, "in": (2, 3), "out": (2, 2)}), 2)
    with torch.no_grad():
        for parameter in net.parameters():  # the start has signs, which may be dependent
            parameter.normal_(generator=generator(4))
    found = convert(net, "cp")
    assert found.is_exact
    close(found.network.dense(), reference.dense(net))
    back = convert(net, "in.1:2 a, in.2:3 a b, layer b c, out.1:2 c d, out.2:2 d")
    assert back.is_exact
    close(back.network.dense(), reference.dense(net))
    close(convert(net, "tucker").network.dense(), reference.dense(net))
    assert core_consistency(net, net) == pytest.approx(100)
    assert core_consistency(net, net.dense().detach()) == pytest.approx(100)


def test_rounding_keeps_the_factors():
    net = made(TRAIN, {"layer": 1, "in": (4, 4), "out": (4, 4)}, 3)
    found = round(net, rank=2)
    gap = np.linalg.norm(reference.dense(found.network) - reference.dense(net))
    assert found.error == pytest.approx(gap / np.linalg.norm(reference.dense(net)))
    assert str(found.network.legs) == str(net.legs)


def test_a_start_follows_a_tensor_over_whole_modes():
    goal = made(TRAIN, SHAPE, 2)
    line = "layer in.1:2 a, layer in.2:3 a b, out.1:2 b c (zero), out.2:2 c"
    net = network(
        line, dict(goal.shape), 2, init=start_along(goal.dense(), goal.modes), dtype=torch.float64
    )
    assert net.dense().count_nonzero() == 0
    loss = (net.dense() - goal.dense().detach()).square().sum()
    (gradient,) = torch.autograd.grad(loss, net.stored[2])
    assert gradient.norm() > 0.5 * goal.dense().norm()


def test_tensorly_sees_the_factors():
    net = made("in.1:2 a, in.2:3 a b, out.1:2 b c, out.2:2 c", {"in": 6, "out": 4}, 2)
    obj = net.to_tensorly()
    assert obj.modes == ("in.1", "in.2", "out.1", "out.2")
    back = from_tensorly(obj)
    assert (back.modes, back.shape) == (net.modes, net.shape)
    assert back.dense().equal(net.dense())
    assert from_tensorly(obj, obj.modes).shape == net.split.shape


# --- published methods ----------------------------------------------------------------------------


def in_digits(number, sizes):
    found = []
    for size in reversed(sizes):
        found.append(number % size)
        number //= size
    return found[::-1]


def train_entry(cores, digits):
    """An entry of a tensor train: a product of matrices, one for each digit."""
    product = np.ones((1, 1))
    for core, digit in zip(cores, digits):
        product = product @ core[:, digit]
    return product.item()


def cores_of(net, index, legs):
    """The cores (left, digit, right) of the train through these legs, at one layer and matrix."""
    found = []
    for k, term in enumerate(net.legs.terms):
        own = [leg for leg in term.legs if leg in legs]
        if own:
            tensor = net.tensors[k].detach()[index].numpy()
            rest = [leg for leg in term.legs if leg not in ("layer", "matrix", own[0])]
            left = legs.index(own[0]) > 0
            tensor = tensor.reshape(tensor.shape[0], *(net.sizes[b] for b in rest))
            tensor = tensor if left else tensor[:, None]
            tensor = tensor if tensor.ndim == 3 else tensor[..., None]
            found.append(tensor.transpose(1, 0, 2))
    return found


def test_tt_lora_is_a_train_for_each_matrix():
    """dW[i, o] = G1[i1] G2[i2] G3[i3] G4[o1] G5[o2] G6[o3] (arXiv 2408.01008, section 3)."""
    sizes = (4, 2, 3, 3, 2, 2)
    shape = {"layer": 2, "matrix": 2, "in": sizes[:3], "out": sizes[3:]}
    net = made("tt_lora", shape, 2)
    dense, legs = net.dense().detach(), net.open_legs[2:]
    for layer, matrix in np.ndindex(2, 2):
        cores = cores_of(net, (layer, matrix), legs)
        for i, o in np.ndindex(24, 12):
            digits = in_digits(i, sizes[:3]) + in_digits(o, sizes[3:])
            assert dense[layer, matrix, i, o].item() == pytest.approx(train_entry(cores, digits))


def test_tt_lora_has_its_published_number_of_parameters():
    shape = {"layer": 12, "matrix": 2, "head": (3, 4), "in": (64, 4, 3), "out": (64,)}
    assert network("tt_lora", shape, 5, device="meta").count() == 12 * 2 * 990


def test_loretta_is_a_lora_of_two_trains():
    """A (in, r) and B (r, out) are trains over the digits of in, r and of r, out (arXiv 2402.11417)."""
    net = made("loretta", {"layer": 1, "matrix": 1, "in": (3, 2), "out": (2, 2)}, 2)
    g1, g2, g3, h1, h2, h3 = (tensor.detach()[0, 0].numpy() for tensor in net.tensors)
    a, b = np.zeros((6, 2)), np.zeros((2, 4))
    for i, k in np.ndindex(6, 2):
        first, second = in_digits(i, (3, 2))
        a[i, k] = g1[first] @ g2[second] @ g3[k]
    for k, o in np.ndindex(2, 4):
        first, second = in_digits(o, (2, 2))
        b[k, o] = h1[k] @ h2[first] @ h3[second]
    close(net.dense()[0, 0], a @ b)
    assert net.select(layer=0, matrix=0).cut().A.shape == (2, 6)


def test_loretta_has_its_published_number_of_parameters():
    """Llama-2-7B, q and v: 4096 x 8 folded to 16 x 16 x 8 x 4 x 4; the first 4 is 2 of in and 2 of r.

    The trained norms, 65 x 4096, are counted too. Its TT rank of 8 is more than the last core can fill.
    """
    first = "in.1:16 a, in.2:16 a b, in.3:8 b c, in.4:2 s c d, t u d"
    second = "s t e, u out.1:2 e f, out.2:8 f g, out.3:16 g h, out.4:16 h"
    line = ", ".join(f"layer matrix {term}" for term in f"{first}, {second}".split(", "))
    sizes = {**dict.fromkeys("abcdefgh", 8), "s": 2, "t": 2, "u": 2, "layer": 32, "matrix": 2}
    legs = Legs.parse(line)
    sizes |= legs.factors
    tensors = [torch.empty([sizes[leg] for leg in term.legs], device="meta") for term in legs.terms]
    net = Network(legs, tensors, ["layer", "matrix", "in", "out"])
    assert net.shape == {"layer": 32, "matrix": 2, "in": 4096, "out": 4096}
    assert net.count() == 64 * 2 * 1952
    assert net.count() + 65 * 4096 == 516_096


def test_tera_is_a_tucker_network_with_trained_diagonals():
    """T[l, i, o] = sum_abc F1[i1, a] d1[l, a] F2[i2, b] d2[l, b] F3[o, c] d3[l, c] G[a, b, c]; d trains."""
    frozen = "in.1 a (frozen), in.2 b (frozen), out c (frozen), a b c (frozen)"
    line = f"{frozen}, layer a, layer b, layer c (zero)"
    net = made(line, {"layer": 2, "in": (2, 3), "out": 4}, {"a": 2, "b": 3, "c": 4})
    assert net.count() == 2 * (2 + 3 + 4)
    f1, f2, f3, core, d1, d2, d3 = net.tensors
    whole = torch.einsum("ia,jb,oc,abc,la,lb,lc->lijo", f1, f2, f3, core, d1, d2, d3)
    close(net.dense(), whole.flatten(1, 2).detach().numpy())
    assert net.cut_plan("layer").rank == 4


@examples(10)
@given(st.sampled_from(["tt_lora", "loretta", "folded_cp"]), st.data())
def test_positions_are_taken_from_a_split_mode(name, data):
    net = data.draw(registered(name))
    mode = data.draw(st.sampled_from(net.modes))
    size = net.shape[mode]
    at = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)))
    expected = np.take(reference.dense(net), at.numpy(), axis=net.modes.index(mode))
    found = net.index_select(mode, at)
    assert (found.modes, mode in found.open_legs) == (net.modes, True)
    close(found.dense(), expected)
    Network(
        found.legs, [t.detach() for t in found.tensors], found.modes
    )  # the line is one of a network
    for wrong in (size, -1):
        with pytest.raises((IndexError, RuntimeError)):  # torch raises either
            net.index_select(mode, torch.tensor([0, wrong]))


def test_a_slice_of_a_split_in_has_one_parameter_for_it():
    """So it is a network like others: a line has ``in`` on one parameter only."""
    net = made(
        "in.1 a, layer in.2 a b, in.3 b c, out c", {"layer": 2, "in": (2, 3, 2), "out": 4}, 2
    )
    found = net.index_select("in", torch.tensor([7, 0, 7]))
    whole = found.dense().detach()
    close(whole, reference.dense(net)[:, [7, 0, 7]])
    assert [term.legs for term in found.legs.terms if "in" in term.legs] == [("in", "layer", "c")]
    for same in (
        canonical(found),
        direct_sum([found, found], [0.5, 0.5]),
        round(found, error=0).network,
    ):
        close(same.dense(), whole.numpy())
    found.dense().sum().backward()
    assert all(tensor.grad is not None for tensor in net.tensors)


@pytest.mark.parametrize("name", ["tt_lora", "loretta", "folded_cp"])
@pytest.mark.parametrize("rank", [2, 8])
def test_the_first_step_of_a_folded_format_moves_outputs_by_its_size(name, rank):
    """The start is rank-invariant for split lines too; see `lortalib.decomp.get_start`."""
    moved = []
    for seed in range(20):
        net = network(name, (2, 4, 2, 768, 64), rank, generator=generator(seed))
        assert net.dense().count_nonzero() == 0
        with torch.no_grad():
            zero = net.stored[net.legs.zero]
            zero.copy_(torch.randn(zero.shape, generator=generator(seed)).sign())
        a, b = net.select(layer=0, matrix=1).cut()
        x = torch.randn(64, 768, generator=generator(100 + seed))
        moved.append((x @ a.T @ b.T).square().mean().item())
    assert 0.5 < math.sqrt(np.mean(moved)) < 2


def test_formats_whose_line_depends_on_the_modes_take_a_split_shape():
    shape = {"layer": 3, "in": (4, 8), "out": 16}
    assert str(formats["cp"].legs(shape)) == "in.1:4 r, in.2:8 r, out r, layer r"
    assert network("tucker", shape, (3, 4, 2, 5), device="meta").ranks == {
        "a": 4,
        "b": 2,
        "q": 5,
        "t": 3,
    }
    with pytest.raises(LegsError, match="the shape splits 'in' into 4 x 8, and the line has in"):
        formats["lotr"].legs(shape)


@pytest.mark.parametrize(
    "positions",
    [
        torch.tensor([True, False] * 6),
        torch.ones(2, 2, dtype=torch.int64),
        [0, 1],
        torch.tensor([0.0]),
    ],
)
@pytest.mark.parametrize("line", ["in.1 a, in.2 a b, out b", "in a, out a"])
def test_positions_have_to_be_integers(line, positions):
    net = decomp.network(line, {"in": 12, "out": 4}, 2)
    with pytest.raises(TypeError, match="vector of integers"):
        net.index_select("in", positions)


def test_an_absorbed_network_says_the_sizes_of_its_factors():
    net = decomp.network("in.1:2 a, in.2:6 b, a b c, out c", {"in": 12, "out": 3}, 2, init="normal")
    found = decomp.absorb(decomp.absorb(net, 0), 0)
    assert str(found.legs) == "in.1:2 in.2:6 c, out c"
