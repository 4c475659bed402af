"""Contractions that are planned down to single operations."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, generator, seeds

from lortalib.decomp import _steps
from lortalib.decomp._einsum import contraction_path
from lortalib.decomp._pieces import Pieces
from lortalib.decomp._steps import has_values_only, run_steps, steps_of

LEGS = "abcdef"


@st.composite
def pieces(draw):
    """Up to four tensors with any legs in common and any axes in memory, and the legs of a result."""
    sizes = dict(zip(LEGS, draw(st.lists(st.integers(1, 3), min_size=6, max_size=6))))
    own = st.lists(st.sampled_from(LEGS), max_size=4, unique=True).map(tuple)
    terms = tuple(draw(st.lists(own, min_size=1, max_size=4)))
    output = draw(st.permutations(sorted({leg for term in terms for leg in term})))
    output = tuple(output[: draw(st.integers(0, len(output)))])
    source, tensors = generator(draw(seeds)), []
    for term in terms:
        stored = draw(st.permutations(term))
        shape = [sizes[leg] for leg in stored]
        tensor = torch.randn(shape, generator=source, dtype=torch.float64)
        tensors.append(tensor.permute([stored.index(leg) for leg in term]))
    return Pieces(terms, tuple(tensors)), output


@examples(300)
@given(pieces(), st.sampled_from([1, 10, 2048]))
def test_they_give_what_einsum_gives(drawn, least):
    """Whatever is multiplied as matrices."""
    found, output = drawn
    inputs = ",".join(map("".join, found.terms))
    expected = torch.einsum(f"{inputs}->{''.join(output)}", *found.tensors)
    path = contraction_path(found.terms, output, tuple(found.sizes.items()))
    with mock.patch.object(_steps, "LEAST_MATRIX", least):
        steps = steps_of(path, tuple(tensor.shape for tensor in found.tensors))
    torch.testing.assert_close(run_steps(steps, found.tensors), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_and_autocast_keep_their_way(dtype):
    tensor = torch.ones(2, 2, dtype=dtype)
    assert has_values_only([tensor])
    assert not has_values_only([tensor, tensor.clone().requires_grad_()])
    with torch.autocast("cpu", torch.bfloat16):
        assert has_values_only([tensor]) == (dtype == torch.float64)
        square = Pieces((("a", "b"), ("b", "c")), (tensor, tensor)).contract(("a", "c"))
    assert square.dtype == dtype


@pytest.mark.parametrize("size", [4, 64])
def test_many_small_matrices_are_multiplied_entry_by_entry(size):
    """The second product of an update of CP, a matrix and a vector for each component."""
    terms, sizes = (("r", "a", "b"), ("b", "r")), (("r", 5), ("a", size), ("b", size))
    path = contraction_path(terms, ("a", "r"), sizes)
    (step,) = steps_of(path, ((5, size, size), (size, 5)))
    assert step.has_matrices == (size == 64)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_large_tensor_is_used_as_it_lies_in_memory(axis):
    """The first product of an update of CP makes no copy of the target, whichever its mode."""
    large, legs = torch.randn(64, 64, 64, generator=generator()), ("a", "b", "c")
    terms, sizes = (legs, (legs[axis], "r")), (*((leg, 64) for leg in legs), ("r", 2))
    path = contraction_path(terms, (*(leg for leg in legs if leg != legs[axis]), "r"), sizes)
    (step,) = steps_of(path, (large.shape, (64, 2)))
    turn = step.turns[step.right == 0]
    turned = large if turn is None else turn.of(large)
    assert step.has_matrices
    assert turned.data_ptr() == large.data_ptr()
