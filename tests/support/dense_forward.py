"""Tiny adapted models beside the same models with dense updates in their weights, with autograd."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from adapted import close, put
from models import FAMILIES, GPT2, PHI3, both_sides, words
from strategies import generator
from torch.func import functional_call
from torch.nn.functional import linear

from lortalib.nn import adapters

MODELS = {
    "Llama": lambda **sizes: FAMILIES["Llama"].model("ForCausalLM", **sizes),
    "Bert": FAMILIES["Bert"].model,
    "GPT2": GPT2.model,
    "Phi3": PHI3.model,
    "T5": lambda: FAMILIES["T5"].model("ForConditionalGeneration"),
}

#: A few formats whose factors are divided unlike.
FORMATS = ["cp", "tucker", "tt", "lora"]
each_model = pytest.mark.parametrize("name", MODELS)
each_simple_model = pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2", "Phi3"])
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": nullcontext}

LAYERS = "model.layers.{}.self_attn.{}_proj"


def adapted_model(name, decomposition="cp", /, rank=2, **options):
    """A tiny float64 model with an adapter whose numbers are random."""
    sizes = options.pop("sizes", {})
    model = MODELS[name](**sizes).double()
    adapter = put(model, decomposition, rank, **{"alpha": 0.7, "dtype": torch.float64, **options})
    return model, adapter


def inputs_of(name):
    return both_sides() if name == "T5" else words()


def active_adapters(model):
    return [adapter for adapter in adapters(model).values() if adapter.active]


def densely(root, inputs, module=None):
    """What the model, or a module of it, returns with weights that hold the updates."""
    module = module or root
    path = next(path for path, known in root.named_modules() if known is module)
    start, on, weights = path + "." * bool(path), active_adapters(root), {}
    for adapter in on:
        for site in adapter.sites:
            if site.path.startswith(start):
                name = f"{site.path}.{site.parameter}".removeprefix(start)
                old = weights.get(name, module.get_parameter(name))
                weights[name] = old + adapter.delta(site)
    for adapter in on:
        adapter.active = False
    try:
        return functional_call(module, weights, (), inputs)[0]
    finally:
        for adapter in on:
            adapter.active = True


def weighed(value, seed=0):
    """A number that every entry counts for."""
    noise = torch.randn(value.shape, generator=generator(seed), dtype=torch.float64)
    return (value * noise).sum()


def gradients(value, root):
    trained = [p for p in root.parameters() if p.requires_grad]
    return torch.autograd.grad(weighed(value), trained, materialize_grads=True, allow_unused=True)


def all_close(found, expected):
    return all(close(a, b, 1e-8) for a, b in zip(found, expected, strict=True))


def same_as_dense(root, inputs, module=None):
    """Whether output and gradients are those of dense updates."""
    results = []
    for call in (lambda: (module or root)(**inputs)[0], lambda: densely(root, inputs, module)):
        torch.manual_seed(0)  # for the dropout of the base
        value = call()
        results.append([value.detach(), *gradients(value, root)])
    found, expected = results
    live = {id(p) for adapter in active_adapters(root) for p in adapter.parameters()}
    trained = [p for p in root.parameters() if p.requires_grad]
    assert [bool(g.any()) for g in expected[1:]] == [id(p) in live for p in trained]
    return all_close(found, expected)


def same_output_as_dense(root, inputs, module=None):
    """Whether the output alone is, without a backward."""
    torch.manual_seed(0)
    found = (module or root)(**inputs)[0]
    torch.manual_seed(0)
    with torch.no_grad():
        return close(found, densely(root, inputs, module), 1e-8)


def projection(model, adapter, role="q", layer=0):
    """A projection module, and what it computes with the dense update."""
    site = next(site for site in adapter.sites if (site.role, site.layer) == (role, layer))
    module = model.get_submodule(site.path)
    return module, lambda x: linear(x, module.weight + adapter.delta(site), module.bias)


def vectors(*size, seed=3):
    return torch.randn(*(size or (2, 5)), 16, generator=generator(seed), dtype=torch.float64)


def body(model):
    """The module that a model with a head holds its layers in, or such a module of a bare one."""
    return model.get_submodule({"LlamaForCausalLM": "model"}.get(type(model).__name__, "encoder"))


def batch(seed):
    return {"input_ids": torch.randint(5, 60, (2, 7), generator=generator(seed))}


def take_gradients(adapter):
    found = [parameter.grad.clone() for parameter in adapter.parameters()]
    adapter.zero_grad()
    return found


def loss_of(model, seed):
    return weighed(model(**batch(seed))[0], seed)


def dense_gradients(model, *seeds):
    """Of the sum of these losses, with dense updates."""
    loss = sum(weighed(densely(model, batch(seed)), seed) for seed in seeds)
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))
