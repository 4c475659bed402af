"""Fits of every line to dense tensors, networks and sums, with and without masks."""

import math
import re

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from strategies import FORMATS, build, examples, generator, random_networks, seeds, small

from lortalib.decomp import Network, cp, fit, formats, lora, scale, tt
from lortalib.decomp._als import Sweeper

SHAPE = (3, 2, 2, 5, 4)
RANKS = {"cp": 2, "tucker": (2, 1, 2, 3, 2), "tt": (3, 2, 2, 2)}
MODES = "layer in out"
FITTED = [name for name in FORMATS if name != "uni_lora"]  # hashed parameters share numbers
over_formats = pytest.mark.parametrize("name", FITTED)
over_kinds = pytest.mark.parametrize("kind", RANKS)
TIED = [name for name in FORMATS if formats[name].symmetric]


def random_dense(*sizes, dtype=torch.float64, seed=7):
    return torch.randn(sizes, dtype=torch.float64, generator=generator(seed)).to(dtype)


def truth_and_start(name):
    """A network of the format, and a start: the frozen parameters of the network, or random."""
    truth = small(name, generator=generator(11))
    if not any(term.frozen for term in truth.legs.terms):
        return truth, "random"
    terms = zip(truth.legs.terms, truth.tensors)
    return truth, Network(
        truth.legs, [t if term.frozen else torch.ones_like(t) for term, t in terms], truth.modes
    )


def measured(found, dense, weight=1.0):
    gap = (reference.dense(found.network) - dense.detach().numpy()) * weight
    return np.linalg.norm(gap) / np.linalg.norm(dense.detach().numpy() * weight)


# --- laws over the registry -----------------------------------------------------------------------


@over_formats
def test_a_tensor_of_the_line_is_found_again(name):
    truth, start = truth_and_start(name)
    dense = truth.dense().detach()
    found = fit(dense, name, truth.ranks, modes=truth.modes, start=start)
    assert found.error < 1e-6
    assert found.converged
    assert found.error == pytest.approx(measured(found, dense), abs=1e-13)
    assert str(found.network.legs) == str(truth.legs)
    assert found.network.ranks == truth.ranks
    for term, one, other in zip(truth.legs.terms, truth.tensors, found.network.tensors):
        assert not term.frozen or one.equal(other)


@over_formats
def test_a_network_of_the_line_is_found_again(name):
    truth, start = truth_and_start(name)
    found = fit(truth, name, truth.ranks, start=start)
    assert found.error < (1e-6 if name in TIED else 1e-4)
    growth = Sweeper.growth(found.network.legs, found.network.tensors) / truth.norm().item()
    assert abs(found.error - measured(found, truth.dense())) < 3e-8 * max(growth, 1)


@over_formats
@examples(3)
@given(data=st.data())
def test_the_error_falls_and_the_last_one_is_the_error(name, data):
    shape = small(name).shape
    dense = random_dense(*shape.values(), seed=data.draw(seeds))
    mask = (
        torch.rand(dense.shape, generator=generator(1)) > 0.2 if data.draw(st.booleans()) else None
    )
    weights = 1 + random_dense(*dense.shape).square() if data.draw(st.booleans()) else None
    seen = []
    options = {"mask": mask, "weights": weights, "sweeps": 4 if name in TIED else 12, "ridge": 0}
    found = fit(
        dense, name, 1, modes=shape.modes, progress=lambda *step: seen.append(step), **options
    )
    weight = torch.ones_like(dense) if weights is None else weights
    weight = weight if mask is None else weight * mask
    assert found.error == pytest.approx(measured(found, dense, weight.sqrt().numpy()), rel=1e-9)
    assert found.errors[-1] == pytest.approx(found.error, rel=1e-9)
    assert seen == list(enumerate(found.errors, start=1))
    assert all(b <= a * (1 + 1e-12) for a, b in zip(found.errors, found.errors[1:]))
    assert found.seconds > 0


