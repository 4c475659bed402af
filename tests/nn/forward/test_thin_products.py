"""Products of tokens with the maps of a pair are those of the definition, in each of their ways."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from lortalib.nn._forward.thin_products import add_up, down

#: Leading axes of x; from 32 tokens on, at rank 8, the product is taken in another layout.
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


@pytest.mark.parametrize("may_write", [True, False])
def test_autocast_leaves_an_output_in_its_dtype(may_write):
    y, h, b = torch.randn(3, 4), torch.randn(3, 2), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):  # y is of a module that computes in float32 there
        found = add_up(y.clone(), h, b, may_write)
    assert found.dtype == torch.float32
    assert torch.allclose(found, y + h @ b, atol=0.1)


@pytest.mark.parametrize("rows", [(), (3,)], ids=["one map", "a map for each row"])
@pytest.mark.parametrize("may_write", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_an_output_of_any_strides_gets_the_product(trains, may_write, rows):
    y = torch.randn(3, 6, 4).transpose(1, 2)  # as behind a hook that returns a view
    h, b = torch.randn(3, 4, 2), torch.randn(*rows, 2, 6, requires_grad=trains)
    with torch.set_grad_enabled(trains):
        found = add_up(y.clone(memory_format=torch.preserve_format), h, b, may_write)
    assert torch.allclose(found, y + h @ b, atol=1e-6)


@pytest.mark.parametrize("rows", [(), (3,)], ids=["one map", "a map for each row"])
def test_an_output_that_others_use_is_not_written_to(rows):
    y, h, b = torch.randn(3, 4, 6), torch.randn(3, 4, 2), torch.randn(*rows, 2, 6)
    before = y.clone()
    with torch.no_grad():
        assert not torch.equal(add_up(y, h, b, may_write=False), before)
        assert torch.equal(y, before)


def test_traces_do_not_depend_on_the_number_of_tokens():
    a, trace = torch.randn(2, 5), make_fx(lambda x, a: down(x, a, 0.0), tracing_mode="symbolic")
    traced = trace(torch.randn(40, 5), a)
    for tokens in (3, 50):
        x = torch.randn(tokens, 5)
        assert torch.allclose(traced(x, a), x @ a.T, atol=1e-6)
    assert not traced.shape_env.guards
