"""Canonical forms, rounding and conversion: exact where they say so, with the error that they report."""

import contextlib
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from strategies import FORMATS, build, examples, generator, networks, registered, seeds, small

from lortalib.decomp import (
    Legs,
    Network,
    absorb,
    canonical,
    convert,
    cp,
    direct_sum,
    formats,
    get_format,
    gram,
    lora,
    network,
    tt,
)
from lortalib.decomp import round as rounded

FROZEN = ["lora_xs", "vera"]
LOOPS = ["block_term", "ring"]
COMPONENTS = ["cara", "cp", "cp_matrix", "folded_cp", "indscal", "jd_diag"]
TREES = [n for n in FORMATS if n not in (*FROZEN, *LOOPS, *COMPONENTS, "rescal")]
#: Trees that no format has: a hierarchy, one with a shared mode along a path, and a star.
SHAPE = {"task": 2, "layer": 3, "matrix": 2, "in": 5, "out": 4}
LINES = [
    "in a, layer b, a b c, matrix d, out e, d e f, c f g, task g",
    "layer in p, layer p q, q r, out r, matrix task q2, q2 r2 q3, r2, q3",
    "layer matrix in r, layer matrix out task r",
    "in s, layer s t u v, out t, matrix u, task v",
]


def of_line(line, seed=0, rank=3):
    legs = Legs.parse(line)
    source = generator(seed)
    sizes = {leg: SHAPE.get(leg, rank) for leg in legs.carriers}
    tensors = [
        torch.randn([sizes[leg] for leg in t.legs], generator=source, dtype=torch.float64)
        for t in legs.terms
    ]
    return Network(legs, tensors, tuple(SHAPE))


trees = st.sampled_from([LINES[0], LINES[2], LINES[3]]).flatmap(
    lambda line: st.builds(of_line, st.just(line), seeds)
) | st.sampled_from(TREES).flatmap(registered)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def tails(net, ranks):
    """For each bond of a tree, what is left of the dense tensor beyond a rank, by an SVD of its slices."""
    net = net.split  # over the factors of its modes
    dense, found = net.dense().detach(), {}
    for bond, carriers in net.legs.carriers.items():
        if bond in net.modes:
            continue
        side, queue = {carriers[0]}, [carriers[0]]
        for k in queue:
            for leg in net.legs.terms[k].legs:
                if leg not in net.modes and leg != bond:
                    queue += [j for j in net.legs.carriers[leg] if j not in side]
                    side |= set(net.legs.carriers[leg])
        near = {leg for k in side for leg in net.legs.terms[k].legs} & {*net.modes}
        far = {leg for k, t in enumerate(net.legs.terms) if k not in side for leg in t.legs}
        both = [mode for mode in net.modes if mode in near and mode in far]
        order = [*both, *(m for m in net.modes if m in near and m not in far)]
        columns = [mode for mode in net.modes if mode not in near]
        x = dense.permute([net.modes.index(mode) for mode in (*order, *columns)])
        lead = [net.sizes[mode] for mode in both]
        x = x.reshape(*lead, math.prod(net.sizes[m] for m in order[len(both) :]), -1)
        found[bond] = torch.linalg.svdvals(x)[..., ranks[bond] :].norm().item()
    return found


# --- canonical ------------------------------------------------------------------------------------


@examples(40)
@given(net=trees)
def test_a_tree_is_orthonormal_towards_its_root(net):
    assume(net.dense().any())
    for root in (None, 0, len(net.names) - 1):
        found = canonical(net, root)
        assert relative(found.dense().detach(), net.dense().detach()) < 1e-12
        assert str(found.legs) == str(net.legs.unhashed)
        top = net.legs.zero if root is None else root
        size = found.tensors[top].norm()
        torch.testing.assert_close(size, found.dense().norm(), rtol=1e-10, atol=0)
        surroundings = gram(found, top)  # in every slice over modes that the root shares
        identity = torch.eye(surroundings.shape[-1]).to(surroundings)
        torch.testing.assert_close(surroundings, identity.expand_as(surroundings))
        again = canonical(found, root)
        for one, other in zip(found.tensors, again.tensors):
            if net.legs.terms[top].legs:
                torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", COMPONENTS)