@pytest.mark.parametrize("name", [name for name in FITTED if name not in TIED])
@examples(4)
@given(seed=seeds, digits=st.floats(-0.5, 6), masked=st.booleans())
@example(seed=0, digits=2.125, masked=True)  # Tucker: the last Gram matrix is all but singular
@example(
    seed=0, digits=3.0, masked=False
)  # a train: an error of 0.01, of whose square few digits are left
def test_the_errors_are_right_at_any_distance(name, seed, digits, masked):
    """Far from the target they come from the normal equations, near it from the residual."""
    truth, start = truth_and_start(name)
    dense = truth.dense().detach()
    dense = dense / dense.norm() + 10**-digits * random_dense(*dense.shape, seed=seed)
    mask = torch.rand(dense.shape, generator=generator(seed)) > 0.2 if masked else None
    found = fit(
        dense, name, truth.ranks, modes=truth.modes, mask=mask, start=start, sweeps=20, tolerance=0
    )
    expected = measured(found, dense, 1.0 if mask is None else mask.double().numpy())
    assert found.errors[-1] == pytest.approx(expected, rel=1e-8, abs=1e-13)
    assert all(b <= a * (1 + 1e-10) + 1e-14 for a, b in zip(found.errors, found.errors[1:]))


@examples(25)
@given(net=random_networks(), seed=seeds)
def test_any_line_can_be_fitted(net, seed):
    if all(term.frozen for term in net.legs.terms) or not net.dense().any():
        return
    terms = zip(net.legs.terms, net.tensors)
    noisy = [t if term.frozen else t + 0.01 * torch.randn_like(t) for term, t in terms]
    start = Network(net.legs, noisy, net.modes)
    before = (start.dense() - net.dense()).norm() / net.dense().norm()
    found = fit(
        net.dense().detach(), str(net.legs), net.ranks, modes=net.modes, start=start, sweeps=20
    )
    assert found.error <= before * (1 + 1e-9) + 1e-12
    assert found.error == pytest.approx(measured(found, net.dense()), abs=1e-12)


@pytest.mark.parametrize("name", ["cp", "tucker", "tt", "lotr", "ring", "vera", "indscal"])
def test_a_sum_of_networks_is_fitted_as_its_dense_tensor(name):
    shape = small(name).shape
    parts = [
        build(kind, shape, 2, generator=generator(k)) for k, kind in enumerate(["cp", "tt", name])
    ]
    total = sum(
        part.dense().detach().permute([part.modes.index(mode) for mode in shape]) for part in parts
    )
    first = build(name, shape, 1, generator=generator(9))
    one = fit(parts, name, 1, start=first, sweeps=5, tolerance=0)
    other = fit(total, name, 1, modes=shape.modes, start=first, sweeps=5, tolerance=0)
    if name == "indscal":  # L-BFGS goes other ways where numbers differ in the last digit
        assert one.error == pytest.approx(other.error, abs=0.05)
    else:
        assert one.errors == pytest.approx(other.errors, abs=1e-6)
    assert one.error == pytest.approx(measured(one, total), abs=1e-7)


