"""Lines that split layer and matrix, which are chosen by position, and the heads of grouped queries."""

import pytest
import torch
from adapted import close, put
from torch.func import functional_call
from transformers import LlamaConfig, LlamaModel

LINES = [
    "layer.1 in.1 a, layer.2 in.2 a b, matrix.1 head.1 b c, matrix.2 head.2 out.1 c d, out.2 d",
    "layer.1:2 matrix.2:2 in r, layer.2:2 matrix.1:2 head.1 r, head.2 out r",
    "layer.1 in.1:2 out.1 r (full), layer.2 matrix in.2 r, head.1 r, head.2 out.2 r",
]
IDS = torch.arange(12).view(2, 6)


def llama():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaModel(config).double().eval().requires_grad_(False)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_outputs_and_gradients_are_those_of_dense_updates(line, layer):
    """Up to some layer, so that the pairs of some layers get gradients and others none."""
    plain, model = llama(), llama()
    model.load_state_dict(plain.state_dict())
    adapter = put(model, line, 2, dtype=torch.float64)
    tensors = list(adapter.parameters())
    found = model(IDS, output_hidden_states=True).hidden_states[layer]
    weights = {}
    for group in adapter.groups:
        for site in group.sites:
            name = f"{site.path}.weight"
            delta = group.delta(adapter.network(group), site, None)
            weights[name] = plain.get_parameter(name) + delta
    dense = functional_call(plain, weights, (IDS,), {"output_hidden_states": True})
    expected = dense.hidden_states[layer]
    assert close(found, expected, 1e-10)
    gradients = [
        torch.autograd.grad(y.square().sum(), tensors, allow_unused=True, materialize_grads=True)
        for y in (found, expected)
    ]
    for one, other in zip(*gradients):
        assert close(one, other, 1e-8)
