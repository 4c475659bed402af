"""A start along a tensor: leading directions, the sizes of the default start, and what has none."""

import math
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from strategies import FORMATS, build, examples, generator, random_networks, registered, usual_modes

from lortalib.decomp import Legs, formats, network, start_along
from lortalib.decomp._hosvd import leading_left_vectors

#: Their bonds make a loop, or join more than two parameters.
NO_TREE = {
    "cp",
    "jd_diag",
    "cp_matrix",
    "cara",
    "vera",
    "ring",
    "block_term",
    "indscal",
    "folded_cp",
}
#: Few entries of a hashed parameter are free, and a tied one cannot follow two sides.
HASHED = {"uni_lora"}
TREES = [name for name in FORMATS if name not in NO_TREE | HASHED and not formats[name].symmetric]
over_trees = pytest.mark.parametrize("name", TREES)


def again(net, dense, **options):
    """A network of the same legs and ranks that starts along a tensor."""
    return network(
        net.legs,
        net.shape,
        net.ranks,
        init=start_along(dense, net.modes),
        dtype=dense.dtype,
        **options,
    )


def left_over(net, dense):
    """What no value of the zero parameter can make of a tensor: least squares, entry by entry."""
    zero = net.tensors[net.legs.zero].data
    columns = []
    for index in range(zero.numel()):
        zero.zero_()
        zero.view(-1)[index] = 1
        columns.append(net.dense().detach().flatten().clone())
    zero.zero_()
    matrix = torch.stack(columns, 1)
    solution = torch.linalg.lstsq(matrix, dense.flatten()[:, None], driver="gelsd").solution
    return (matrix @ solution - dense.flatten()[:, None]).norm() / dense.norm()


def test_every_format_is_known_to_be_a_tree_or_not():
    for name in FORMATS:
        net = build(name, dict.fromkeys(usual_modes(name), 3), 2)
        if name in NO_TREE:
            with pytest.raises(ValueError, match="tree"):
                net.legs.tree(net.modes, net.legs.zero)
        else:
            assert len(net.legs.tree(net.modes, net.legs.zero)) == len(net.tensors) - 1


@over_trees
@examples(8)
@given(data=st.data())
def test_a_tensor_of_the_format_is_reached_by_the_zero_parameter_alone(name, data):
    target = data.draw(registered(name, init="normal", dtype=torch.float64))
    dense = target.dense().detach()
    net = again(target, dense, generator=generator())
    assert not net.dense().any()
    assert left_over(net, dense) < 1e-6


@examples(25)
@given(target=random_networks())
@pytest.mark.filterwarnings("ignore:ranks larger")
def test_any_tree_of_legs_reaches_its_own_tensors(target):
    dense = target.dense().detach()
    try:
        target.legs.tree(target.modes, target.legs.zero)
        net = again(target, dense, generator=generator())
    except ValueError as error:
        assume(not re.search("tree|fall into pieces|room for|zero or not", str(error)))
        raise
    assert left_over(net, dense) < 1e-6


@over_trees
def test_parameters_have_the_sizes_of_the_default_start(name):
    shape = dict.fromkeys(usual_modes(name), 4)
    plain = build(name, shape, 2, init="invariant", generator=generator())
    dense = torch.randn(list(shape.values()), generator=generator(1), dtype=torch.float64)
    net = again(plain, dense, generator=generator())
    for one, other in zip(plain.tensors, net.tensors):
        assert math.isclose(one.square().mean(), other.square().mean(), rel_tol=1e-5)


def test_what_tucker_misses_is_bounded_by_the_discarded_singular_values():
    """De Lathauwer, De Moor and Vandewalle 2000, property 10."""
    line = "in p, head h, out q, layer l, p h q l (zero)"
    shape = {"layer": 4, "head": 5, "in": 7, "out": 6}
    ranks = {"p": 3, "h": 2, "q": 2, "l": 2}
    dense = torch.randn(4, 5, 7, 6, generator=generator(), dtype=torch.float64)
    net = network(
        line, shape, ranks, init=start_along(dense, "layer head in out"), dtype=torch.float64
    )
    bonds = {"layer": "l", "head": "h", "in": "p", "out": "q"}
    tails = 0.0
    for axis, mode in enumerate(shape):
        values = torch.linalg.svdvals(dense.movedim(axis, 0).flatten(1))
        tails += values[ranks[bonds[mode]] :].square().sum()
    random = network(line, shape, ranks, generator=generator(), dtype=torch.float64)
    missed = left_over(net, dense)
    assert (missed * dense.norm()) ** 2 <= tails * (1 + 1e-9)
    assert missed < left_over(random, dense)


