"""The bridge to TensorLy: identity both ways, its own reconstructions, its algorithms."""

import re

import numpy as np
import pytest
import reference
import tensorly as tl
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import on, rebuilt
from strategies import build, examples, generator, registered, small
from tensorly.cp_tensor import CPTensor
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor

from lortalib.decomp import Legs, Network, decompose, from_tensorly, to_tensorly

KINDS = {"cp": CPTensor, "tucker": TuckerTensor, "tt": TTTensor}
SHAPE = (3, 2, 2, 5, 4)
over_kinds = pytest.mark.parametrize("kind", KINDS)


def aligned(net, obj):
    return net.dense().permute([net.modes.index(mode) for mode in obj.modes])


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
    if len(net.modes) > 2:  # two modes of CP and of a train are one and the same
        assert str(back.legs) == str(net.legs)
        assert all(a.equal(b) for a, b in zip(back.tensors, net.tensors))


@over_kinds
@examples(30)
@given(data=st.data())
def test_dense_is_the_reconstruction_of_tensorly(kind, data):
    net = data.draw(registered(kind))
    obj = net.to_tensorly()
    assert isinstance(obj, KINDS[kind] if len(net.modes) > 2 else tuple(KINDS.values()))
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


# --- decompose ------------------------------------------------------------------------------------

RANKS = {"cp": 2, "tucker": (2, 1, 2, 3, 2), "tt": (3, 2, 2, 2)}


@over_kinds
def test_a_sufficient_rank_reproduces_the_tensor(kind):
    dense = build(kind, SHAPE, RANKS[kind]).dense()
    net, error = decompose(dense, kind, RANKS[kind])
    assert error < (1e-6 if kind == "cp" else 1e-12)
    torch.testing.assert_close(net.dense(), dense, rtol=1e-5, atol=1e-6)
    assert net.ranks == build(kind, SHAPE, RANKS[kind]).ranks


@pytest.mark.parametrize("modes", ["layer head matrix in out", "out layer in matrix head"])
@over_kinds
def test_the_reported_error_is_the_error(kind, modes):
    dense = random_dense(4, 3, 2, 5, 3)
    net, error = decompose(dense, kind, 2, modes=modes)
    assert net.modes == tuple(modes.split())
    assert all(p.requires_grad for p in net.parameters())
    found = np.linalg.norm(reference.dense(net) - dense.numpy()) / np.linalg.norm(dense.numpy())
    assert error == pytest.approx(found, rel=1e-9)
    assert 0.3 < error < 1


@over_kinds
def test_the_error_for_a_matrix_is_that_of_a_truncated_svd(kind):
    dense = random_dense(6, 5)
    values = torch.linalg.svdvals(dense)
    _, error = decompose(dense, kind, 2, modes="out in")
    expected = values[2:].norm() / values.norm()
    assert error == pytest.approx(expected.item(), rel=1e-6)


def test_ranks_are_read_as_the_format_reads_them():
    dense, modes = random_dense(4, 3, 5), "out layer in"
    assert decompose(dense, "Tucker", (4, 2, 3), modes=modes).network.ranks == {
        "p": 3,  # of in
        "q": 4,  # of out
        "t": 2,  # of layer
    }
    train = decompose(dense, "tensor-train", (3, 2), modes=modes).network
    assert train.ranks == {"a": 3, "b": 2}  # in a, layer a b, out b
    with pytest.warns(UserWarning, match="ranks larger than the modes can fill were cut"):
        full = decompose(dense, "tt", 50, modes=modes)
    assert full.error < 1e-12
    with pytest.raises(ValueError, match="2 Tucker ranks"):
        decompose(dense, "tucker", (2, 2), modes=modes)


def test_options_are_passed_to_tensorly():
    dense = random_dense(4, 3, 5)
    rough = decompose(dense, "cp", 3, modes="in layer out", n_iter_max=1, init="random")
    again = decompose(dense, "cp", 3, modes="in layer out", n_iter_max=1, init="random")
    fine = decompose(dense, "cp", 3, modes="in layer out")
    assert rough.error == again.error > fine.error


