"""Ranks that change: what is kept of the tensor, and how gradients and averages of them follow."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from strategies import FORMATS, examples, generator, random_networks, registered, seeds, small

from lortalib.decomp import Network, direct_sum, grow, network, prune, tt
from lortalib.decomp import round as rounded

FIXED = ["lora_xs", "uni_lora", "vera"]
CHANGING = [name for name in FORMATS if name not in FIXED]
#: Lines whose bonds form no tree, or with tied parameters.
CHOOSING = [
    "block_term",
    "cara",
    "cp",
    "cp_matrix",
    "folded_cp",
    "indscal",
    "jd_diag",
    "rescal",
    "ring",
]
TREES = [name for name in CHANGING if name not in CHOOSING]
each = pytest.mark.parametrize("name", CHANGING)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def along(tensor, axis, matrix, batch_axes):
    """A tensor multiplied along one axis, entry by entry of the batch: the definition."""
    moved = tensor.movedim(batch_axes, list(range(len(batch_axes)))) if batch_axes else tensor
    rest = axis - sum(k < axis for k in batch_axes) + len(batch_axes)
    moved = moved.movedim(rest, -1)
    lead = math.prod(moved.shape[: len(batch_axes)])
    flat, maps = moved.reshape(lead, -1, moved.shape[-1]), matrix.reshape(lead, *matrix.shape[-2:])
    out = torch.stack([one @ m.T for one, m in zip(flat, maps)])
    out = out.reshape(*moved.shape[:-1], matrix.shape[-2]).movedim(-1, rest)
    return out.movedim(list(range(len(batch_axes))), batch_axes) if batch_axes else out


def mapped(change, position, tensor, matrix_of):
    legs = change.network.legs.terms[position].legs
    for bond, each in change.maps[position].items():
        batch = [legs.index(mode) for mode in each.batch]
        tensor = along(tensor, legs.index(bond), matrix_of(each), batch)
    return tensor


def lifted(change, net):
    """The new network in the old coordinates."""
    tensors = [
        mapped(change, k, tensor.detach(), lambda each: each.gradients.mT)
        for k, tensor in enumerate(change.network.tensors)
    ]
    return Network(net.legs, [tensors[owner] for owner in net.legs.owners], net.modes)


def gradients(net, target):
    loss = (net.dense() * target).sum() + net.dense().square().sum()
    loss.backward()
    return [tensor.grad for tensor in net.stored]


def draw_change(data, name):
    net = data.draw(registered(name))
    assume(net.ranks)
    assume(net.dense().any())
    rank = data.draw(st.integers(1, 6))
    if data.draw(st.booleans()):
        return net, grow(net, rank, generator=generator(data.draw(seeds)))
    return net, prune(net, rank)


@each
@examples(12)
@given(data=st.data())
def test_pruning_makes_the_error_that_it_reports(name, data):
    net = data.draw(registered(name))
    before, dense = [t.detach().clone() for t in net.stored], net.dense().detach()
    assume(dense.any())
    rank = data.draw(st.integers(1, 4))
    found = prune(net, rank)
    assert all(size <= rank for size in found.network.ranks.values())
    assert str(found.network.legs) == str(net.legs)
    made = relative(found.network.dense().detach(), dense)
    assert found.error == pytest.approx(made, abs=1e-7)
    assert all(map(torch.equal, before, net.stored))
    for k, tensor in enumerate(found.network.tensors):
        torch.testing.assert_close(found.value(k, net.tensors[k]), tensor.detach())
    if name in TREES:
        assert found.error == pytest.approx(made, abs=1e-12)
        least = rounded(net, rank=found.network.ranks).least
        assert found.error <= math.sqrt(len(net.ranks)) * least * (1 + 1e-9) + 1e-13


@each
@examples(12)
@given(data=st.data())
def test_growing_changes_no_value_and_gives_every_new_direction_a_gradient(name, data):
    net = data.draw(registered(name))
    assume(net.dense().any())
    rank = data.draw(st.integers(1, 6))
    found = grow(net, rank, generator=generator(data.draw(seeds)))
    limits = net.legs.limits({**net.sizes, **dict.fromkeys(net.ranks, rank)}, net.modes)
    assert found.network.ranks == {b: max(size, limits[b]) for b, size in net.ranks.items()}
    torch.testing.assert_close(found.network.dense(), net.dense(), rtol=1e-12, atol=1e-12)
    for old, new in zip(net.tensors, found.network.tensors):
        assert torch.equal(new[tuple(slice(size) for size in old.shape)], old)
    target = torch.randn(net.dense().shape, generator=generator(1), dtype=torch.float64)
    (found.network.dense() * target).sum().backward()
    for bond, size in net.ranks.items():
        ends = found.network.legs.carriers[bond]
        grads = [
            found.network.stored[k].grad.movedim(net.legs.terms[k].legs.index(bond), 0)[size:]
            for k in ends
        ]
        for position in range(found.network.ranks[bond] - size):
            assert any(grad[position].any() for grad in grads)


@each
@examples(15)
@given(data=st.data())
def test_the_new_network_in_the_old_coordinates_is_the_same_tensor(name, data):
    net, change = draw_change(data, name)
    same = lifted(change, net).dense()
    torch.testing.assert_close(same, change.network.dense(), rtol=1e-7, atol=1e-9)
    for maps in change.maps:
        for each_map in maps.values():
            if each_map.gradients.shape[-2] <= each_map.gradients.shape[-1]:
                product = each_map.gradients @ each_map.values.mT
                identity = torch.eye(product.shape[-1]).to(product).expand_as(product)
                torch.testing.assert_close(product, identity, rtol=1e-7, atol=1e-7)


@each
@examples(15)
@given(data=st.data())
def test_a_carried_gradient_is_the_gradient_in_the_new_coordinates(name, data):
    net, change = draw_change(data, name)
    target = torch.randn(net.dense().shape, generator=generator(1), dtype=torch.float64)
    old = gradients(lifted(change, net), target)
    new = gradients(change.network, target)
    is_growth = change.network.count() > net.count()
    for k, (one, two) in enumerate(zip(old, new)):
        carried = change.gradient(k, one)
        expected = mapped(change, k, one, lambda each: each.gradients)
        torch.testing.assert_close(carried, expected, rtol=1e-10, atol=1e-10)
        if is_growth:  # the old coordinates alone: new directions have gradients of their own
            at = tuple(slice(size) for size in one.shape)
            carried, two = carried[at], two[at]
        scale = two.abs().max().clamp(min=1).item()
        torch.testing.assert_close(carried / scale, two / scale, rtol=1e-6, atol=1e-7)


@each
@examples(10)
@given(data=st.data())
def test_squares_follow_the_diagonal_of_a_covariance(name, data):
    _, change = draw_change(data, name)
    for k, maps in enumerate(change.maps):
        shape = [
            each.values.shape[-1] if (each := maps.get(leg)) else change.network.sizes[leg]
            for leg in change.network.legs.terms[k].legs
        ]
        squares = torch.rand(shape, generator=generator(k), dtype=torch.float64)
        carried = change.square(k, squares)
        assert carried.shape == change.network.tensors[k].shape
        assert (carried >= 0).all()
        if all(each.gradients.shape[-2] < each.gradients.shape[-1] for each in maps.values()):
            expected = mapped(change, k, squares, lambda each: each.gradients.square())
            torch.testing.assert_close(carried, expected)


def test_a_new_coordinate_has_the_mean_of_the_old_squares():
    change = grow(small("cp", rank=2), 3)
    squares = torch.tensor([[1.0, 3.0], [5.0, 9.0], [0.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    assert change.square(0, squares).tolist() == [[1, 3, 2], [5, 9, 7], [0, 1, 0.5], [2, 2, 2]]


@pytest.mark.parametrize("name", ["cp", "ring", "indscal", "cp_matrix"])
def test_a_step_with_momentum_is_the_same_step_in_both_coordinates(name):
    """Where components are chosen the map is orthogonal, so parameters and momentum follow alike."""
    net = small(name, rank=3, generator=generator(2))
    change = prune(net, 2)
    old, new = lifted(change, net), change.network
    target = torch.randn(net.dense().shape, generator=generator(1), dtype=torch.float64)
    momenta = [torch.randn_like(tensor) for tensor in old.stored]
    steps = []
    for which in (old, new):
        optimizer = torch.optim.SGD(list(which.parameters()), lr=0.1, momentum=0.9)
        gradients(which, target)
        for k, owner in enumerate(net.legs.owners):
            kept = momenta[owner].clone()
            kept = kept if which is old else change.gradient(k, kept)
            optimizer.state[which.stored[owner]]["momentum_buffer"] = kept
        optimizer.step()
        steps.append([tensor.detach() for tensor in which.stored])
    for k, (one, two) in enumerate(zip(*steps)):
        torch.testing.assert_close(change.value(k, one), two)


def test_the_projector_of_balanced_sides_is_orthogonal_in_any_orthonormal_coordinates():
    source = generator(3)
    q = torch.linalg.qr(torch.randn(4, 4, generator=source, dtype=torch.float64)).Q
    sides = [
        torch.linalg.qr(torch.randn(n, 4, generator=source, dtype=torch.float64)).Q for n in (6, 5)
    ]
    root = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64).sqrt()
    net = Network("in r, out r", [side * root @ q for side in sides], ["in", "out"])
    change = prune(net, 2)
    for maps in change.maps:
        torch.testing.assert_close(maps["r"].values, maps["r"].gradients)
        product = maps["r"].values @ maps["r"].values.mT
        torch.testing.assert_close(product, torch.eye(2, dtype=torch.float64))
    assert change.error == pytest.approx(math.sqrt(1.25 / 14.25), rel=1e-12)


@pytest.mark.parametrize("name", TREES)
def test_directions_that_are_not_needed_go_without_an_error(name):
    net = small(name, rank=1, generator=generator(4))
    other = grow(net, 2, generator=generator(5)).network
    for larger in (other, direct_sum([net, net], [0.5, 0.5])):
        found = prune(larger, 1)
        assert found.error < 1e-12
        torch.testing.assert_close(found.network.dense(), net.dense())


def test_errors_far_below_the_root_of_the_precision_are_exact():
    one, two = (small("tt", generator=generator(k)) for k in (1, 2))
    found = prune(direct_sum([one, two], [1.0, 1e-11]), 2)
    assert 1e-13 < found.error < 1e-10


def test_a_zero_tensor_keeps_directions_that_can_train():
    for name in CHANGING:
        net = small(name, rank=2, init="invariant")
        found = prune(net, 1)
        assert found.error == 0
        zero = net.legs.zero
        target = torch.randn(net.dense().shape, generator=generator(1), dtype=torch.float64)
        (found.network.dense() * target).sum().backward()
        assert found.network.stored[zero].grad.any(), name
        assert not found.network.tensors[zero].any()


def test_a_component_goes_after_the_one_that_it_cancelled():
    """Of sizes 1, 0.5, 0.7 and 0.6, the second goes first. The third, its opposite, then goes before the
    smaller fourth."""
    sizes = torch.tensor([1.0, 0.5, 0.7, 0.6], dtype=torch.float64)
    outs = torch.eye(4, dtype=torch.float64)[:, [0, 1, 1, 2]] * torch.tensor([1.0, 1.0, -1.0, 1.0])
    ones = torch.ones(1, 4, dtype=torch.float64)
    net = Network("in r, out r, layer r", [outs.abs() * sizes, outs, ones], ["layer", "in", "out"])
    found = prune(net, 2)
    assert torch.equal(found.network.tensors[1], outs[:, [0, 3]])
    assert found.error == pytest.approx(math.sqrt(0.04 / 1.4))


def test_bonds_of_a_tree_shrink_with_their_neighbours_and_others_keep_their_coordinates():
    net = tt({"layer": 2, "in": 8, "out": 8}, (4, 6), init="normal", dtype=torch.float64)
    found = prune(net, {"a": 1})
    assert found.network.ranks == {"a": 1, "b": 2}
    untouched = prune(net, {"b": 5})
    assert untouched.network.ranks == {"a": 4, "b": 5}
    assert torch.equal(untouched.network.tensors[0], net.tensors[0])
    same = prune(net, 8)
    assert same.error == 0
    assert all(map(torch.equal, same.network.stored, net.stored))
    assert not {t.data_ptr() for t in same.network.stored} & {t.data_ptr() for t in net.stored}


def test_a_large_train_is_changed_in_small_tensors():
    shape = {"layer": 12, "head": 12, "matrix": 4, "in": 128, "out": 64}
    net = tt(shape, 8, init="normal", generator=generator(0))
    with LargestTensor() as made:
        found = grow(prune(net, 4).network, 8, generator=generator(1))
    assert made.entries < 5_000
    assert found.network.tensors[0].dtype == torch.float32


@pytest.mark.parametrize("split", [False, True])
@examples(30)
@given(data=st.data())
def test_networks_of_any_line_and_any_ranks_change(split, data):
    """Also with ranks beyond those that the modes can fill, as tensors of a user's own may have."""
    net = data.draw(random_networks(split))
    assume(net.ranks)
    assume(not any(term.frozen for term in net.legs.terms))
    dense = net.dense().detach()
    larger = {bond: size + data.draw(st.integers(0, 2)) for bond, size in net.ranks.items()}
    found = grow(net, larger).network
    assert all(size >= net.ranks[bond] for bond, size in found.ranks.items())
    torch.testing.assert_close(found.dense().detach(), dense)
    smaller = {bond: data.draw(st.integers(1, size)) for bond, size in net.ranks.items()}
    change = prune(net, smaller)
    gap = (change.network.dense().detach() - dense).norm().item()
    assert abs(gap - change.error * dense.norm().item()) < 1e-6 * dense.norm().item() + 1e-9


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora_xs", r"ranks of \(layer matrix in p \(frozen\)\): a frozen parameter keeps"),
        ("vera", "a frozen parameter keeps its numbers"),
        ("uni_lora", "numbers of the vector 'n', which another rank would draw anew"),
    ],
)
@pytest.mark.parametrize("change", [prune, grow])
def test_numbers_that_are_not_free_are_refused(name, says, change):
    with pytest.raises(ValueError, match=says):
        change(small(name), 1)


@pytest.mark.parametrize("change", [prune, grow])
def test_ranks_that_cannot_be_are_refused(change):
    net = small("tt")
    for rank, says in (
        (0, "rank of bond 'a' must be an integer >= 1; found 0"),
        (1.5, "must be an integer"),
        (True, "must be an integer"),
        ((1, 2), r"2 ranks were given, \(1, 2\); the bonds are a, b, c, d"),
        ({"z": 1}, "ranks were given for z; the bonds are a, b, c, d"),
    ):
        with pytest.raises(ValueError, match=says):
            change(net, rank)
    with torch.no_grad():
        net.stored[0][0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        change(net, 1)


def test_a_tied_axis_needs_one_rank():
    with pytest.raises(ValueError, match="the bonds p, q are one axis of a tied parameter"):
        prune(small("rescal"), {"p": 1})
    line = "in p, out q (tied), p s, q s (tied), layer matrix s"
    net = network(line, {"layer": 2, "matrix": 2, "in": 5, "out": 5}, 2, init="normal")
    with pytest.raises(ValueError, match="is on tied parameters alone"):
        grow(net, 3)
