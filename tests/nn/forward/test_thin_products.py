"""Products of tokens with the maps of a pair are those of the definition, in each of their ways."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lortalib.nn._forward.thin_products import add_up, down

#: Leading axes of x; from 32 tokens on the product is taken in another layout.
TOKENS = st.sampled_from([(1,), (3, 7), (31,), (32,), (2, 16), (2, 4, 9), (0, 5)])


@st.composite
def inputs(draw, axes=TOKENS):
    """Draw x, contiguous or not, with 1 or 3 blocks of features that one A reads."""
    lead, rank, features = draw(axes), draw(st.sampled_from([1, 2, 8, 16])), 5
    blocks = draw(st.sampled_from([1, 3]))
    draw_from = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(*lead, blocks * features, generator=draw_from, dtype=torch.float64)
    if draw(st.booleans()):
        x = x.repeat_interleave(2, -1)[..., ::2]
    return x, torch.randn(rank, features, generator=draw_from, dtype=torch.float64)


@given(inputs())
def test_down_is_the_product_with_each_block_of_features(case):
    x, a = case
    blocks = x.unflatten(-1, (-1, a.shape[-1]))
    expected = torch.einsum("...hi,ri->...hr", blocks, a)
    found = down(x, a, 0.0)
    assert found.shape == (expected if x.shape[-1] != a.shape[-1] else expected.squeeze(-2)).shape
    assert torch.allclose(found.reshape(expected.shape), expected, atol=1e-12)


@given(inputs(st.sampled_from([(3,), (2, 16)])))
def test_gradients_of_both_products_and_of_these(case):
    x, a = (tensor.contiguous().requires_grad_() for tensor in case)
    b = torch.randn(len(a), 4, dtype=torch.float64, requires_grad=True)
    blocks = x.shape[-1] // a.shape[-1]
    y = torch.randn(*x.shape[:-1], 4 * blocks, dtype=torch.float64)

    def product(x, a, b):
        return add_up(y.clone(), down(x, a, 0.0), b, may_write=True)

    assert torch.autograd.gradcheck(product, (x, a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(product, (x, a, b), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_map(dtype):
    assert down(torch.ones(40, 8), torch.ones(2, 8, dtype=dtype), 0.5).dtype == dtype