@over_kinds
def test_zero_and_half_precision(kind):
    net, error = decompose(torch.zeros(SHAPE), kind, 2)
    assert (error, net.dense().any().item()) == (0.0, False)
    dense = build(kind, SHAPE, RANKS[kind]).dense().detach().bfloat16()
    net, error = decompose(dense, kind, RANKS[kind])
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    found = (net.dense().double() - dense.double()).norm() / dense.double().norm()
    assert error == pytest.approx(found.item(), rel=1e-6)
    assert error < 0.03


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@over_kinds
def test_what_is_not_finite_is_refused(kind, bad):
    dense = torch.ones(SHAPE)
    dense[1, 1, 1, 1, 1] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        decompose(dense, kind, 2)


@pytest.mark.parametrize("name", ["ring", "LoTR", "in p, layer matrix head out p"])
def test_formats_without_an_algorithm_are_refused(name):
    with pytest.raises(ValueError, match=f"no algorithm for '{name}' here; choose 'cp', 'tucker'"):
        decompose(torch.ones(SHAPE), name, 1)


def test_axes_without_names_are_refused():
    with pytest.raises(ValueError, match="the tensor has 3 axes"):
        decompose(torch.ones(2, 3, 4), "cp", 1)


def test_more_components_than_the_tensor_has_are_refused_with_the_reason():
    ones = torch.ones(2, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"singular system at rank 3.*fewer components"):
        decompose(ones, "cp", 3, modes="layer in out")


# More components than a tensor of this size has, where the algorithm runs into NaN.
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("sizes", "rank", "rounds"), [((2, 3, 4), 12, 100), ((4, 5, 6), 100, 30)])
def test_a_fit_is_finite_or_refused(sizes, rank, rounds, seed):
    dense = torch.randn(sizes, generator=generator(seed))
    net, error, refused = None, 0.0, ""
    try:
        net, error = decompose(dense, "cp", rank, modes="layer in out", n_iter_max=rounds)
    except ValueError as caught:
        refused = str(caught)
    assert np.isfinite(error)
    if net is not None:
        assert net.dense().isfinite().all()
    else:
        assert re.search("fewer components, or for 'tucker'.* another random_state", refused)


@over_kinds
def test_a_result_of_tensorly_that_is_not_finite_is_refused(kind, monkeypatch):
    from lortalib.decomp import _decompose

    name = {"cp": "parafac", "tucker": "tensorly_tucker", "tt": "tensor_train"}[kind]
    original = getattr(_decompose, name)

    def broken(*args, **options):
        obj = original(*args, **options)
        obj.factors[0][:] = torch.nan
        return obj

    monkeypatch.setattr(_decompose, name, broken)
    with pytest.raises(ValueError, match=r"TensorLy ended in NaN or infinity at rank.* ask for"):
        decompose(random_dense(*SHAPE), kind, 2)


@over_kinds
def test_parameters_that_do_not_fit_the_dtype_are_refused(kind):
    with pytest.raises(ValueError, match=r"too large for torch.float16; give .* wider dtype"):
        decompose(torch.full(SHAPE, 6e4, dtype=torch.float16), kind, 1)
    with pytest.raises(ValueError, match=r"too large for torch.float32"):
        decompose(torch.full(SHAPE, 1e38), kind, 1)  # its norm is not a float32
    assert decompose(torch.full(SHAPE, 1e36), kind, 1).error < 1e-5


@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray])
@over_kinds
def test_complex_tensors_are_refused(kind, convert):
    dense = random_dense(3, 4, 5).to(torch.complex128)
    with pytest.raises(TypeError, match=r"real numbers; found a tensor of torch.complex128"):
        decompose(convert(dense), kind, 2, modes="layer in out")


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