def test_weights_may_be_a_network():
    shape = {"layer": 3, "in": 5, "out": 4}
    target, weights = tt(shape, 3, init="normal", dtype=torch.float64), cp(shape, 1, init="normal")
    with torch.no_grad():
        for tensor in weights.tensors:
            tensor.abs_()
    one = fit(target, "cp", 2, weights=weights, sweeps=10)
    other = fit(target, "cp", 2, weights=weights.dense().double(), start="random", sweeps=10)
    assert one.errors == pytest.approx(other.errors, rel=1e-5)


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("name", ["cp", "tucker", "lotr", "ring"])
def test_weights_may_be_constant_along_modes(name, is_dense):
    shape = {"layer": 3, "head": 2, "matrix": 2, "in": 5, "out": 4}
    target = lora(shape, 3, init="normal", dtype=torch.float64, generator=generator(2))
    values = torch.rand(2, 3, dtype=torch.float64, generator=generator(3))
    values[1, 2] = 0.0  # a slice that does not count
    weights = Network("matrix layer", [values], ("matrix", "layer"))
    whole = values.T.reshape(3, 1, 2, 1, 1).expand(*shape.values())
    given = target.dense().detach() if is_dense else target
    options = {"modes": target.modes} if is_dense else {}
    options |= {"start": "random", "tolerance": 0, "sweeps": 5}
    one = fit(given, name, 2, weights=weights, **options)
    other = fit(given, name, 2, weights=whole, **options)
    both = fit(given, name, 2, weights=weights, mask=torch.ones(*shape.values()), **options)
    assert one.errors == pytest.approx(other.errors, abs=1e-6)
    assert both.errors == pytest.approx(other.errors, abs=1e-6)
    assert one.error == pytest.approx(measured(one, target.dense(), whole.sqrt().numpy()), abs=1e-7)


@pytest.mark.parametrize("order", ["in out", "out in"])
@pytest.mark.parametrize("number", [1, 2])
def test_weights_may_be_one_parameter_over_all_modes(order, number):
    """They are as a tensor, whatever its axes: what is weighed is the sum, and not its first factor."""
    parts = [
        cp({"in": 4, "out": 4}, 3, init="normal", dtype=torch.float64, generator=generator(k))
        for k in range(number)
    ]
    values = torch.rand(4, 4, dtype=torch.float64, generator=generator(5))
    whole = values if order == "in out" else values.T
    for weights in (Network(order, [values], order.split()), whole):
        found = fit(parts, "cp", 2, weights=weights, start="random", sweeps=5)
        dense = sum(part.dense() for part in parts)
        assert found.error == pytest.approx(measured(found, dense, whole.sqrt().numpy()), abs=1e-7)
        assert found.error > 1e-3


def test_weights_over_some_modes_may_split_them():
    target = cp({"in": 6, "out": 4}, 2, init="normal", dtype=torch.float64)
    weights = Network("in.1 a, in.2 a", [torch.rand(2, 1), torch.rand(3, 1)], ["in"])
    whole = weights.dense().detach().double().reshape(6, 1).expand(6, 4)
    one, other = (
        fit(target, "cp", 1, weights=each, start="random", sweeps=5, tolerance=0)
        for each in (weights, whole)
    )
    assert one.errors == pytest.approx(other.errors, abs=1e-6)


def test_no_tensor_of_a_fit_to_a_network_is_large():
    shape = {"layer": 12, "head": 6, "matrix": 4, "in": 96, "out": 32}  # 884,736 entries
    trained = [lora(shape, 4, init="normal", generator=generator(k)) for k in range(2)]
    for name, rank in [("cp", 6), ("tt", 6), ("lotr", 6), ("tucker", 3), ("ring", 3)]:
        with LargestTensor() as made:
            found = fit(trained, name, rank, sweeps=2)
        assert 0 < found.error < 1
        assert made.entries <= 120_000, name  # a factor of the target has 36,864


# --- TensorLy's algorithms -----------------------------------------------------------------------


@over_kinds
def test_tensorly_fits_its_own_formats(kind):
    dense = build(kind, SHAPE, RANKS[kind]).dense()
    found = fit(dense, kind, RANKS[kind])
    assert found.how.startswith("TensorLy ")
    assert found.error < (1e-6 if kind == "cp" else 1e-12)
    assert found.network.ranks == build(kind, SHAPE, RANKS[kind]).ranks
    line = str(found.network.legs)
    assert fit(dense, line, found.network.ranks).how == found.how


