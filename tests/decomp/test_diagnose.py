"""Diagnostics and tables of ranks against dense definitions."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import FORMATS, KINDS, build, examples, generator, networks, small

from lortalib.decomp import (
    Network,
    NetworkView,
    RankRow,
    RankTable,
    Shape,
    block_term,
    budget,
    canonical,
    component_norms,
    conditioning,
    congruence,
    core_consistency,
    cp,
    distance,
    fit,
    formats,
    gram,
    lora,
    multilinear_ranks,
    network,
    norm,
    singular_values,
    suggest_rank,
    tucker,
)
from lortalib.decomp._suggest import _mask

SHAPE = {"layer": 4, "in": 7, "out": 6}


def summands(net, bond):
    """The dense summands of the sum over a bond."""
    found = []
    for k in range(net.sizes[bond]):
        tensors = []
        for term, tensor in zip(net.legs.terms, net.tensors):
            if bond in term.legs:
                tensor = tensor.detach().narrow(term.legs.index(bond), k, 1)
            tensors.append(tensor.detach())
        legs = str(net.legs.unhashed).replace(" (tied)", "")
        found.append(reference.dense(Network(legs, tensors, net.modes)))
    return found


@pytest.mark.parametrize("kind", KINDS)
@examples(5)
@given(data=st.data())
def test_multilinear_ranks_are_those_of_the_unfoldings(kind, data):
    net = data.draw(networks(kind))
    dense = reference.dense(net)
    assume(np.abs(dense).max() > 1e-3)
    found = multilinear_ranks(net, tolerance=1e-6)
    for axis, mode in enumerate(net.modes):
        values = np.linalg.svd(np.moveaxis(dense, axis, 0).reshape(dense.shape[axis], -1))[1]
        sure = (values > 1e-5 * values[0]).sum(), (values > 1e-7 * values[0]).sum()
        assert sure[0] <= found[mode] <= sure[1]


@pytest.mark.parametrize("kind", KINDS)
@examples(8)
@given(data=st.data())
def test_norms_and_cosines_are_those_of_the_summands(kind, data):
    net = data.draw(networks(kind).filter(lambda net: net.ranks))
    bond = data.draw(st.sampled_from(list(net.ranks)))
    parts = [part.ravel() for part in summands(net, bond)]
    norms = np.array([np.linalg.norm(part) for part in parts])
    np.testing.assert_allclose(component_norms(net, bond).numpy(), norms, rtol=1e-7, atol=1e-7)
    assume(norms.min() > 1e-4)
    cosines = np.array([[a @ b for b in parts] for a in parts]) / np.outer(norms, norms)
    np.testing.assert_allclose(congruence(net, bond=bond).numpy(), cosines, atol=1e-6)


def test_two_networks_are_compared_whatever_their_lines():
    one, other = cp(SHAPE, 3, init="normal"), cp(SHAPE, 3, init="normal")
    with torch.no_grad():
        for mine, yours in zip(one.tensors, other.tensors):
            yours.copy_(-2 * mine[:, [2, 0, 1]])
    found = congruence(one, other).float()
    torch.testing.assert_close(found.gather(1, torch.tensor([[1], [2], [0]])), -torch.ones(3, 1))
    assert congruence(one, block_term(SHAPE, 2, init="normal")).shape == (3, 2)
    with pytest.raises(ValueError, match="same modes and sizes"):
        congruence(one, cp({**SHAPE, "layer": 5}, 3))


def test_the_bond_that_numbers_summands_is_found_or_asked_for():
    net = block_term(SHAPE, {"n": 2, "p": 3, "q": 3, "t": 3}, init="normal")
    assert component_norms(net).shape == (2,)
    with pytest.raises(ValueError, match=r"say which bond .* p, q, t"):
        component_norms(tucker(SHAPE, 2))
    with pytest.raises(ValueError, match="no bond 'x': the bonds are r"):
        congruence(cp(SHAPE, 2), bond="x")
    with pytest.raises(ValueError, match="there is none"):
        component_norms(Network("in", [torch.ones(3)], ["in"]))


def test_core_consistency_is_that_of_the_best_core():
    net = cp(SHAPE, 2, init="normal", dtype=torch.float64, generator=generator(4))
    target = torch.randn(*SHAPE.values(), dtype=torch.float64, generator=generator(5))
    factors = {term.legs[0]: tensor.detach() for term, tensor in zip(net.legs.terms, net.tensors)}
    big = torch.kron(torch.kron(factors["layer"], factors["in"]), factors["out"])
    core = torch.linalg.lstsq(big, target.reshape(-1, 1)).solution.reshape(2, 2, 2)
    core[0, 0, 0] -= 1
    core[1, 1, 1] -= 1
    expected = 100 * (1 - core.square().sum().item() / 2)
    assert core_consistency(net, target) == pytest.approx(expected, rel=1e-9)
    assert core_consistency(net, net) == pytest.approx(100)
    assert core_consistency(net, net.dense()) == pytest.approx(100)
    with pytest.raises(ValueError, match="defined for CP"):
        core_consistency(tucker(SHAPE, 2), target)
    with pytest.raises(ValueError, match="the target has"):
        core_consistency(net, target[0])


@pytest.mark.parametrize("name", FORMATS)
def test_conditioning_is_that_of_the_scaled_gram_matrix(name):
    net = small(name, generator=generator(8))
    found = conditioning(net)
    assert found.keys() == set(net.names)
    for k, own in enumerate(net.names):
        matrices = gram(net, k).detach()
        diagonal = matrices.diagonal(dim1=-2, dim2=-1).sqrt()
        scaled = matrices / diagonal.unsqueeze(-1) / diagonal.unsqueeze(-2)
        values = torch.linalg.eigvalsh(scaled)
        expected = (values[..., -1] / values[..., 0]).max().item()
        if 0 < expected < 1e8 and net.names.count(own) == 1:
            assert found[own] == pytest.approx(expected, rel=1e-5)
        elif net.names.count(own) == 1:
            assert found[own] > 1e7


@pytest.mark.parametrize("name", ["indscal", "rescal"])
def test_a_parameter_of_two_terms_has_the_larger_of_their_numbers(name):
    for seed in range(4):
        net = small(name, generator=generator(seed))
        wide = NetworkView(net.legs.unhashed, net.tensors, net.modes)
        wanted = []
        for k in (0, 1):  # the same parameter, with other surroundings
            matrix = gram(wide, k).detach()
            root = matrix.diagonal().sqrt()
            wanted.append(torch.linalg.cond(matrix / root / root[:, None]).item())
        assert conditioning(net)[net.names[0]] == pytest.approx(max(wanted), rel=1e-5)


def test_a_tolerance_is_a_fraction_of_the_singular_values():
    sides = torch.eye(3, dtype=torch.float64)
    values = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    net = Network("in r, out r", [sides, sides * values], ["in", "out"])
    for tolerance, rank in ((1e-1, 1), (2e-2, 1), (5e-3, 2), (2e-4, 2), (5e-5, 3)):
        assert multilinear_ranks(net, tolerance=tolerance) == {"in": rank, "out": rank}


def test_equal_components_are_not_determined():
    net = cp(SHAPE, 2, init="normal", dtype=torch.float64)
    with torch.no_grad():
        for tensor in net.tensors:
            tensor[:, 1] = tensor[:, 0]
    assert set(conditioning(net).values()) == {float("inf")}


# --- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("line", ["tucker", "cp", "in a, layer a b, out b"])
def test_the_rank_of_a_tensor_is_suggested(line, noise):
    shape = {"layer": 6, "in": 8, "out": 7}
    if line == "cp":
        truth = Network(
            formats["cp"].legs(shape),
            [torch.randn(n, 3, dtype=torch.float64, generator=generator(n)) for n in (8, 7, 6)],
            list(shape),
        )
    else:
        truth = formats["tucker" if line == "tucker" else "tt"](
            shape, 3, init="normal", dtype=torch.float64, generator=generator(1)
        )
    dense = truth.dense().detach()
    extra = torch.randn(dense.shape, generator=generator(2), dtype=torch.float64)
    dense = dense + noise * extra * dense.norm() / extra.norm()
    table = suggest_rank(dense, line, (1, 2, 3, 4, 5), modes="layer in out", restarts=1, sweeps=100)
    assert table.suggested.rank == 3
    assert "<- suggested" in repr(table).split("\n")[3]
    errors = [row.error for row in table]
    assert errors == sorted(errors, reverse=True) or errors[2] < 1e-5
    assert table[2].held_out < 0.5
    if line == "cp":
        assert table[2].core_consistency > 90
    else:
        assert table[2].core_consistency is None


def test_the_held_out_error_is_that_of_entries_that_the_fit_does_not_see():
    shape = {"layer": 5, "in": 6, "out": 7}
    dense = torch.randn(*shape.values(), dtype=torch.float64, generator=generator(2))
    options = {"modes": "layer in out", "sweeps": 8}
    table = suggest_rank(dense, "cp", (1, 3), held_out=0.3, generator=generator(3), **options)
    seen = _mask(dense, 0.3, generator(3))
    for row in table:
        net = fit(dense, "cp", row.rank, mask=seen, **options).network
        gap = (net.dense().detach() - dense)[~seen].norm() / dense[~seen].norm()
        assert row.held_out == pytest.approx(gap.item(), rel=1e-6)
        assert row.held_out > row.error  # of noise nothing can be foretold


def test_networks_have_no_entries_to_hold_out():
    shape = {"layer": 4, "matrix": 2, "in": 8, "out": 8}
    trained = lora(shape, 1, init="normal", dtype=torch.float64)
    table = suggest_rank(trained, "in p, layer matrix p q, out q", (1, 2, 4, 8), sweeps=30)
    assert [row.held_out for row in table] == [None] * 4
    assert table[3].error < 1e-4
    assert [row.parameters for row in table] == [24, 64, 192, 640]


def test_what_says_nothing_about_ranks_is_refused():
    dense = torch.ones(2, 3, 4)
    for options, says in [
        ({"ranks": (2,)}, "at least two ranks"),
        ({"held_out": 0.95}, "a fraction from 0 to 0.9"),
        ({"mask": dense}, "leave out mask"),
    ]:
        with pytest.raises(ValueError, match=says):
            suggest_rank(dense, "cp", modes="layer in out", **options)
    table = budget(SHAPE, 100)
    with pytest.raises(LookupError, match="suggests none"):
        table.suggested  # noqa: B018
    with pytest.raises(ValueError, match="1 or more"):
        budget(SHAPE, 0)


@examples(20)
@given(
    parameters=st.integers(1, 5000),
    shape=st.fixed_dictionaries(
        {m: st.integers(1, 9) for m in ("layer", "head", "matrix", "in", "out")}
    ),
)
def test_a_budget_is_met_from_below_by_ranks_that_count_so(parameters, shape):
    table = budget(shape, parameters)
    for row in table:
        net = build(row.format, Shape(shape), row.rank)
        assert net.count() == row.parameters <= parameters
        assert net.ranks == row.rank
        legs = net.legs
        for bond in row.rank:
            more = {**row.rank, bond: row.rank[bond] + 1}
            limited = legs.limits({**shape, **more}, net.modes)
            if limited == more and not formats[row.format].symmetric:
                assert build(row.format, Shape(shape), more).count() > parameters
    assert [row.parameters for row in table] == sorted((r.parameters for r in table), reverse=True)


def test_a_budget_lists_the_formats_that_fit_the_modes():
    found = {row.format for row in budget((12, 12, 4, 768, 64), 50_000)}
    sides_for_each_slice = {"lora", "jd", "jd_diag"}  # 73,728 for each rank
    others = {"metatt_41d", "indscal", "rescal", "uni_lora"}
    assert found == set(FORMATS) - sides_for_each_slice - others
    square = {"layer": 3, "matrix": 2, "in": 8, "out": 8}
    assert {"indscal", "rescal", *sides_for_each_slice} < {
        row.format for row in budget(square, 10_000)
    }


def test_a_table_prints_what_it_has():
    table = RankTable((RankRow("cp", 2, 1234, 0.5), RankRow("tt", {"a": 1, "b": 2}, 56, 0.25)), 1)
    assert repr(table).split("\n") == [
        "format  rank     parameters  error",
        "cp      2        1,234       0.5",
        "tt      a=1 b=2  56          0.25   <- suggested",
    ]
    assert len(table) == 2
    assert table.suggested is table[1]


def multiplied(net, size):
    """The network times a number, whose parameters of other networks are not touched."""
    tensors = [tensor.detach() for tensor in net.tensors]
    return Network(net.legs, [tensors[0] * size, *tensors[1:]], net.modes)


@pytest.mark.parametrize("size", [1e-200, 1e-160, 1e160, 1e200])
@pytest.mark.parametrize("line", ["cp", "tt"])
def test_sizes_whose_squares_are_no_numbers(line, size):
    one, other = (
        network(line, SHAPE, 2, init="normal", dtype=torch.float64, generator=generator(seed))
        for seed in (1, 2)
    )
    near, far = multiplied(one, size), multiplied(other, size)
    torch.testing.assert_close(norm(near) / size, norm(one))
    torch.testing.assert_close(norm(near, over="in") / size, norm(one, over="in"))
    torch.testing.assert_close(distance(near, far) / size, distance(one, other))
    torch.testing.assert_close(distance(near, one), norm(one) if size < 1 else norm(near))
    bond = next(iter(one.ranks))
    torch.testing.assert_close(component_norms(near, bond) / size, component_norms(one, bond))
    torch.testing.assert_close(
        congruence(near, far, bond), congruence(one, other, bond), rtol=1e-6, atol=1e-8
    )
    for mode, values in singular_values(one).items():
        torch.testing.assert_close(singular_values(near)[mode] / size, values, rtol=1e-6, atol=1e-6)
    assert multilinear_ranks(near) == multilinear_ranks(one)
    assert conditioning(near) == pytest.approx(conditioning(one))
    torch.testing.assert_close(canonical(near).dense() / size, one.dense())


def test_norms_have_gradients_at_any_size():
    tensors = [torch.randn(n, 2, dtype=torch.float64, generator=generator(n)) for n in (4, 7)]
    first = (tensors[0] * 1e200).requires_grad_()
    legs = network("in r, out r", {"in": 4, "out": 7}, 2).legs
    net = NetworkView(legs, [first, tensors[1]], ("in", "out"))
    norm(net).backward()
    plain = tensors[0].clone().requires_grad_()
    norm(NetworkView(legs, [plain, tensors[1]], ("in", "out"))).backward()
    torch.testing.assert_close(first.grad, plain.grad)
