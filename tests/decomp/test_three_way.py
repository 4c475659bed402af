"""A network in three: two sides without a mode, and a middle that has it; and the mark (shared)."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, examples, generator, networks

from lortalib import decomp
from lortalib.decomp import Legs, LegsError, Network, Term, mark_shared, network, three_way_plan

ENDS = ("in", "head", "out")


@st.composite
def with_users(draw, kind):
    """A network of a kind, some of whose parameters got a leg ``user``."""
    net = draw(networks(kind))
    legs, tensors = net.legs.unhashed, list(net.tensors)
    own = draw(st.sets(st.sampled_from(range(len(tensors))), min_size=1))
    terms = [
        Term(("user", *term.legs) if k in own else term.legs) for k, term in enumerate(legs.terms)
    ]
    source = generator(draw(st.integers(0, 99)))
    tensors = [
        torch.randn((2, *t.shape), generator=source, dtype=t.dtype) if k in own else t.detach()
        for k, t in enumerate(tensors)
    ]
    return Network(Legs(tuple(terms)), tensors, ("user", *net.modes))


def products(cut, place, x):
    """What the three maps of one slice make of x, by loops: (head * out)."""
    a, middle, b = (t[tuple(k % n for k, n in zip(place, t.shape))].numpy() for t in cut)
    _, c, p, q = middle.shape
    h = (a @ x).reshape(c, p)
    found = []
    for own in middle:
        z = [[sum(own[k, i, j] * h[k, i] for i in range(p)) for j in range(q)] for k in range(c)]
        found.append(np.array(z).reshape(-1) @ b)
    return np.concatenate(found)


@pytest.mark.parametrize("kind", KINDS)
@examples(15)
@given(data=st.data())
def test_three_maps_are_the_slice(kind, data):
    net = data.draw(with_users(kind))
    over = tuple(data.draw(st.permutations([m for m in net.modes if m not in ENDS])))
    plan = three_way_plan(net, "user", *over)
    users = [{*term.legs} for term in net.legs.terms if "user" in term.legs]
    if plan is None:
        assert (
            net.modes != net.open_legs
            or any("in" in legs or "out" in legs for legs in users)
            or any(
                {"head", "out"} <= {*term.legs} or {"in", "out"} <= {*term.legs}
                for term in net.legs.terms
            )
        )
        return
    cut = plan.cut([t.detach() for t in net.tensors])
    at = over.index("user")
    assert cut.A.shape[at] == cut.B.shape[at] == 1
    assert not any("user" in net.legs.terms[k].legs for k in plan.in_side.parameters)
    assert not any("user" in net.legs.terms[k].legs for k in plan.out_side.parameters)
    dense = reference.dense(net)
    x = np.random.default_rng(0).standard_normal(net.sizes["in"])
    for place in np.ndindex(*(net.sizes[mode] for mode in over)):
        index = dict(zip(over, place))
        slice_ = dense[tuple(index.get(mode, slice(None)) for mode in net.modes)]
        left = [mode for mode in net.modes if mode not in over]
        wanted = reference.matrix(slice_, left) @ x
        found = products(cut, place, x)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


SIZES = {"user": 7, "layer": 2, "matrix": 3, "head": 4, "in": 32, "out": 16}
LINES = [
    # the line, and the size of the middle for one user, layer and matrix
    ("in r, out r, user head r, user layer r, user matrix r", 4 * 2),
    ("in r, out r, head r, user layer r, user matrix r", 2),
    ("in p, out q, user layer matrix p q, head", 4),
    (
        "in p, layer matrix p q, user q, head out q",
        4,
    ),  # the side of in is one parameter if it can be
    ("layer matrix in p, user layer matrix p q, layer matrix head out q", 4),
    ("in r, out r, user layer matrix head", 4 * 2),
]


@pytest.mark.parametrize(("line", "size"), LINES)
def test_the_middle_is_as_small_as_it_can_be(line, size):
    net = network(line, SIZES, 2)
    cut = three_way_plan(net, "user", "layer", "user", "matrix").cut(net.tensors)
    assert math.prod(cut.middle.shape[3:]) == size


def test_a_side_of_several_parameters_is_cut_off_as_a_whole():
    """The bond p, which is widest, stays within the side of in."""
    line, ranks = "in p, layer matrix p q, p q s, user s, head out q", {"p": 8, "q": 2, "s": 3}
    net = network(line, SIZES, ranks, init="normal", dtype=torch.float64)
    over = ("layer", "user", "matrix")
    plan = three_way_plan(net, "user", *over)
    assert (plan.in_side.parameters, plan.middle.parameters) == ((0, 1, 2), (3,))
    place, x = (1, 4, 2), np.random.default_rng(0).standard_normal(SIZES["in"])
    slice_ = net.select(dict(zip(over, place)))
    wanted = reference.matrix(reference.dense(slice_), slice_.modes) @ x
    found = products(plan.cut([t.detach() for t in net.tensors]), place, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "line",
    [
        "user in r, out r, head r, layer r, matrix r",
        "in r, user out r, head r, layer r, matrix r",
        "in r, head out r, user head layer r, matrix r",
        "user layer matrix in r, user layer matrix head out r",
    ],
)
def test_a_side_that_needs_the_mode_has_no_middle(line):
    assert three_way_plan(network(line, SIZES, 2), "user", "layer", "user", "matrix") is None


def test_a_mode_that_nothing_carries_has_no_middle():
    net = network("in r, out r", {"in": 4, "out": 3}, 2)
    assert three_way_plan(net, "user") is None


def test_gradients_are_those_of_the_dense_tensor():
    line = "in r, out r, user head r, user layer r, user matrix r"
    net = network(line, SIZES, 2, init="normal", dtype=torch.float64)
    order = ("layer", "user", "matrix")
    a, middle, b = three_way_plan(net, "user", *order).cut(net.tensors)
    made = torch.einsum("lumci,lumhcpq,lumco->lumhoi", a, middle, b)
    dense = net.dense().permute([net.modes.index(m) for m in (*order, "head", "out", "in")])
    weight = torch.randn(dense.shape, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad((weight * each).sum(), list(net.parameters()), retain_graph=True)
        for each in (made, dense)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("line", "names", "wanted"),
    [
        ("in r, out r, layer r", ["in", "out"], "in r (shared), out r (shared), layer r"),
        ("in r, out r (tied), layer r", ["out"], "in r (shared), out r (tied), layer r"),
        ("in p (frozen), out q, p q", ["p"], "in p (frozen, shared), out q, p q (shared)"),
        (
            "in r (of n), out r (of n, zero), layer r",
            ["in"],
            "in r (of n, shared), out r (of n, zero, shared), layer r",
        ),
        ("in r, out r", [], "in r, out r"),
    ],
)
def test_parameters_are_marked_by_a_leg(line, names, wanted):
    found = mark_shared(Legs.parse(line), names)
    text = ", ".join(str(term).replace(") (", ", ") for term in found.terms)
    assert text == wanted
    assert Legs.parse(str(found)) == found


def test_a_leg_that_is_not_there_is_refused():
    with pytest.raises(LegsError, match=r"no parameter carries the leg 'inn' \(did you mean 'in'"):
        mark_shared(Legs.parse("in r, out r"), ["inn"])


def test_one_vector_is_shared_or_not():
    with pytest.raises(LegsError, match=r"all or none are \(shared\)"):
        network("in r (of n, shared), out r (of n, zero)", {"in": 4, "out": 3}, 2)


def test_a_split_mode_is_shared_with_all_its_factors():
    legs = decomp.Legs.parse("in.1 r, in.2 r, out r, layer r")
    assert (
        str(decomp.mark_shared(legs, ["in"])) == "in.1 r (shared), in.2 r (shared), out r, layer r"
    )
    with pytest.raises(decomp.LegsError, match="'head'"):
        decomp.mark_shared(legs, ["head"])