@pytest.mark.parametrize("modes", ["layer head matrix in out", "out layer in matrix head"])
@over_kinds
def test_the_reported_error_is_the_error(kind, modes):
    dense = random_dense(4, 3, 2, 5, 3)
    found = fit(dense, kind, 2, modes=modes)
    assert found.network.modes == tuple(modes.split())
    assert all(p.requires_grad for p in found.network.parameters())
    assert found.error == pytest.approx(measured(found, dense), rel=1e-9)
    own = fit(dense, kind, 2, modes=modes, start="svd" if kind != "cp" else "random", restarts=3)
    assert own.error < found.error * 1.05


@over_kinds
def test_the_error_for_a_matrix_is_that_of_a_truncated_svd(kind):
    dense = random_dense(6, 5)
    values = torch.linalg.svdvals(dense)
    expected = (values[2:].norm() / values.norm()).item()
    assert fit(dense, kind, 2, modes="out in").error == pytest.approx(expected, rel=1e-6)
    own = fit(dense, kind, 2, modes="out in", start="random")
    assert own.error == pytest.approx(expected, rel=1e-4)


def test_ranks_are_read_as_the_format_reads_them():
    dense, modes = random_dense(4, 3, 5), "out layer in"
    assert fit(dense, "Tucker", (4, 2, 3), modes=modes).network.ranks == {"p": 3, "q": 4, "t": 2}
    assert fit(dense, "tensor-train", (3, 2), modes=modes).network.ranks == {"a": 3, "b": 2}
    with pytest.warns(UserWarning, match="ranks larger than the modes can fill were cut"):
        assert fit(dense, "tt", 50, modes=modes).error < 1e-12


def test_ranks_beside_a_start_are_read_as_the_format_reads_them():
    dense, shape = random_dense(4, 3, 5), {"out": 4, "layer": 3, "in": 5}
    start = build("tucker", shape, (4, 2, 3))
    found = fit(dense, "tucker", (4, 2, 3), modes="out layer in", start=start, sweeps=2)
    assert found.network.ranks == start.ranks == {"p": 3, "q": 4, "t": 2}


@pytest.mark.parametrize("name", ["parafac", "tucker", "tensor_train"])
def test_where_tensorly_fails_least_squares_goes_on(name, monkeypatch):
    from lortalib.decomp import _tensorly_fit

    kind = {"parafac": "cp", "tucker": "tucker", "tensor_train": "tt"}[name]
    original = getattr(_tensorly_fit, name)

    def broken(*args, **options):
        obj = original(*args, **options)
        obj.factors[0][:] = torch.nan
        return obj

    monkeypatch.setattr(_tensorly_fit, name, broken)
    found = fit(random_dense(*SHAPE), kind, 2)
    assert found.how == "alternating least squares"
    assert found.error < 1
    ones = torch.ones(2, 3, 4, dtype=torch.float64)  # parafac meets a singular matrix
    assert fit(ones, "cp", 3, modes=MODES).error < 1e-6


# --- numbers that are hard -----------------------------------------------------------------------


@over_kinds
def test_zero_and_half_precision(kind):
    found = fit(torch.zeros(SHAPE), kind, 2)
    assert (found.error, found.network.dense().any().item()) == (0.0, False)
    dense = build(kind, SHAPE, RANKS[kind]).dense().detach().bfloat16()
    found = fit(dense, kind, RANKS[kind])
    assert {p.dtype for p in found.network.parameters()} == {torch.bfloat16}
    gap = (found.network.double().dense() - dense.double()).norm() / dense.double().norm()
    assert found.error == pytest.approx(gap.item(), rel=1e-6)
    assert found.error < 0.03


@over_kinds
def test_parameters_that_do_not_fit_the_dtype_are_refused(kind):
    with pytest.raises(ValueError, match=r"too large for torch.float16; give .* wider dtype"):
        fit(torch.full(SHAPE, 6e4, dtype=torch.float16), kind, 1)
    with pytest.raises(ValueError, match=r"too large for torch.float32"):
        fit(torch.full(SHAPE, 1e38), kind, 1)  # its norm is not a float32
    assert fit(torch.full(SHAPE, 1e36), kind, 1).error < 1e-5