@examples(10)
@given(data=st.data())
def test_components_are_normalised_signed_and_sorted(name, data):
    net = data.draw(registered(name))
    assume(net.dense().any())
    assume(len(net.modes) > 2)
    found = canonical(net)
    torch.testing.assert_close(found.dense(), net.dense(), rtol=1e-9, atol=1e-9)
    root = net.legs.zero
    for k, term in enumerate(net.legs.terms):
        columns = found.tensors[k].detach().movedim(term.legs.index("r"), -1)
        columns = columns.reshape(-1, columns.shape[-1])  # one row where r is the only leg
        if len({*net.legs.carriers["r"]}) == 2:
            continue  # a tree of two parameters, which is made orthonormal
        if k == root:
            norms = columns.norm(dim=0)
            assert (norms[:-1] >= norms[1:] - 1e-12).all()
        else:
            largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))
            assert (largest > 0).all()
            torch.testing.assert_close(columns.norm(dim=0), torch.ones_like(columns[0]))


def test_the_order_of_components_does_not_matter():
    net = cp({"layer": 3, "in": 5, "out": 4}, 3, init="normal", dtype=torch.float64)
    tensors = [t.detach()[:, [2, 0, 1]] * s for t, s in zip(net.tensors, (-1.0, 2.0, -0.5))]
    other = Network(net.legs, tensors, net.modes)
    for one, two in zip(canonical(net).tensors, canonical(other).tensors):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (small("ring"), "closes a loop"),
        (small("block_term"), "closes a loop or joins 6 parameters"),
        (small("vera"), r"a frozen parameter keeps its numbers.*in r \(frozen\)"),
        (of_line("in layer, layer out, matrix task"), "fall into pieces"),
        (
            of_line("in layer a, a b, layer b out matrix task"),
            "'layer' stands on .* not neighbours",
        ),
    ],
)
def test_what_has_no_canonical_form_is_refused(net, says):
    with pytest.raises(ValueError, match=says):
        canonical(net)


# --- round ----------------------------------------------------------------------------------------


@examples(60)
@given(data=st.data())
def test_the_error_of_rounding_is_exact_and_bounded(data):
    net = data.draw(trees)
    dense = net.dense().detach()
    assume(dense.any())
    assume(net.ranks)
    rank = data.draw(st.integers(1, 3))
    found = rounded(net, rank=rank)
    assert found.how == "truncated singular values"
    assert found.network.ranks == {b: min(rank, found.network.ranks[b]) for b in net.ranks}
    assert found.error == pytest.approx(relative(found.network.dense().detach(), dense), abs=1e-12)
    beyond = {b: t / dense.norm().item() for b, t in tails(net, found.network.ranks).items()}
    root = math.sqrt(len(beyond))
    assert found.least <= max(beyond.values()) * (1 + 1e-9) + 1e-12
    assert found.error <= root * found.least * (1 + 1e-9) + 1e-13
    assert found.error <= math.hypot(*beyond.values()) * (1 + 1e-9) + 1e-12
    assert found.error >= max(beyond.values()) * (1 - 1e-9) - 1e-12


@examples(40)
@given(net=trees, error=st.floats(0, 0.9))
def test_an_error_is_kept_and_sums_shrink_again(net, error):
    assume(net.dense().any())
    found = rounded(net, error=error)
    assert found.error <= error + 1e-14
    assert found.error == pytest.approx(
        relative(found.network.dense().detach(), net.dense().detach()), abs=1e-12
    )
    if net.ranks:
        twice = direct_sum([net, net])
        again = rounded(twice, error=1e-12).network
        assert all(again.ranks[bond] <= size for bond, size in net.ranks.items())
        torch.testing.assert_close(again.dense(), 2 * net.dense(), rtol=1e-9, atol=1e-9)


def test_errors_far_below_the_root_of_the_precision_are_exact():
    one, two = (build("tt", (3, 2, 2, 5, 4), 2, generator=generator(k)) for k in (1, 2))
    total = direct_sum([one, two], [1.0, 1e-11])
    found = rounded(total, rank=2)
    assert 1e-13 < found.error < 1e-10
    assert found.error == pytest.approx(
        relative(found.network.dense().detach(), total.dense().detach()), rel=1e-2
    )


