"""Training: what gets a gradient, dropout, checkpointing, autocast, low precision, compilation."""

import pytest
import torch
from harness import close, each_format, generator, output, put, same_bits, unchanged, weight
from models import FAMILIES, each_family
from torch.nn.functional import linear

import lortalib
from lortalib.nn import set_active


def loss_of(model, inputs):
    return model(**inputs)[0].float().square().mean()


def gradients(model, inputs):
    model.zero_grad()
    loss_of(model, inputs).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


# Gradients


@each_family
def test_after_one_step_every_factor_has_a_gradient_and_no_base_weight(family):
    model, inputs = family.model(), family.inputs()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = put(model, init="invariant")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        for name, parameter in model.named_parameters():
            if name.startswith("lortalib."):
                assert parameter.grad is not None
                assert torch.isfinite(parameter.grad).all()
                assert step == 0 or parameter.grad.abs().max() > 0, name
            else:
                assert parameter.grad is None, name
        optimizer.step()
    now = dict(model.named_parameters())
    assert all(same_bits(now[name], old) for name, old in base.items())


@pytest.mark.parametrize("gqa", ["pool", "split"])
@each_format
def test_gradients_are_those_of_the_dense_update(decomposition, gqa, llama, inputs):
    """The same loss with weights + delta, formed densely, has the same gradients."""
    adapter = put(llama, decomposition, gqa=gqa, alpha=0.7)
    trainable = [p for p in adapter.parameters() if p.requires_grad]
    through_hooks = torch.autograd.grad(loss_of(llama, inputs), trainable)
    adapted = {
        f"{site.path}.weight": weight(llama, site) + adapter.delta(site) for site in adapter.sites
    }
    adapter.active = False
    dense = torch.func.functional_call(llama, adapted, (), inputs)[0].float().square().mean()
    for found, expected in zip(through_hooks, torch.autograd.grad(dense, trainable)):
        assert expected.abs().max() > 0
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_frozen_parameters_get_none(llama, inputs):
    adapter = put(llama, "vera")
    loss_of(llama, inputs).backward()
    for name, parameter in adapter.named_parameters():
        assert (parameter.grad is not None) == name.endswith("layer_matrix_r")


def test_accumulated_gradients_add_up(llama):
    put(llama)
    one, two = FAMILIES["Llama"].inputs(), {"input_ids": torch.arange(5, 19).reshape(2, 7)}
    alone = [gradients(llama, batch) for batch in (one, two)]
    llama.zero_grad()
    for batch in (one, two):
        loss_of(llama, batch).backward()
    both = [p.grad for p in llama.parameters() if p.requires_grad]
    assert all(close(found, a + b, 1e-6) for found, a, b in zip(both, *alone))


def test_an_inactive_adapter_gets_no_gradient(llama, inputs):
    first, second = put(llama, name="a"), put(llama, name="b", seed=1)
    set_active(llama, "b")
    loss_of(llama, inputs).backward()
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in second.parameters())