@pytest.mark.parametrize("size", [1e-250, 1e-30, 1e250])
@over_kinds
def test_the_error_is_right_where_squares_are_no_numbers(kind, size):
    dense = random_dense(4, 3, 5)
    expected = fit(dense, kind, 2, modes=MODES).error
    found = fit(size * dense, kind, 2, modes=MODES)
    assert found.error == pytest.approx(expected, rel=1e-4)
    net = scale(tt({"layer": 3, "in": 5, "out": 4}, 3, init="normal", dtype=torch.float64), size)
    assert fit(net, kind, 3 if kind != "cp" else 9).error < 1e-3


def test_a_fit_that_diverges_says_so():
    a, b = random_dense(4, 1), random_dense(4, 1, seed=8)
    rows = [(a, a, b), (a, b, a), (b, a, a)]  # rank three, and as near to rank two as one likes
    dense = sum(torch.einsum("ix,jx,kx->ijk", *row) for row in rows)
    with pytest.warns(RuntimeWarning, match="the fit diverges: terms .* cancel each other"):
        fit(dense, "cp", 2, modes=MODES, start="random", sweeps=3000, tolerance=0)
    calm = fit(dense, "cp", 2, modes=MODES, start="random", ridge=1e-3, sweeps=300)
    assert max(t.norm().item() for t in calm.network.tensors) < 10 * dense.norm()
    assert max(calm.conditions.values()) < 1e6


def test_a_fit_of_a_tied_line_to_noise_ends():
    """Its terms drift apart for ever, and each of 100 steps in a sweep gains next to nothing."""
    dense = random_dense(3, 2, 6, 6, seed=4)
    found = fit(dense, "indscal", 3, modes="layer matrix in out", sweeps=25)
    assert found.converged
    assert found.error < 0.8809


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    dense = torch.ones(SHAPE)
    dense[1, 1, 1, 1, 1] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity; there is nothing near it"):
        fit(dense, "lotr", 2)
    mask = torch.ones(SHAPE)
    mask[0, 0, 0, 0, 0] = 0
    with pytest.raises(ValueError, match="holds NaN or infinity where its weight is not zero"):
        fit(dense, "lotr", 2, mask=mask)
    mask[1, 1, 1, 1, 1] = 0
    assert fit(dense, "lotr", 2, mask=mask, sweeps=5).error < 1e-6
    net = Network("in r, out r", [torch.full((3, 1), bad), torch.ones(2, 1)], ["in", "out"])
    with pytest.raises(ValueError, match=r"NaN or infinity|too large"):
        fit(net, "cp", 1)


@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray])
def test_complex_tensors_are_refused(convert):
    dense = random_dense(3, 4, 5).to(torch.complex128)
    with pytest.raises(TypeError, match=r"real numbers; found a tensor of torch.complex128"):
        fit(convert(dense), "ring", 2, modes=MODES)