@pytest.mark.parametrize("name", ["ring", "cp", "indscal", "rescal", "cara"])
def test_loops_and_components_are_rounded_by_a_fit_that_says_so(name):
    net = direct_sum([small(name, rank=1, generator=generator(k)) for k in (1, 2)])
    found = rounded(net, rank=1)
    assert found.how == "fit by alternating least squares"
    assert found.least is None
    assert found.network.ranks == dict.fromkeys(net.ranks, 1)
    assert found.error == pytest.approx(
        relative(found.network.dense().detach(), net.dense().detach()), abs=1e-7
    )
    loose = rounded(net, error=0.99)
    assert loose.error <= 0.99
    assert max(loose.network.ranks.values()) == 1


def test_a_large_train_is_rounded_in_small_tensors():
    shape = {"layer": 12, "head": 12, "matrix": 4, "in": 128, "out": 64}
    net = direct_sum([tt(shape, 4, init="normal", generator=generator(k)) for k in range(3)])
    with LargestTensor() as made:
        found = rounded(net, rank=4)
    assert made.entries < 5_000
    assert 0 < found.error < 1
    assert found.network.tensors[0].dtype == torch.float32


def test_a_matrix_along_a_mode_is_absorbed_before_rounding():
    net = small("tt", generator=generator(4))
    dot = net.mode_dot(torch.randn(5, net.shape["in"], dtype=torch.float64), "in")
    with pytest.raises(ValueError, match="`absorb` contracts one into a neighbour"):
        rounded(dot, rank=1)
    found = rounded(absorb(dot, len(dot.names) - 1), rank=2)
    torch.testing.assert_close(found.network.dense(), dot.dense())


def test_a_network_without_bonds_stays_bit_for_bit():
    values = torch.randn(5, 4, dtype=torch.float64, generator=generator(1))
    found = rounded(Network("in out", [values.clone()], ("in", "out")), error=0.5)
    assert found.network.tensors[0].equal(values)
    assert found.error == 0.0


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_the_error_is_right_where_squares_are_no_numbers(size):
    net = small("tt", rank=3, generator=generator(2))
    expected = rounded(net, error=0.3)
    tensors = list(net.tensors)
    tensors[0] = tensors[0] * size
    found = rounded(Network(net.legs, tensors, net.modes), error=0.3)
    assert found.network.ranks == expected.network.ranks
    assert found.error == pytest.approx(expected.error)
    dense = expected.network.dense().detach() * size
    torch.testing.assert_close(found.network.dense().detach() / size, dense / size)


def test_what_cannot_be_rounded_is_refused():
    net = small("tt")
    for options in ({}, {"rank": 2, "error": 0.1}):
        with pytest.raises(ValueError, match="either rank= or error="):
            rounded(net, **options)
    for error in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="error is relative"):
            rounded(net, error=error)
    with pytest.raises(ValueError, match="rank of bond 'a' must be an integer >= 1; found 0"):
        rounded(net, rank=0)
    with pytest.raises(ValueError, match="ranks were given for z; the bonds are a, b, c, d"):
        rounded(net, rank={"z": 1})
    with pytest.raises(ValueError, match="no rounding"):
        rounded(small("lora_xs"), rank=1)


@pytest.mark.parametrize("options", [{"error": 1e-12}, {"rank": 9}])
@pytest.mark.parametrize("name", ["cp", "ring", "rescal"])
def test_a_line_without_a_tree_stays_as_it_is_where_no_smaller_ranks_are_asked_for(name, options):
    net = small(name, generator=generator(3))
    found = rounded(net, **options)
    assert (found.network.ranks, found.error, found.least) == (net.ranks, 0.0, None)
    assert found.how == "copy"
    for one, other in zip(found.network.tensors, net.tensors):
        assert one is not other
        assert one.equal(other)


