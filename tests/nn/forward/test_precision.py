"""Low precision: what is rounded, once, and what is not."""

import copy

import pytest
import torch
from adapted import close, output, put, same_bits
from dense_forward import adapted_model, each_model, inputs_of
from strategies import generator

from lortalib.nn import adapters


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["Llama", "Phi3"])
def test_in_bfloat16_the_shared_factor_gathers_all_of_its_gradient(name, how):
    """Every projection of every layer adds to the gradient of ``in``; none is rounded away."""
    model, adapter = adapted_model(name, sizes={"num_hidden_layers": 16}, dtype=torch.float32)
    model.to(torch.bfloat16)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.float()
    exact = copy.deepcopy(model).double()
    if how == "autocast":
        model.float()
    roles = {site.path: site for site in adapter.sites if not site.writer}
    cast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
    total = expected = 0.0
    for k, path in enumerate(roles):
        x = torch.randn(4, 32, 16, generator=generator(k)).bfloat16()
        with cast:
            y = model.get_submodule(path)(x if how == "bfloat16" else x.float())
        assert y.dtype == torch.bfloat16
        noise = torch.randn(y.shape, generator=generator(k + 50)).bfloat16()
        little = 0.004 if k else 1.0  # of the first, which bfloat16 would not notice
        total = total + little * (y.float() * noise.float()).sum()
        exact_value = (exact.get_submodule(path)(x.double()) * noise.double()).sum()
        expected = expected + little * exact_value
    total.backward()
    expected.backward()
    pairs = zip(adapter.named_parameters(), adapters(exact)["default"].parameters())
    for (factor, one), other in pairs:
        assert one.grad.dtype == torch.float32
        assert relative(one.grad, other.grad) < 0.02, factor


@pytest.mark.parametrize("cast", [True, False], ids=["autocast", "plain"])
@pytest.mark.parametrize("decomposition", ["cp", "tucker"])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_pairs_in_bfloat16_are_those_of_float32_rounded_once(name, decomposition, cast):
    _, adapter = adapted_model(name, decomposition, dtype=torch.float32)
    for factors in adapter.sources:
        for kind, _ in enumerate(factors._signatures):
            exact = factors.pair(kind, 1, torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                found = factors.pair(kind, 1, torch.bfloat16)
                again = factors.pair(kind, 1, torch.float32)
            assert all(same_bits(a, b.bfloat16()) for a, b in zip(found, exact))
            assert all(map(same_bits, again, exact))


@each_model
def test_autocast_on_and_off_in_turns(name):
    model, _ = adapted_model(name)
    expected = output(model, inputs_of(name))
    model.float()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**inputs_of(name))[0]
        off = (found.detach().double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert 1e-4 < off.median() < 0.05
        assert close(model(**inputs_of(name))[0].detach().double(), expected, 1e-4)


def test_under_autocast_a_disabled_adapter_changes_no_bit(llama, inputs):
    adapter = put(llama)
    with torch.autocast("cpu", torch.bfloat16):
        on = output(llama, inputs)
        with adapter.disabled():
            disabled = output(llama, inputs)
        adapter.remove()
        assert same_bits(output(llama, inputs), disabled)
    assert not close(on, disabled, 1e-2)
