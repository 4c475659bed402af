"""The bridge to TensorLy: identity both ways, its own reconstructions."""

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import on, rebuilt
from strategies import examples, generator, registered, small
from tensorly.cp_tensor import CPTensor
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor

from lortalib.decomp import Legs, Network, from_tensorly, to_tensorly

KINDS = {"cp": CPTensor, "tucker": TuckerTensor, "tt": TTTensor}
SHAPE = (3, 2, 2, 5, 4)
over_kinds = pytest.mark.parametrize("kind", KINDS)


def aligned(net, obj):
    return net.split.dense().permute([net.open_legs.index(mode) for mode in obj.modes])


def random_dense(*sizes, dtype=torch.float64):
    return torch.randn(sizes, dtype=torch.float64, generator=generator(7)).to(dtype)


# --- there and back -------------------------------------------------------------------------------


@over_kinds
@examples(30)
@given(data=st.data())
def test_there_and_back_is_the_identity(kind, data):
    net = data.draw(registered(kind))
    back = from_tensorly(to_tensorly(net))
    assert (back.modes, back.shape) == (net.modes, net.shape)
    assert back.dense().equal(net.dense())
    if len(net.open_legs) > 2:  # two modes of CP and of a train are one and the same
        assert str(back.legs) == str(net.legs)
        assert all(a.equal(b) for a, b in zip(back.tensors, net.tensors))


@over_kinds
@examples(30)
@given(data=st.data())
def test_dense_is_the_reconstruction_of_tensorly(kind, data):
    net = data.draw(registered(kind))
    obj = net.to_tensorly()
    assert isinstance(obj, KINDS[kind] if len(net.open_legs) > 2 else tuple(KINDS.values()))
    assert tuple(obj.shape) == tuple(net.sizes[mode] for mode in obj.modes)
    torch.testing.assert_close(rebuilt(obj), aligned(net, obj), rtol=1e-10, atol=1e-10)


@over_kinds
def test_gradients_flow_through_the_object_to_the_parameters(kind):
    net = small(kind)
    obj = to_tensorly(net)
    dense = aligned(net, obj)
    weight = torch.randn(dense.shape, dtype=torch.float64, generator=generator())
    parameters = list(net.parameters())
    found = torch.autograd.grad((weight * rebuilt(obj)).sum(), parameters)
    expected = torch.autograd.grad((weight * dense).sum(), parameters)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert not any(factor.grad_fn for factor in to_tensorly(net).factors)
        parameters[0].mul_(2)  # the very same memory, so a later reconstruction sees it
    torch.testing.assert_close(rebuilt(obj), 2 * dense, rtol=1e-10, atol=1e-10)


@over_kinds
def test_the_way_back_copies(kind):
    net = small(kind)
    back = from_tensorly(to_tensorly(net))
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in back.parameters()}
    assert all(p.is_leaf and p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray])
def test_weights_of_cp_are_absorbed(convert):
    weights, factors = random_dense(3), [random_dense(n, 3) for n in (4, 2, 5)]
    expected = rebuilt(CPTensor((weights, factors)))
    obj = CPTensor((convert(weights), [convert(factor) for factor in factors]))
    net = from_tensorly(obj, "layer in out")
    assert net.ranks == {"r": 3}
    torch.testing.assert_close(net.dense(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("outer", ["numpy", "pytorch"])
@pytest.mark.parametrize(
    ("make", "rank"),
    [
        (tl.random.random_cp, 2),
        (tl.random.random_tucker, [2, 3, 2]),
        (tl.random.random_tt, [1, 2, 3, 1]),
    ],
)
def test_objects_made_by_tensorly_itself(make, rank, outer):
    def made_and_rebuilt():
        obj = make((4, 3, 5), rank)
        return obj, torch.as_tensor(obj.to_tensor())

    obj, dense = on(outer, made_and_rebuilt)
    net = from_tensorly(obj, {"out": 4, "layer": 3, "in": 5})
    assert net.modes == ("out", "layer", "in")
    torch.testing.assert_close(net.dense(), dense)


def test_names_of_the_axes():
    five, two = (CPTensor((torch.ones(2), [torch.ones(n, 2) for n in s])) for s in (SHAPE, (3, 4)))
    assert from_tensorly(five).modes == ("layer", "head", "matrix", "in", "out")
    assert from_tensorly(five, "a b c d r").modes == ("a", "b", "c", "d", "r")
    assert dict(from_tensorly(two, ["in", "out"]).shape) == {"in": 3, "out": 4}
    with pytest.raises(ValueError, match=r"2 axes \(3, 4\); name them, for instance"):
        from_tensorly(two)
    with pytest.raises(ValueError, match=r"3 axis names \(in, out, head\) do not fit"):
        from_tensorly(two, "in out head")
    with pytest.raises(ValueError, match=r"2 axis names \(in, in\) do not fit"):
        from_tensorly(two, "in in")
    with pytest.raises(ValueError, match=r"the tensor has shape \(3, 4\), the modes say"):
        from_tensorly(two, {"in": 4, "out": 3})
    with pytest.raises(TypeError, match=r"expected a CPTensor, .* of TensorLy; found Tensor"):
        from_tensorly(torch.ones(3, 4), "in out")


def ones_of(line):
    """The network of a line without marks, all sizes 2, all numbers one."""
    legs = Legs.parse(line)
    modes = [leg for leg in legs.carriers if leg in ("in", "layer", "out")]
    return Network(legs, [torch.ones([2] * len(term.legs)) for term in legs.terms], modes)


@pytest.mark.parametrize(
    "line", ["in a, a layer, out a", "out q, in p, q p", "in a, b layer a, out b"]
)
def test_legs_may_stand_in_another_order(line):
    obj = ones_of(line).to_tensorly()
    assert rebuilt(obj).equal(aligned(ones_of(line), obj))


@pytest.mark.parametrize(
    "line",
    ["in r, out r, r", "in e a, layer a b, out b e", "in a, layer out a", "in p, out p, p q, q"],
)
def test_other_networks_have_no_tensorly_object(line):
    with pytest.raises(ValueError, match="only CP, Tucker and tensor trains") as caught:
        ones_of(line).to_tensorly()
    assert str(caught.value).endswith(line)


@pytest.mark.parametrize("name", ["ring", "lotr", "lora", "block_term", "fact_tk"])
def test_other_formats_have_no_tensorly_object(name):
    with pytest.raises(ValueError, match="only CP, Tucker and tensor trains"):
        to_tensorly(small(name))


@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray])
@pytest.mark.parametrize("part", ["factors", "head"])
@over_kinds
def test_complex_objects_are_refused(kind, part, convert):
    obj = to_tensorly(small(kind))
    kinds = (torch.complex64, torch.float64)
    inner, head = kinds if part == "factors" or kind == "tt" else kinds[::-1]
    factors = [convert(factor.detach().to(inner)) for factor in obj.factors]
    if kind == "tt":
        obj = TTTensor(factors)
    elif kind == "cp":
        obj = CPTensor((convert(obj.weights.detach().to(head)), factors))
    else:
        obj = TuckerTensor((convert(obj.core.detach().to(head)), factors))
    with pytest.raises(TypeError, match=r"networks hold real numbers; found .* of torch.complex64"):
        from_tensorly(obj)