@pytest.mark.parametrize(
    "size", [(9, 30), (40, 11), (3, 25, 60), (3, 60, 25), (600, 3), (600, 500)]
)
def test_leading_vectors_are_those_of_the_svd(size):
    a = torch.randn(size, generator=generator(), dtype=torch.float64)
    u, values, v = torch.linalg.svd(a, full_matrices=False)
    matrix = (u * 0.5 ** torch.arange(values.shape[-1], dtype=torch.float64)[:, None].mT) @ v
    found = leading_left_vectors(matrix, 3, lambda shape: torch.randn(shape, generator=generator()))
    assert torch.allclose((found.mT @ u[..., :3]).abs(), torch.eye(3).double(), atol=1e-6)


@pytest.mark.parametrize("size", [(400, 20), (20, 400)])
def test_no_gram_matrix_of_the_longer_side_is_made(size):
    matrix = torch.randn(size, generator=generator(), dtype=torch.float64)
    with LargestTensor() as made:
        leading_left_vectors(matrix, 20, lambda shape: torch.randn(shape, generator=generator()))
    assert made.entries <= matrix.numel()


def test_more_vectors_than_columns_are_orthonormal():
    matrix = torch.randn(30, 2, generator=generator(), dtype=torch.float64)
    found = leading_left_vectors(matrix, 3, lambda shape: torch.randn(shape, generator=generator()))
    assert torch.allclose(found.mT @ found, torch.eye(3).double())
    assert torch.allclose(found @ (found.mT @ matrix), matrix)


def test_a_shared_mode_gives_every_slice_directions_of_its_own():
    dense = torch.zeros(2, 4, 3)
    dense[0, 1, 0] = dense[1, 3, 2] = 1
    line = "layer in p (frozen), layer p q (zero), layer out q (frozen)"
    shape = {"layer": 2, "in": 4, "out": 3}
    net = network(line, shape, 1, init=start_along(dense, "layer in out"))
    assert net.tensors[0].abs().argmax(1).flatten().tolist() == [1, 3]
    assert net.tensors[2].abs().argmax(1).flatten().tolist() == [0, 2]


def test_the_axes_may_stand_in_any_order():
    dense = torch.randn(5, 2, 4, generator=generator())
    line, shape = "in p, layer p q (zero), out q", {"layer": 2, "in": 4, "out": 5}
    starts = (
        start_along(dense, "out layer in"),
        start_along(dense.permute(1, 2, 0), ["layer", "in", "out"]),
    )
    one, other = (network(line, shape, 2, init=s, generator=generator()) for s in starts)
    for tensor, same in zip(one.tensors, other.tensors):
        assert torch.allclose(tensor.abs(), same.abs(), atol=1e-5)


@pytest.mark.parametrize(
    ("dense", "modes", "says"),
    [
        (torch.ones(2, 3), "layer in out", "2 axes"),
        (torch.ones(2, 3), "in in", "names"),
        (torch.zeros(2, 3), "in out", "zero"),
        (torch.full((2, 3), torch.nan), "in out", "not finite"),
        (torch.full((2, 3), torch.inf), "in out", "not finite"),
    ],
)
def test_a_tensor_without_directions_is_refused(dense, modes, says):
    with pytest.raises(ValueError, match=says):
        start_along(dense, modes)


def test_another_shape_a_line_without_a_tree_and_a_rank_without_room_are_refused():
    start = start_along(torch.ones(3, 4), "in out")
    with pytest.raises(ValueError, match="shape"):
        network("in p, out p", {"in": 4, "out": 4}, 1, init=start)
    with pytest.raises(ValueError, match="tree"):
        network("in p q, out p q", {"in": 3, "out": 4}, 1, init=start)
    with pytest.raises(ValueError, match="fall into pieces"):
        network("in, out", {"in": 3, "out": 4}, 1, init=start)
    three = start_along(torch.ones(3, 2, 4), "layer in out")
    with pytest.raises(ValueError, match="room for 2"):
        network(
            "layer in p, p q, layer out q (zero)", {"layer": 3, "in": 2, "out": 4}, 3, init=three
        )


def test_the_order_begins_at_the_leaves():
    legs = Legs.parse("in a, layer a b, head b c, out c")
    edges = legs.tree(["in", "layer", "head", "out"], root=legs.zero)
    assert edges == ((0, 1, "a"), (1, 2, "b"), (2, 3, "c"))
