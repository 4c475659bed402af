"""Forwards whose operations torch records, keeps or differentiates: they compute what others do."""

from functools import partial

import peft
import pytest
import torch
from adapted import FORMATS, close, put
from models import FAMILIES
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lortalib
from lortalib.peft import LortaConfig

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
KINDS = ["cp", "lora", "indscal"]
each_kind = pytest.mark.parametrize("decomposition", KINDS)


def bert():
    model = FAMILIES["Bert"].model().double().eval()
    model.set_attn_implementation("eager")  # the only one with forward derivatives
    return model


def adapted(decomposition="cp", **options):
    model = bert()
    stream = {"acts_on": "stream"} if decomposition == "indscal" else {}
    adapter = put(model, decomposition, **stream, **options)
    adapter.double()
    return model, adapter


def hidden(model, ids=IDS):
    return model(input_ids=ids)[0]


def loss_of(y):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    return (y * weights).sum()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, loss):
    return torch.autograd.grad(loss, list(trained(model).values()))


def all_close(one, other):
    return all(close(a, b, 1e-9) for a, b in zip(one, other, strict=True))


# Selective checkpoints


def keep_products(ctx, operation, *args, **kwargs):
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    kept = operation.overloadpacket in products
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective(forward):
    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    return checkpoint(forward, use_reentrant=False, context_fn=contexts)


@each_kind
@pytest.mark.parametrize("warm", [False, True])
def test_a_selective_checkpoint_leaves_the_gradients_as_they_are(decomposition, warm):
    model, _ = adapted(decomposition)
    if warm:
        hidden(model)
    found = gradients(model, loss_of(selective(lambda: hidden(model))))
    want = gradients(model, loss_of(hidden(model)))
    assert all_close(found, want)


def test_selective_checkpoints_of_layers():
    model, adapter = adapted()
    want = gradients(model, loss_of(hidden(model)))
    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    assert all_close(gradients(model, loss_of(hidden(model))), want)
    loss = loss_of(hidden(model))
    adapter.merge()
    with pytest.raises(RuntimeError, match="a checkpoint runs again"):
        gradients(model, loss)


def test_a_selective_checkpoint_of_rows_and_of_peft():
    model = bert()
    adapter = put(model, "metatt_41d", tasks=["one", "two"])
    adapter.double()
    with adapter.using(["one", "two"]):
        found = gradients(model, loss_of(selective(lambda: hidden(model))))
        assert all_close(found, gradients(model, loss_of(hidden(model))))
    wrapped = peft.get_peft_model(bert(), LortaConfig(rank=2, init_weights=False)).double().eval()
    found = gradients(wrapped, loss_of(selective(lambda: hidden(wrapped))))
    assert all_close(found, gradients(wrapped, loss_of(hidden(wrapped))))


# make_fx and torch.jit.trace


@each_kind
@pytest.mark.parametrize("warm", [False, True])
def test_make_fx_sees_the_factors(decomposition, warm):
    model, adapter = adapted(decomposition)
    with torch.no_grad():
        if warm:
            hidden(model)
        graph = make_fx(partial(hidden, model))(IDS)
        for factor in adapter.parameters():
            factor.mul_(1.5)
        assert close(graph(IDS), hidden(model), 1e-9)


@pytest.mark.parametrize("decomposition", [*FORMATS, "indscal"])
def test_a_trace_of_the_interpreter_sees_the_factors(decomposition):
    model, adapter = adapted(decomposition)
    model.config.return_dict = False
    traced = torch.jit.trace(model, (IDS,), check_trace=False)
    assert close(traced(IDS)[0], hidden(model), 1e-9)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.mul_(1.1)
    other = torch.tensor([[3, 1, 4]])
    assert close(traced(other)[0], hidden(model, other), 1e-9)
    assert all_close(
        gradients(model, loss_of(traced(IDS)[0])), gradients(model, loss_of(hidden(model)))
    )


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def test_a_trace_of_a_weight_that_is_read_directly_is_refused():
    model, x = encoder(), torch.randn(2, 3, 32)
    adapter = put(model)
    want = model(x)
    with pytest.raises(RuntimeError, match=r"trace cannot follow .*in_proj_weight.*merge\(\)"):
        torch.jit.trace(model, (x,), check_trace=False)
    adapter.merge()
    assert close(torch.jit.trace(model, (x,), check_trace=False)(x), want)


def test_an_update_that_fails_is_not_left_out(monkeypatch):
    model = encoder()
    put(model)

    def fails(*args):
        raise AttributeError("no such thing")

    monkeypatch.setattr(lortalib.nn.Adapter, "delta", fails)
    with pytest.raises(RuntimeError, match=r"the update of the weight .* no such thing"):
        model(torch.randn(2, 3, 32))


# Derivatives


def difference(model, factors, tangents, size=1e-6):
    """The derivative along tangents, by finite differences."""
    outputs = []
    with torch.no_grad():
        for sign in (1, -1):
            moved = {n: p + sign * size * tangents[n] for n, p in factors.items()}
            outputs.append(functional_call(model, moved, (IDS,))[0])
    return (outputs[0] - outputs[1]) / (2 * size)


@each_kind
@pytest.mark.parametrize("trains", [True, False])
def test_forward_derivatives_of_the_factors(decomposition, trains):
    model, adapter = adapted(decomposition)
    factors = trained(model)
    adapter.requires_grad_(trains)
    for seed in range(3):  # memory of one tangent is used again for the next
        generator = torch.Generator().manual_seed(seed)
        tangents = {
            n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in factors.items()
        }
        with forward_ad.dual_level():
            dual = {n: forward_ad.make_dual(p, tangents[n]) for n, p in factors.items()}
            found = forward_ad.unpack_dual(functional_call(model, dual, (IDS,))[0]).tangent
            del dual
        assert close(found, difference(model, factors, tangents), 1e-6)


def test_several_gradients_at_once_are_refused_with_a_way_out():
    model, _ = adapted()
    y = hidden(model)
    with pytest.raises(RuntimeError, match=r"is_grads_batched=True.*torch\.func"):
        torch.autograd.grad(
            y, list(trained(model).values()), y.new_ones(2, *y.shape), is_grads_batched=True
        )


# Keywords


def test_an_input_by_keyword_is_refused_by_name():
    model, _ = adapted()
    query = model.encoder.layer[0].attention.self.query
    with pytest.raises(TypeError, match=r"a Linear .*keywords alone"):
        query(input=torch.randn(1, 2, query.in_features).double())