DENSE = torch.ones(2, 3, 4, dtype=torch.float64)
NET = build("cp", {"layer": 2, "in": 3, "out": 4}, 2)
ODD = {"layer": 2, "in": 3, "out": 5}


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        (DENSE, {"mask": torch.ones(2, 2)}, r"the mask has shape \(2, 2\), the target \(2, 3, 4\)"),
        (DENSE, {"mask": torch.full((2, 3, 4), 0.5)}, "ones where an entry is known and zeros"),
        (DENSE, {"mask": torch.zeros(2, 3, 4)}, "every entry is missing"),
        (DENSE, {"mask": DENSE.index_fill(1, torch.tensor([2]), 0)}, "no entry is known at in=2"),
        (DENSE, {"weights": -DENSE}, "finite and not negative"),
        (DENSE, {"weights": cp(ODD, 1)}, "the weights have"),
        (NET, {"weights": Network("task", [torch.ones(2)], ["task"])}, "the weights have"),
        (NET, {"weights": scale(NET, -1.0)}, "finite and >= 0"),
        (DENSE, {"line": "in r (frozen), layer out r (frozen)"}, "every parameter is frozen"),
        (DENSE, {"start": "good"}, "unknown start 'good'; choose 'auto'"),
        (DENSE, {"start": cp(ODD, 2)}, "the start has Shape"),
        (DENSE, {"start": cp(NET.shape, 3)}, "of the line and the ranks"),
        (NET, {"start": "svd"}, "a network is never formed"),
        (DENSE, {"start": "svd"}, "form no tree"),
        (DENSE, {"sweeps": 0}, "sweeps must be finite and at least 1; found 0"),
        (DENSE, {"ridge": math.nan}, "ridge must be finite"),
        ([NET, cp(ODD, 2)], {}, "same modes and sizes"),
    ],
)
def test_what_cannot_be_fitted_is_refused(target, options, says):
    options = {"line": "cp", "rank": 2, **options}
    modes = MODES if isinstance(target, torch.Tensor) else None
    with pytest.raises(ValueError, match=says):
        fit(target, modes=modes, **options)


def test_axes_without_names_and_names_without_axes_are_refused():
    with pytest.raises(ValueError, match="the tensor has 3 axes"):
        fit(torch.ones(2, 3, 4), "cp", 1)
    with pytest.raises(TypeError, match="leave out modes="):
        fit(NET, "cp", 1, modes=MODES)
    with pytest.raises(TypeError, match="found also Tensor"):
        fit([NET, DENSE], "cp", 1)
    with pytest.raises(ValueError, match=re.escape("unknown leg 'task'")):
        fit(DENSE, "in r, out r, layer r, task r", 1, modes=MODES)


def test_a_fit_repeats_and_changes_nothing():
    before = [tensor.detach().clone() for tensor in NET.tensors]
    one, two = (fit(NET, "ring", 2, sweeps=4) for _ in range(2))
    assert one.errors == two.errors
    assert all(map(torch.equal, before, NET.tensors))
    one, many = (fit(NET, "ring", 1, sweeps=4, restarts=more) for more in (0, 3))
    assert 0.01 < many.error <= one.error  # not exact: below 1e-8 are rounding errors

    def stop(sweep, error):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(NET, "ring", 2, progress=stop)
    assert all(map(torch.equal, before, NET.tensors))


def test_frozen_parameters_are_random_unless_a_start_says_them():
    target = build("lora", SHAPE, 2)
    found = fit(target, "vera", 3, generator=generator(1))
    again = fit(target, "vera", 3, generator=generator(2))
    assert not found.network.tensors[0].equal(again.network.tensors[0])
    assert not found.network.tensors[0].requires_grad
    kept = fit(target, "vera", 3, start=found.network)
    assert kept.network.tensors[0].equal(found.network.tensors[0])
    assert kept.error == pytest.approx(found.error)


def test_frozen_parameters_of_a_random_start_are_those_of_the_format():
    """Not drawn a second time, at the start or at a restart: their scale is the format's."""
    target = build("lora", SHAPE, 2)
    wanted = build("vera", SHAPE, 3, generator=generator(5))
    for options in ({}, {"restarts": 2}, {"start": "random", "restarts": 1}):
        found = fit(target, "vera", 3, generator=generator(5), **options)
        for k in (0, 1):
            assert found.network.tensors[k].equal(wanted.tensors[k])


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_a_line_of_one_tied_parameter_has_the_norm_of_the_target(factor):
    """The parameter takes the root of the factor, since it counts twice."""
    side = random_dense(5, 2)
    found = fit(factor * side @ side.mT, "in r, out r (tied)", 2, modes="in out")
    torch.testing.assert_close(
        found.network.dense().detach(), factor * side @ side.mT, rtol=1e-4, atol=0
    )
    assert found.error < 1e-5


