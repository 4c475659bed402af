"""Ranks: every form in which they are given, and how far they can go."""

import math
import string
import warnings

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FORMATS,
    build,
    examples,
    generator,
    lines,
    network_of,
    registered_shapes,
    seeds,
    sized,
    usual_modes,
)
from tensorly.decomposition import tensor_train
from tensorly.tt_tensor import validate_tt_rank

from lortalib import decomp
from lortalib.decomp import Legs, Network, Shape, cp, formats, tt, tucker

SHAPE = Shape((3, 2, 4, 6, 5))


@pytest.mark.parametrize(
    ("make", "forms", "ranks"),
    [
        (cp, [3, (3,), [3], {"r": 3}, np.int64(3)], {"r": 3}),
        (
            tucker,
            [(3, 2, 1, 5, 4), {"t": 3, "s": 2, "u": 1, "p": 5, "q": 4}],
            {"p": 5, "q": 4, "s": 2, "t": 3, "u": 1},
        ),
        (tucker, [2, (2, 2, 2, 2, 2)], {"p": 2, "q": 2, "s": 2, "t": 2, "u": 2}),
        (
            tt,
            [(2, 3, 4, 5), (1, 2, 3, 4, 5, 1), {"d": 5, "a": 2, "c": 4, "b": 3}],
            {"a": 2, "b": 3, "c": 4, "d": 5},
        ),
        (tt, [2, np.int32(2), torch.Size((2, 2, 2, 2))], {"a": 2, "b": 2, "c": 2, "d": 2}),
    ],
)
def test_ranks_as_integer_tuple_and_mapping(make, forms, ranks):
    for rank in forms:
        assert make(SHAPE, rank, device="meta").ranks == ranks


def test_a_tuple_of_tucker_ranks_is_in_the_order_of_the_modes():
    shape = {"out": 5, "task": 3, "in": 6}
    net = tucker(shape, (5, 2, 4))
    assert {term.legs[0]: net.ranks[term.legs[1]] for term in net.legs.terms[:-1]} == {
        "in": 4,
        "out": 5,
        "task": 2,
    }


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "2", None])
def test_a_rank_is_a_positive_integer(name, bad):
    shape = dict.fromkeys(usual_modes(name), 3)
    bonds = formats[name].legs(shape).bonds(shape)
    for rank in (bad, {**dict.fromkeys(bonds, 1), bonds[-1]: bad}):
        with pytest.raises(
            ValueError, match=r"rank of bond '\w+' must be an integer >= 1|ranks were"
        ):
            formats[name](shape, rank)


@pytest.mark.parametrize(
    ("make", "rank", "says"),
    [
        (cp, (2, 2), r"2 ranks were given, \(2, 2\); the bonds are r"),
        (cp, {"q": 2}, "ranks were given for q; the bonds are r"),
        (cp, {}, "ranks were given for no bond; the bonds are r"),
        (cp, {"r": 2, "q": 2}, "ranks were given for r, q; the bonds are r"),
        (tucker, (2, 2), "2 Tucker ranks .* for the 5 modes layer, head, matrix, in, out"),
        (tucker, {"p": 2}, "ranks were given for p; the bonds are p, q, s, t, u"),
        (tt, (2, 2, 2), r"3 ranks were given, .* the bonds are a, b, c, d"),
        (tt, (2, 2, 2, 2, 2, 1), "6 ranks were given"),
        (tt, (1, 2, 2, 2, 2), "5 ranks were given"),
        (tt, (0, 2, 2, 2), "the rank of bond 'a' must be an integer >= 1; found 0"),
    ],
)
def test_ranks_that_do_not_fit_the_bonds(make, rank, says):
    with pytest.raises(ValueError, match=says):
        make(SHAPE, rank)