# --- convert --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [*COMPONENTS, "vera"])
@pytest.mark.parametrize("line", [name for name in FORMATS if name not in FROZEN])
def test_components_are_written_exactly_in_any_line_that_holds_them(source, line):
    net = small(source, generator=generator(6))
    dense = net.dense().detach()
    try:
        legs = get_format(line).legs(net.shape)
        legs.check(net.modes)
    except ValueError:
        return
    holds = all(any({*t.legs} - {"r"} <= {*o.legs} for o in legs.terms) for t in net.legs.terms)
    fits_tucker = line == "tucker" and source not in (
        "cp_matrix",
        "jd_diag",
    )  # their core would be large
    refused = formats[line].symmetric or legs.vectors or not (holds or fits_tucker)
    if refused and str(legs) != str(net.legs):
        with pytest.raises(ValueError, match="no exact way"):
            convert(net, line)
        return
    found = convert(net, line)
    assert found.is_exact
    assert found.error == 0
    assert str(found.network.legs) == str(legs)
    torch.testing.assert_close(found.network.dense().detach(), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
@examples(8)
@given(data=st.data())
def test_every_network_becomes_a_tucker_or_is_too_small_for_one(name, data):
    net = data.draw(networks(name))
    dense = net.dense().detach()
    found = None
    with contextlib.suppress(ValueError):  # a core as large as the tensor
        found = convert(net, "tucker")
    if found is None:
        return
    torch.testing.assert_close(found.network.dense().detach(), dense, rtol=1e-9, atol=1e-9)
    core = found.network.tensors[-1].numel()
    assert core < dense.numel() or name == "tucker"


def test_a_mode_on_two_parameters_becomes_a_factor_of_its_own():
    """Neither of the two carries the mode alone, so no factor can be taken out of one of them."""
    shape = {"layer": 7, "in": 9, "out": 8}
    net = network("in r, layer r, layer out r", shape, 2, init="normal", dtype=torch.float64)
    found = convert(net, "tucker")
    assert found.is_exact
    torch.testing.assert_close(found.network.dense(), net.dense())
    assert found.network.ranks == {"p": 2, "q": 8, "t": 7}


def test_a_train_becomes_a_tucker_and_components_shrink_to_what_rows_can_fill():
    net = tt({"layer": 6, "in": 9, "out": 8}, 2, init="normal", dtype=torch.float64)
    assert convert(net, "tucker").network.ranks == {"p": 2, "q": 2, "t": 4}
    many = cp({"layer": 3, "in": 9, "out": 2}, 5, init="normal", dtype=torch.float64)
    assert convert(many, "tt").network.ranks["b"] == 2
    assert convert(many, "block_term").network.ranks == {"p": 1, "n": 5, "q": 1, "t": 1}
    rounding = convert(many, "tt", rank=2)
    assert "truncated singular values" in rounding.how
    assert rounding.error == pytest.approx(
        relative(rounding.network.dense().detach(), many.dense().detach()), abs=1e-12
    )


def test_other_conversions_are_fits_and_say_so():
    shape = {"layer": 3, "matrix": 1, "in": 6, "out": 5}
    trained = lora(shape, 1, init="normal", dtype=torch.float64)
    with pytest.raises(ValueError, match="no exact way from"):
        convert(trained, "cp")
    found = convert(trained, "cp", rank=3)
    assert not found.is_exact
    assert found.how == "fit by alternating least squares"
    assert found.error < 1e-4
    same = convert(trained, "lora")
    assert (same.is_exact, same.how) == (True, "copy")
    assert not {t.data_ptr() for t in same.network.tensors} & {
        t.data_ptr() for t in trained.tensors
    }
    with pytest.raises(ValueError, match="unknown leg 'head'"):
        convert(trained, "in r, out r, layer head r", 2)
    single = network("layer matrix in out", shape, 1, init="normal", dtype=torch.float64)
    assert not convert(single, "cp", rank=2).is_exact


@pytest.mark.parametrize("name", ["tt", "tucker", "lotr"])
def test_parameters_that_are_canonical_stay_as_they_are(name):
    """With any signs along a bond: the QR of orthonormal columns gives them back."""
    once = canonical(small(name, generator=generator(5)))
    bond = next(iter(once.ranks))
    flipped = []
    for term, tensor in zip(once.legs.terms, once.tensors):
        shape = [-1 if leg == bond else 1 for leg in term.legs]
        signs = torch.tensor([-1.0, 1.0] * 9, dtype=tensor.dtype)[: once.sizes[bond]]
        flipped.append(tensor.detach() * (signs.view(shape) if bond in term.legs else 1))
    for tensors in (once.tensors, flipped):
        found = canonical(Network(once.legs, [t.detach().clone() for t in tensors], once.modes))
        for one, two in zip(tensors, found.tensors):
            torch.testing.assert_close(one, two)