def test_training_lowers_the_loss(llama, inputs):
    adapter = lortalib.nn.apply(llama, "cp", rank=4, generator=generator())
    optimizer = torch.optim.Adam(adapter.parameters(), lr=2e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = llama(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(llama, inputs, use_reentrant):
    llama.train()
    put(llama)
    put(llama, name="second", seed=1)
    expected = gradients(llama, inputs)
    llama.enable_input_require_grads()
    llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert llama.is_gradient_checkpointing
    found = gradients(llama, inputs)
    assert len(found) == len(expected) > 0
    assert all(close(a, b, 1e-6) for a, b in zip(found, expected))


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_same_dropout(llama, inputs, use_reentrant):
    llama.train()
    put(llama, dropout=0.5)
    torch.manual_seed(0)
    expected = gradients(llama, inputs)
    llama.enable_input_require_grads()
    llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(0)
    assert all(close(a, b, 1e-6) for a, b in zip(gradients(llama, inputs), expected))


# Dropout


def test_dropout_is_for_training_only(llama, inputs):
    plain = put(llama, name="plain")
    expected = output(llama, inputs)
    plain.remove()
    adapter = put(llama, dropout=0.5)
    assert not adapter.training
    assert same_bits(output(llama, inputs), expected)
    llama.train()
    assert adapter.training
    one, two = output(llama, inputs), output(llama, inputs)
    assert not same_bits(one, two)
    torch.manual_seed(0)
    one = output(llama, inputs)
    torch.manual_seed(0)
    assert same_bits(output(llama, inputs), one)
    llama.eval()
    assert same_bits(output(llama, inputs), expected)


def test_an_adapter_put_on_a_training_model_trains(llama):
    llama.train()
    assert put(llama, dropout=0.5).training


@pytest.mark.parametrize("role", list("qo"))
def test_dropout_drops_input_features_and_keeps_the_mean(llama, role):
    """The share is that of the input after dropout: with one seed it is known."""
    adapter = put(llama, dropout=0.25, targets=role, layers=0).train()
    (site,) = adapter.sites
    projection = llama.get_submodule(site.path)
    x = torch.randn(2, 3, 16, generator=generator())
    torch.manual_seed(1)
    found = projection(x)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.25)
    expected = linear(x, projection.weight) + linear(dropped, adapter.delta(site))
    assert (dropped == 0).any()
    assert close(found, expected)
    adapter.disable()
    assert same_bits(projection(x), linear(x, projection.weight))


def test_zero_dropout_draws_no_random_numbers(llama, inputs):
    put(llama, init="invariant")
    llama.train()
    state = torch.get_rng_state()
    output(llama, inputs)
    assert torch.equal(torch.get_rng_state(), state)


# Precision


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_runs_and_trains(family, dtype):
    model = family.model()
    adapter = put(model)
    exact = output(model, family.inputs())
    adapter.remove()
    adapter = put(model.to(dtype))
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.inputs().items()}
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    found = model(**inputs)[0]
    assert found.dtype == dtype
    off = (found.detach().float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert off.median() < 0.05  # a layer norm can blow up the rounding of single positions
    found.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fresh_changes_no_bit_in_half_precision(llama, inputs, dtype):
    llama.to(dtype)
    before = output(llama, inputs)
    adapter = put(llama, init="invariant")
    assert same_bits(output(llama, inputs), before)
    adapter.merge()
    assert same_bits(output(llama, inputs), before)


def test_autocast(llama, inputs):
    adapter = put(llama)
    exact = output(llama, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = llama(**inputs)[0]
        found.float().square().mean().backward()
    assert found.dtype == torch.bfloat16
    off = (found.detach().float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert off.median() < 0.05  # a layer norm can blow up the rounding of single positions
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())
    with torch.autocast("cpu", torch.bfloat16), adapter.disabled():
        disabled = output(llama, inputs)
    adapter.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(output(llama, inputs), disabled)


def test_to_and_half_move_the_factors_with_the_model(llama, inputs):
    adapter = put(llama)
    exact = output(llama, inputs)
    llama.to(torch.float64)
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}
    assert close(output(llama, inputs).float(), exact)


# Compilation


def test_compiled_agrees_with_eager(llama, inputs):
    torch._dynamo.reset()
    adapter = put(llama)
    put(llama, "tt", gqa="split", name="second", seed=1)
    expected = output(llama, inputs)
    eager = gradients(llama, inputs)
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    llama.zero_grad()
    found = compiled(**inputs)[0]
    found.square().mean().backward()
    assert close(found, expected)
    grads = [p.grad for p in llama.parameters() if p.requires_grad]
    assert all(close(a, b, 1e-6) for a, b in zip(grads, eager))
    adapter.disable()
    assert close(compiled(**inputs)[0], output(llama, inputs))
    torch._dynamo.reset()


def test_a_forward_leaves_nothing_behind(llama, inputs):
    adapter = put(llama)
    with unchanged(llama):
        loss_of(llama, inputs)
        output(llama, inputs)
    held = [name for name, value in vars(adapter).items() if isinstance(value, torch.Tensor)]
    assert held == []