@pytest.mark.parametrize(
    ("kind", "option", "says"),
    [
        ("cp", {"return_errors": True}, r"return_errors=True makes .* is in Fit.error"),
        ("tucker", {"return_errors": True}, r"return_errors=True makes .* is in Fit.error"),
        ("tt", {"return_errors": True}, r"return_errors=True makes .* is in Fit.error"),
        ("cp", {"sparsity": 0.1}, r"sparsity=0.1 makes .* has no sparse part"),
        ("tt", {"mask": torch.ones(4, 5, 6)}, "'tt' takes no mask; fit 'cp' or 'tucker'"),
        ("tt", {"n_iter_max": 3}, "n_iter_max"),
        ("tucker", {"sparse": 1}, "sparse"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(kind, option, says):
    with pytest.raises(TypeError, match=says):
        decompose(random_dense(4, 5, 6), kind, 2, modes="layer in out", **option)


def test_options_at_their_default_are_no_fault():
    options = {"return_errors": False, "mask": None}
    fit = decompose(random_dense(4, 5, 6), "tucker", 2, modes="layer in out", **options)
    assert fit.error == decompose(random_dense(4, 5, 6), "tucker", 2, modes="layer in out").error
    decompose(random_dense(4, 5, 6), "cp", 2, modes="layer in out", sparsity=None)


def test_an_answer_of_another_kind_is_refused(monkeypatch):
    from lortalib.decomp import _decompose

    monkeypatch.setattr(_decompose, "parafac", lambda *args, **options: ("fit", [1.0]))
    with pytest.raises(TypeError, match=r"options .*tol.* returned a tuple in place of a CPTensor"):
        decompose(random_dense(4, 5, 6), "cp", 2, modes="layer in out")


@pytest.mark.parametrize("missing", [0.0, 1e6, torch.nan, torch.inf])
@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray, lambda mask: mask.bool()])
@pytest.mark.parametrize("kind", ["cp", "tucker"])
def test_with_a_mask_only_the_observed_entries_count(kind, convert, missing):
    shape = {"layer": 6, "in": 7, "out": 8}
    truth = build(kind, shape, 2).dense().detach()
    noise = torch.randn(truth.shape, generator=generator(4), dtype=truth.dtype)
    truth = truth + 0.1 * truth.std() * noise
    mask = (torch.rand(truth.shape, generator=generator(3)) > 0.2).double()
    given_ = torch.where(mask.bool(), truth, missing)
    net, error = decompose(given_, kind, 2, modes="layer in out", mask=convert(mask), n_iter_max=50)
    gap = ((net.dense().detach() - truth) * mask).norm() / (truth * mask).norm()
    assert error == pytest.approx(gap.item(), rel=1e-9)
    assert 0 < error < 0.5


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(2, 2), r"the mask has shape \(2, 2\), the tensor \(2, 3, 4\)"),
        (torch.full((2, 3, 4), 0.5), "ones where an entry is known and zeros"),
        (torch.zeros(2, 3, 4), "every entry is missing"),
    ],
)
def test_masks_that_say_nothing_are_refused(mask, says):
    with pytest.raises(ValueError, match=says):
        decompose(torch.ones(2, 3, 4), "cp", 1, modes="layer in out", mask=mask)


def test_nan_that_counts_as_observed_is_refused():
    dense, mask = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    dense[0, 0, 0], mask[1, 1, 1] = torch.nan, 0
    with pytest.raises(ValueError, match="NaN or infinity where the mask says that it is known"):
        decompose(dense, "tucker", 1, modes="layer in out", mask=mask)


def test_other_failures_of_tensorly_keep_their_own_words():
    with pytest.raises(TypeError, match="no_such_option"):
        decompose(torch.ones(2, 3), "cp", 1, modes="in out", no_such_option=1)


@pytest.mark.parametrize("size", [1e-250, 1e250])
@over_kinds
def test_the_error_is_right_where_squares_are_no_numbers(kind, size):
    dense = random_dense(4, 3, 5)
    expected = decompose(dense, kind, 2, modes="layer in out").error
    found = decompose(size * dense, kind, 2, modes="layer in out")
    assert found.error == pytest.approx(expected, rel=1e-4)
    assert found.error > 0.1


def test_tiny_entries_are_fitted_like_any_others():
    dense = 1e-30 * torch.ones(2, 3, 4)
    assert decompose(dense, "cp", 1, modes="layer in out").error < 1e-5
