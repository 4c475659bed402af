"""The forward with any choice of sites, several adapters and inputs of any shape."""

import pytest
import torch
from adapted import close, put
from dense_forward import (
    LAYERS,
    adapted_model,
    all_close,
    each_model,
    inputs_of,
    projection,
    same_as_dense,
    same_output_as_dense,
    weighed,
)
from models import words
from strategies import generator

from lortalib.nn import set_active

OPTIONS = {
    "only q": {"targets": "q"},
    "k and v": {"targets": "kv"},
    "only o": {"targets": "o"},
    "one layer": {"layers": 1},
    "layers differ": {"targets": [LAYERS.format(*pair) for pair in ("0q", "0o", "1k", "1v")]},
    "k in one layer": {"targets": [LAYERS.format(*pair) for pair in ("0q", "0k", "1q")]},
    "split": {"gqa": "split"},
    "mlp": {"targets": "mlp"},
    "one factor for in": {"targets": "all", "share_residual": True},
    "more than a row of a batch": {"rank": 9},
}


@pytest.mark.parametrize("decomposition", ["cp", "tt"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whatever_sites_there_are(options, decomposition):
    model, _ = adapted_model("Llama", decomposition, **options)
    assert same_as_dense(model, words())
    assert same_output_as_dense(model, words())


@each_model
def test_two_adapters_at_once(name):
    model, _ = adapted_model(name, name="one")
    put(model, "tucker", name="two", seed=1, dtype=torch.float64)
    for names in (["one", "two"], "two", "one", ["two", "one"]):
        set_active(model, names)
        assert same_as_dense(model, inputs_of(name))
        assert same_output_as_dense(model, inputs_of(name))


@pytest.mark.parametrize("size", [(), (5,), (1, 5), (3, 5), (3, 1), (2, 2, 5)], ids=str)
@pytest.mark.parametrize(("name", "role"), [("Llama", "q"), ("Llama", "k"), ("Bert", "v")])
def test_projections_of_inputs_of_any_shape(name, role, size):
    model, adapter = adapted_model(name)
    module, dense = projection(model, adapter, role)
    x = torch.randn(*size, 16, generator=generator(), dtype=torch.float64)
    for start in (x, torch.stack([x, x], -1)[..., 0]):
        one, other = (start.clone(memory_format=torch.preserve_format) for _ in range(2))
        with torch.no_grad():
            assert close(module(one), dense(one), 1e-8)
        one.requires_grad_()
        other.requires_grad_()
        wanted = list(adapter.parameters())
        found = torch.autograd.grad(weighed(module(one)), [one, *wanted])
        assert all_close(found, torch.autograd.grad(weighed(dense(other)), [other, *wanted]))