def test_a_descent_that_ends_higher_is_not_taken(monkeypatch):
    def worse(self, closure):
        before = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(10.0)
        return before

    dense = random_dense(2, 4, 4)
    honest = fit(dense, "indscal", 2, modes=MODES, sweeps=3, tolerance=0)
    monkeypatch.setattr(torch.optim.LBFGS, "step", worse)
    found = fit(dense, "indscal", 2, modes=MODES, sweeps=3, tolerance=0)
    assert list(found.errors) == sorted(found.errors, reverse=True)
    assert honest.errors[-1] <= found.errors[-1] <= 1.0


def test_a_ridge_shrinks_the_parameters():
    dense = random_dense(2, 3, 4)
    found = fit(dense, "layer in out", 1, modes=MODES, ridge=0.5)
    torch.testing.assert_close(found.network.dense().detach(), dense / 1.5)


def test_random_restarts_keep_the_frozen_parameters_of_the_start():
    target = build("lora", SHAPE, 2)
    start = build("vera", SHAPE, 3, generator=generator(1))
    found = fit(target, "vera", 3, start=start, restarts=2)
    assert found.network.tensors[0].equal(start.tensors[0])
    assert found.network.tensors[1].equal(start.tensors[1])


def test_a_hashed_line_is_refused_with_the_line_that_can_be_fitted():
    target = torch.randn(2, 3, 4, 5, generator=generator(1), dtype=torch.float64)
    line = "layer in r (of n), matrix out r (of n, zero)"
    modes = ["layer", "matrix", "in", "out"]
    with pytest.raises(ValueError, match=r"without its vectors,\n    layer in r, matrix out r"):
        fit(target, line, {"r": 2, "n": 8}, modes=modes)


def test_the_best_of_all_starts_is_returned():
    target, places = random_dense(5, 6, 4), set()
    for seed in range(6):
        ends = []

        def keep(number, error, ends=ends):
            ends[-1:] = [error] if number > 1 else [*ends[-1:], error]

        options = {"start": "random", "restarts": 3, "sweeps": 5, "progress": keep}
        found = fit(target, "cp", 3, modes=MODES, generator=generator(seed), **options)
        assert len(ends) == 4
        assert found.error == pytest.approx(min(ends), rel=1e-9)
        places.add(ends.index(min(ends)))
    assert len(places) > 2  # so neither the first nor the last one is taken for the best


@pytest.mark.parametrize("line", ["tt", "tucker", "in p, layer p q, out q"])
def test_the_error_of_a_target_below_the_normal_numbers_is_a_number(line):
    target = random_dense(3, 4, 2) * 1e-310
    found = fit(target, line, rank=8, modes=MODES)
    assert found.error < 1e-6
    torch.testing.assert_close(found.network.dense() * 1e300, target * 1e300, rtol=1e-6, atol=0)


@pytest.mark.parametrize("line", ["tt", "tucker"])
def test_a_target_with_one_axis(line):
    target = random_dense(5)
    found = fit(target, line, rank=1, modes="in")
    assert found.error < 1e-12


def test_a_train_without_modes_is_refused():
    with pytest.raises(ValueError, match="the line of legs is empty"):
        fit(torch.tensor(3.0), "tt", 1, modes="")


def test_factors_of_equal_names_and_other_sizes_are_not_the_same():
    """A mode of 12 split as 1 x 12 in the target and as 3 x 4 in the line."""
    tensors = [torch.ones(1, 2), torch.randn(12, 2, generator=generator()), torch.ones(5, 2)]
    target = Network("in.1 r, in.2 r, out r", [t.double() for t in tensors], ["in", "out"])
    found = fit(target, "in.1:3 a, in.2:4 a b, out b", (3, 5))
    assert found.error < 1e-6
    assert torch.allclose(found.network.dense(), target.dense(), atol=1e-6)
