"""Cross approximation: a train from few entries of a tensor that is never formed."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, generator, seeds

from lortalib import decomp
from lortalib.decomp._maxvol import maxvol


def lookup(tensor):
    return lambda positions: tensor[tuple(positions.unbind(1))]


def reciprocal(positions):
    return 1 / (1.0 + positions.sum(1).double())


@examples(40)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    rank=st.integers(1, 3),
    more=st.integers(0, 2),
    seed=seeds,
)
def test_a_train_is_found_from_its_entries(sizes, rank, more, seed):
    shape = {f"m{k}": size for k, size in enumerate(sizes)}
    parameters = [
        torch.randn(
            rank if k else 1, n, rank if k < len(sizes) - 1 else 1, generator=generator(seed + k)
        )
        for k, n in enumerate(sizes)
    ]
    exact = torch.ones(1, 1, dtype=torch.float64)
    for core in parameters:
        exact = torch.tensordot(exact, core.double(), 1)
    exact = exact.reshape(sizes)
    found = decomp.cross(lookup(exact), shape, rank + more, generator=generator(seed))
    assert found.converged
    assert (found.network.dense() - exact).norm() <= 1e-7 * exact.norm()
    assert all(size <= rank + more for size in found.network.ranks.values())


def test_a_smooth_function_of_many_modes():
    shape = {f"m{k}": 4 for k in range(20)}  # 10^12 entries
    found = decomp.cross(reciprocal, shape, 10)
    assert found.converged
    assert found.evaluations < 60_000
    assert len(found.network.tensors) == 20


def test_the_error_is_that_of_other_entries():
    """Measured on entries that the train was not made from, so a rank that is too small shows."""
    tensor = torch.randn(8, 9, 7, generator=generator(), dtype=torch.float64)
    found = decomp.cross(lookup(tensor), {"a": 8, "b": 9, "c": 7}, 2, sweeps=3)
    gap = (found.network.dense() - tensor).norm() / tensor.norm()
    assert not found.converged
    assert len(found.errors) == 3
    assert found.error == pytest.approx(gap.item(), rel=0.2)
    assert found.error <= min(found.errors)


def test_what_is_asked_for_is_counted_and_small():
    asked = []

    def function(positions):
        asked.append(len(positions))
        return reciprocal(positions)

    found = decomp.cross(function, {"a": 30, "b": 40, "c": 50}, 6)
    assert found.evaluations == sum(asked)
    assert max(asked[1:]) <= 6 * 6 * 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_have_the_dtype_of_the_entries(dtype):
    found = decomp.cross(lambda at: reciprocal(at).to(dtype), {"a": 5, "b": 6}, 3, sweeps=1)
    assert {p.dtype for p in found.network.parameters()} == {dtype}
    counted = decomp.cross(lambda at: at.sum(1), {"a": 5, "b": 6}, 2)
    assert {p.dtype for p in counted.network.parameters()} == {torch.float32}


def test_zero_and_constant_tensors():
    for value in (0.0, 3.0):
        found = decomp.cross(
            lambda at, value=value: torch.full((len(at),), value), {"a": 4, "b": 5, "c": 3}, 3
        )
        assert torch.allclose(found.network.dense(), torch.full((4, 5, 3), value), atol=1e-6)


def test_a_fixed_seed_is_the_default():
    one, other = (decomp.cross(reciprocal, {"a": 9, "b": 9, "c": 9}, 4) for _ in range(2))
    assert all(map(torch.equal, one.network.tensors, other.network.tensors))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda at: at, r"of 1000 entries for positions \(1000, 2\); it returned \(1000, 2\)"),
        (lambda at: 1.0, "it returned float"),
        (lambda at: torch.where(at[:, 0] == 2, torch.nan, 1.0), r"position \(2, \d\)"),
        (lambda at: at[:, 0] * 1j, "finite, real"),
    ],
)
def test_what_a_function_may_not_return(function, message):
    with pytest.raises(ValueError, match=message):
        decomp.cross(function, {"a": 3, "b": 4}, 2)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"sweeps": 0}, {"tolerance": -1.0}])
def test_numbers_that_are_not_positive(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be finite and"):
        decomp.cross(reciprocal, {"a": 3, "b": 4}, **{"rank": 2, **wrong})


def test_one_mode_is_no_train():
    with pytest.raises(ValueError, match="at least two modes"):
        decomp.cross(reciprocal, {"a": 3}, 2)


@examples(30)
@given(n=st.integers(1, 7), r=st.integers(1, 3), seed=seeds)
def test_maxvol_reaches_nearly_the_largest_volume(n, r, seed):
    n = max(n, r)
    matrix = torch.randn(n, r, generator=generator(seed), dtype=torch.float64)
    rows, coefficients = maxvol(matrix)
    assert torch.allclose(coefficients @ matrix[rows], matrix, atol=1e-8)
    assert coefficients.abs().max() <= 1.02 + 1e-8
    volume = matrix[rows].det().abs()
    largest = max(matrix[list(some)].det().abs() for some in combinations(range(n), r))
    # Hadamard: a minor of r rows of coefficients whose entries are at most 1.02.
    assert volume >= largest / (1.02**r * r ** (r / 2)) * (1 - 1e-8)


def test_more_modes_than_legs_are_refused_before_any_work():
    def function(positions):
        raise AssertionError

    with pytest.raises(decomp.LegsError, match="52"):
        decomp.cross(function, {f"m{k}": 2 for k in range(27)}, 2)
