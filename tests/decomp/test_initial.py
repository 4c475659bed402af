"""Starting values: a zero update, and a first step that does not depend on the rank."""

import warnings
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FORMATS, build, examples, fitting, generator, registered, usual_modes

from lortalib.decomp import Shape, formats, get_format, network

over_formats = pytest.mark.parametrize("name", FORMATS)

# --- the update is zero ---------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["invariant", "lorta"])
@over_formats
@examples(10)
@given(data=st.data())
def test_a_fresh_update_is_exactly_zero_through_one_parameter(name, init, data):
    net = data.draw(registered(name, init=init))
    assert not net.dense().any()
    zero = [k for k, tensor in enumerate(net.tensors) if not tensor.any()]
    assert len(zero) == 1
    terms, owners = net.legs.terms, net.legs.owners
    assert not terms[zero[0]].frozen
    assert owners.count(owners[zero[0]]) == 1  # where a tied one is zero, so is its gradient
    others = [term for term in terms if "out" in term.legs and not (term.frozen or term.tied)]
    assert "out" in terms[zero[0]].legs or not others


@pytest.mark.parametrize("init", ["invariant", "lorta"])
def test_the_parameter_marked_zero_is_the_zero_one(init):
    net = network("in r, layer matrix r (zero), head out r", (2, 2, 2, 4, 4), 3, init=init)
    assert [bool(tensor.any()) for tensor in net.tensors] == [True, False, True]


@over_formats
def test_only_the_zero_parameter_has_a_first_gradient(name):
    net = build(name, dict.fromkeys(usual_modes(name), 3), 2, init="invariant")
    weight = torch.randn(net.dense().shape, dtype=torch.float64, generator=generator())
    (weight * net.dense()).sum().backward()
    for tensor in net.parameters():
        if tensor.requires_grad:
            zero = tensor == 0
            assert tensor.grad.any() == zero.any()
            assert not tensor.grad[~zero].any()


def test_normal_has_no_zero_parameter():
    for name in FORMATS:
        net = build(name, dict.fromkeys(usual_modes(name), 3), 2, init="normal")
        assert all(tensor.any() for tensor in net.tensors)


def test_lorta_draws_from_the_published_distributions():
    r = 16
    net = get_format("lorta")((600, 700, 4, 800, 8), r, init="lorta", generator=generator())
    for factor, bound in ((net.in_r, r**-0.5), (net.head_r, (6 / r) ** 0.5)):
        assert factor.abs().max() <= bound
        ordered = (factor.detach().flatten() / bound).sort().values
        uniform = torch.linspace(-1, 1, len(ordered))
        assert (ordered - uniform).abs().max() < 0.05
    assert not net.out_r.any()


# --- the first step does not depend on the rank ---------------------------------------------------

LAYERS, HEADS, MATRICES, IN, OUT = SHAPE = (6, 12, 4, 256, 64)
SITES = [
    {"layer": layer, "matrix": matrix} for layer in range(LAYERS) for matrix in range(MATRICES)
]
RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
TOKENS, SEEDS = 8, 3


def outputs(net, inputs):
    """For each site what the update adds to the output."""
    cuts = (net.select(**site).cut() for site in SITES)
    return torch.stack([x @ cut.A.T @ cut.B.T for x, cut in zip(inputs, cuts)])


@lru_cache
def first_step(name, rank, seed, init, scale):
    """What a first step does, from a random upstream gradient at every site and token.

    Returns:
        The root mean square, over all sites and new tokens, of the change of the output that is
        made by a step along the sign of the gradient, and by one along the gradient itself, both
        with entries of root mean square 1; and the norm of the gradient, whose square is what a
        plain step of learning rate 1 takes off this (linear) loss.
    """
    source = generator(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ranks larger than the modes can fill")
        net = formats[name](SHAPE, rank, init=init, generator=source)
    inputs, unseen = torch.randn(2, len(SITES), TOKENS, IN, generator=source)
    upstream = torch.randn(len(SITES), TOKENS, HEADS * OUT, generator=source)
    zero = next(tensor for tensor in net.tensors if not tensor.any())
    (gradient,) = torch.autograd.grad(scale * (upstream * outputs(net, inputs)).sum(), zero)
    changes = []
    with torch.no_grad():
        for step in (gradient.sign(), gradient / gradient.square().mean().sqrt()):
            zero.copy_(step)
            changes.append(scale * outputs(net, unseen).square().mean().sqrt().item())
    return *changes, gradient.norm().item()


def first_steps(name, ranks, init="invariant", scale=lambda rank: 1.0):
    """The numbers of `first_step`, a row for each with a column for each rank: means over seeds."""
    runs = [[first_step(name, r, s, init, scale(r)) for s in range(SEEDS)] for r in ranks]
    return torch.tensor(runs).mean(1).T


@pytest.mark.parametrize("name", ["cp", "tucker", "tt"])
def test_the_first_step_is_the_same_at_every_rank(name):
    for over_ranks in first_steps(name, RANKS):
        assert over_ranks.max() < 1.5 * over_ranks.min()


@pytest.mark.parametrize("name", ["cp", "tucker", "tt"])
def test_a_step_of_size_h_moves_the_output_by_h(name):
    signs, start_along, _ = first_steps(name, RANKS)
    for change in (signs, start_along):
        assert 1 / 1.5 < change.min() <= change.max() < 1.5


@pytest.mark.parametrize("rank", [2, 6])
@over_formats
def test_a_step_of_size_h_moves_the_output_by_h_in_every_format(name, rank):
    sizes = {"layer": 6, "head": 4, "matrix": 4, "in": 48, "out": 24}
    shape = fitting(name, Shape({mode: sizes.get(mode, 3) for mode in usual_modes(name)}))
    squares = []
    for seed in range(8):
        source = generator(seed)
        net = build(name, shape, rank, init="invariant", generator=source)
        with torch.no_grad():
            for tensor in net.parameters():
                step = torch.randn(tensor.shape, generator=source).sign()
                tensor.copy_(torch.where(tensor == 0, step, tensor))
            # Inputs of unit variance: an output has the variance that its row of dW has in sum.
            squares.append(net.dense().square().mean() * shape["in"])
    assert 1 / 1.5 < torch.stack(squares).mean().sqrt() < 1.5


def test_the_published_start_falls_by_orders_of_magnitude():
    change, _, slope = first_steps("cp", [4, 16, 64, 256], "lorta", lambda rank: 1 / rank)
    assert (change[:-1] > 10 * change[1:]).all()  # r^-2.5: a factor of 32 at each of these
    assert change[0] > 1e4 * change[-1]
    assert slope[0] > 1e4 * slope[-1]