def test_a_rank_too_large_is_cut_with_a_warning():
    with pytest.warns(
        UserWarning, match=r"were cut: s from 9 to 2, t from 9 to 3, u from 9 to 4, in"
    ):
        net = tucker((3, 2, 4, 20, 20), 9)
    assert net.ranks == {"p": 9, "q": 9, "s": 2, "t": 3, "u": 4}
    with pytest.warns(UserWarning, match=r"a from 100 to 6.*\n    in a, layer a b, matrix b c"):
        tt(SHAPE, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cp(SHAPE, 100).ranks == {"r": 100}  # CP may need more than any mode has


@examples(60)
@given(data=st.data())
def test_train_limits_are_those_of_successive_svds(data):
    shape = data.draw(registered_shapes("tt"))
    asked = data.draw(st.integers(1, 40))
    net = build("tt", shape, asked)
    sizes = [net.sizes[term.legs[0]] for term in net.legs.terms]
    svds = tensor_train(np.random.default_rng(0).normal(size=sizes), asked).rank
    assert (1, *net.ranks.values(), 1) == tuple(svds)
    checked = validate_tt_rank(sizes, asked, allow_overparametrization=False)
    assert all(found <= limit for found, limit in zip(net.ranks.values(), checked[1:-1]))


@examples(40)
@given(data=st.data())
def test_tucker_limits_are_tight(data):
    shape = data.draw(registered_shapes("tucker"))
    bonds = formats["tucker"].legs(shape).bonds(shape)
    net = build("tucker", shape, data.draw(sized(bonds, lambda _: 9, 600)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(generator=generator())
    dense = reference.dense(net.split)
    for term in net.legs.terms[:-1]:
        unfolding = np.moveaxis(dense, net.open_legs.index(term.legs[0]), 0)
        found = np.linalg.matrix_rank(unfolding.reshape(len(unfolding), -1), tol=1e-9)
        assert found == net.ranks[term.legs[1]]


def shrunk(net, bond, pair):
    """Two parameters of the same product over a bond, which is as small as an SVD makes it."""
    names, tensors = zip(*((net.legs.terms[k].legs, net.tensors[k].detach()) for k in pair))
    shared = [leg for leg in names[0] if leg in names[1] and leg != bond]
    flat, orders = [], []
    for legs, tensor in zip(names, tensors):
        orders.append([*shared, *(leg for leg in legs if leg not in (*shared, bond)), bond])
        moved = tensor.permute([legs.index(leg) for leg in orders[-1]])
        flat.append(moved.reshape(*moved.shape[: len(shared)], -1, moved.shape[-1]))
    u, s, vh = torch.linalg.svd(flat[0] @ flat[1].mT, full_matrices=False)
    halves = []
    for legs, order, half in zip(names, orders, (u * s[..., None, :], vh.mT)):
        tensor = half.reshape(*(net.sizes[leg] for leg in order[:-1]), -1)
        halves.append(tensor.permute([order.index(leg) for leg in legs]))
    return halves


def gathered(net, bond, carriers):
    """The parameters of a bond with every entry of their product in one of them, which makes the bond
    smallest, and ones and zeros in the others."""
    legs = {k: [leg for leg in net.legs.terms[k].legs if leg != bond] for k in carriers}
    every = list(dict.fromkeys(leg for own in legs.values() for leg in own))
    lacked = {k: [leg for leg in every if leg not in own] for k, own in legs.items()}
    holder = min(carriers, key=lambda k: math.prod(net.sizes[leg] for leg in lacked[k]))
    letters = dict(zip([*every, bond], string.ascii_letters))

    def word(names):
        return "".join(letters[name] for name in names)

    terms = [net.legs.terms[k].legs for k in carriers]
    inputs = ",".join(map(word, terms))
    order = [*legs[holder], *lacked[holder]]
    entries = torch.einsum(f"{inputs}->{word(order)}", [net.tensors[k].detach() for k in carriers])
    positions = [net.sizes[leg] for leg in lacked[holder]]
    found = {}
    for k in carriers:
        if k == holder:
            tensor = entries.reshape(*(net.sizes[leg] for leg in legs[k]), -1)
        else:
            tensor = torch.ones(
                [*(net.sizes[leg] for leg in legs[k]), *positions], dtype=entries.dtype
            )
            for at, leg in enumerate(lacked[holder]):
                if leg in legs[k]:
                    shape = [1] * tensor.dim()
                    shape[legs[k].index(leg)] = shape[len(legs[k]) + at] = net.sizes[leg]
                    tensor = tensor * torch.eye(net.sizes[leg], dtype=entries.dtype).view(shape)
            tensor = tensor.reshape(*(net.sizes[leg] for leg in legs[k]), -1)
        own = [*legs[k], bond]
        found[k] = tensor.permute([own.index(leg) for leg in net.legs.terms[k].legs])
    return found


@examples(100)
@given(line=lines(), seed=seeds, data=st.data())
def test_a_network_of_limited_ranks_represents_all_that_the_larger_one_did(line, seed, data):
    text, modes = line
    legs = Legs.parse(text)
    sizes = {mode: data.draw(st.integers(1, 2)) for mode in modes}
    sizes |= data.draw(sized(legs.bonds(modes), lambda _: 9, 300))
    small = large = network_of(text, modes, sizes, seed)
    joined = {
        bond: at
        for bond, at in legs.carriers.items()
        if bond not in modes and (len(at) == 2 or not any(legs.terms[k].frozen for k in at))
    }
    for bond in [*joined] * len(joined):  # a bond that shrinks lets its neighbours shrink
        tensors, at = list(small.tensors), joined[bond]
        found = (
            dict(zip(at, shrunk(small, bond, at))) if len(at) == 2 else gathered(small, bond, at)
        )
        if all(found[k].numel() < tensors[k].numel() for k in at):
            tensors = [found.get(k, tensor) for k, tensor in enumerate(tensors)]
            small = Network(text, [tensor.detach() for tensor in tensors], modes)
    assert small.ranks == legs.limits(sizes, modes)
    np.testing.assert_allclose(reference.dense(small), reference.dense(large), atol=1e-8)


@pytest.mark.parametrize("wrong", [100.5, 0, True, float("inf"), float("nan"), "100"])
def test_a_budget_is_a_whole_number(wrong):
    with pytest.raises(ValueError, match="1 or more"):
        decomp.budget({"layer": 4, "in": 12, "out": 8}, wrong)


def test_a_budget_lists_what_can_be_made():
    line = "in.1:2 out.1:2, in.2:3 out.2:2"
    shape = {"in": 6, "out": 4}
    table = decomp.budget(shape, 100, [line, f"{line} (full)".replace(",", " (full),")])
    assert "(full)" in table.refused[line]
    assert [row.parameters for row in table] == [10]


def test_formats_with_more_legs_than_letters_say_so():
    for name in ("tt_lora", "loretta", "tt"):
        with pytest.raises(decomp.LegsError, match="52"):
            decomp.get_format(name).legs({"in": (2,) * 14, "out": (2,) * 14, "layer": 2}).sizes([])


def test_ranks_are_suggested_in_any_order():
    truth = decomp.tt({"layer": 3, "in": 6, "out": 4}, 2, init="normal", dtype=torch.float64)
    for ranks in ((1, 2), (2, 1), (3, 2, 1), (1, 2, 3)):
        assert decomp.suggest_rank(truth, "tt", ranks).suggested.rank == 2
