"""Alignment: the gradient by T, what a model and an adapter are afterwards, and what is refused."""

import pytest
import torch
from adapted import FORMATS, close, each_format, output, put, same_bits, unchanged
from models import FAMILIES, each_family
from strategies import generator

import lortalib
from lortalib.nn import align_to_gradient
from lortalib.nn._align import _gradients

#: Formats whose bonds make no tree.
NO_TREE = {"cp", "jd_diag", "cp_matrix", "cara", "vera", "ring", "block_term", "folded_cp"}
#: Formats whose parameters have few free entries.
HASHED = {"uni_lora"}
over_trees = pytest.mark.parametrize(
    "decomposition", [n for n in FORMATS if n not in NO_TREE | HASHED]
)


def squares(model):
    """A loss of the output in which no two features count alike."""

    def loss(batch):
        found = model(**batch)[0].float()
        return (found * torch.linspace(0.5, 1.5, found.shape[-1])).square().mean()

    return loss


def fresh(model, decomposition="lora_xs", rank=2, **options):
    return put(model, decomposition, rank, init="invariant", **options)


@each_family
@pytest.mark.parametrize("gqa", ["pool", "split"])
def test_the_gradient_by_T_is_that_of_the_weights(family, gqa):
    model = family.model().eval()
    batch = family.inputs()
    adapter = put(model, "cp", alpha=0.5, gqa=gqa)
    deltas = {site: adapter.delta(site).detach() for site in adapter.sites}
    directions = {group.name: adapter.network(group).dense().detach() for group in adapter.groups}
    adapter.remove()

    # The derivative along the update, from the gradients of the weights themselves.
    weights = {site: model.get_submodule(site.path).weight for site in deltas}
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = squares(model)
    found = torch.autograd.grad(loss(batch), list(weights.values()))
    slope = sum((g * d).sum() for g, d in zip(found, deltas.values()))

    adapter = fresh(model, "tucker", alpha=0.5, gqa=gqa)
    gradients = _gradients(model, adapter, [batch], loss)
    assert set(gradients) == set(directions)
    same = sum((gradients[name] * directions[name]).sum() for name in directions)
    assert close(same, slope, 1e-4)


@over_trees
def test_the_update_stays_zero_and_the_first_gradient_grows(decomposition, llama, inputs):
    before = output(llama, inputs)
    adapter = fresh(llama, decomposition)
    loss = squares(llama)

    def steepness():
        trained = [p for p in adapter.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss(inputs), trained, allow_unused=True)
        return sum(g.square().sum() for g in found if g is not None).item()

    random = steepness()
    align_to_gradient(llama, [inputs], loss=loss, generator=generator())
    assert same_bits(output(llama, inputs), before)
    assert adapter.config.init == "gradient"
    assert steepness() > 1.5 * random


def test_the_mean_of_several_batches_counts(llama, inputs):
    other = {name: tensor.flip(0) if tensor.ndim else tensor for name, tensor in inputs.items()}
    other["input_ids"] = (inputs["input_ids"] + 3) % 20
    adapter = fresh(llama)
    loss = squares(llama)
    one, two = (_gradients(llama, adapter, [batch], loss) for batch in (inputs, other))
    both = _gradients(llama, adapter, iter([inputs, other]), loss)
    for name in both:
        assert close(both[name], (one[name] + two[name]) / 2)
        assert not close(both[name] / both[name].norm(), one[name] / one[name].norm(), 1e-3)


def test_dropout_of_the_adapter_plays_no_part(llama, inputs):
    adapter = fresh(llama, dropout=0.9).train()
    llama.train()
    loss = squares(llama)
    one, two = (_gradients(llama, adapter, [inputs], loss) for _ in range(2))
    for name in one:
        assert torch.equal(one[name], two[name])


def test_nothing_but_the_factors_changes(llama, inputs):
    adapter = fresh(llama, "lotr")
    start = [tensor.detach().clone() for tensor in adapter.parameters()]
    flags = [p.requires_grad for p in llama.parameters()]
    llama.lm_head.weight.grad = torch.ones_like(llama.lm_head.weight)
    align_to_gradient(llama, [inputs], loss=squares(llama), generator=generator())
    assert [p.requires_grad for p in llama.parameters()] == flags
    assert all(p.grad is None for p in adapter.parameters())
    assert torch.equal(llama.lm_head.weight.grad, torch.ones_like(llama.lm_head.weight))
    assert list(lortalib.nn.adapters(llama)) == ["default"]
    moved = [not torch.equal(a, b) for a, b in zip(start, adapter.parameters())]
    assert sum(moved) == len(moved) - 1  # all but the one that is zero


def test_the_same_generator_gives_the_same_start(llama, inputs):
    starts = []
    for _ in range(2):
        adapter = fresh(llama, "lotr")
        align_to_gradient(llama, [inputs], loss=squares(llama), generator=generator(3))
        starts.append([tensor.detach().clone() for tensor in adapter.parameters()])
        adapter.remove()
    assert all(same_bits(one, two) for one, two in zip(*starts))


def test_networks_of_several_shapes_and_the_loss_of_the_model(inputs):
    llama = FAMILIES["Llama"].model("ForCausalLM")
    adapter = fresh(llama, "lora", targets="all", gqa="split")
    assert len(adapter.groups) > 2
    align_to_gradient(llama, [{**inputs, "labels": inputs["input_ids"]}])
    for group in adapter.groups:
        assert not adapter.network(group).dense().any()


def test_a_model_in_bfloat16_and_factors_in_it(inputs):
    llama = FAMILIES["Llama"].model("ForCausalLM").to(torch.bfloat16)
    adapter = fresh(llama, "lotr", dtype=torch.bfloat16)
    align_to_gradient(llama, [inputs], loss=squares(llama))
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


def test_frozen_directions_are_saved_and_loaded(llama, inputs, tmp_path):
    adapter = fresh(llama, "lora_xs")
    align_to_gradient(llama, [inputs], loss=squares(llama))
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    trained = output(llama, inputs)
    adapter.save(tmp_path)
    adapter.remove()
    loaded = lortalib.nn.load(llama, tmp_path)
    assert same_bits(output(llama, inputs), trained)
    assert loaded.config.init == "gradient"


def test_it_trains_from_there(llama, inputs):
    adapter = fresh(llama, "lora_xs")
    loss = squares(llama)
    align_to_gradient(llama, [inputs], loss=loss)
    before = loss(inputs).item()
    trained = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 3e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss(inputs).backward()
        optimizer.step()
    assert loss(inputs).item() < 0.9 * before


# Refusals leave everything as it was


def refused(model, says, kind=ValueError, batches=None, **options):
    calls = []

    def loss(batch):
        calls.append(batch)
        return squares(model)(batch)

    with unchanged(model), pytest.raises(kind, match=says):
        align_to_gradient(
            model, batches or [FAMILIES["Llama"].inputs()], **{"loss": loss, **options}
        )
    return calls


@each_format
def test_a_format_without_directions_is_refused_before_any_batch(decomposition, llama):
    fresh(llama, decomposition)
    if decomposition in NO_TREE | HASHED:
        says = "are hashed" if decomposition in HASHED else "form no tree"
        assert refused(llama, says) == []


def test_what_was_trained_merged_or_disabled_is_refused(llama):
    adapter = put(llama, "lotr")
    assert refused(llama, "has been trained") == []
    adapter.disable()
    assert refused(llama, "not active") == []
    adapter.enable()
    adapter.merge()
    assert refused(llama, "is merged") == []


def test_an_unknown_name_and_a_shared_parameter_are_refused(llama):
    refused(llama, "the model has none", KeyError)
    fresh(llama, "lotr", targets="all", share_residual=True)
    assert refused(llama, "share a parameter") == []
    refused(llama, "'other'; the model has 'default'", KeyError, name="other")


def test_no_batch_no_gradient_and_a_failing_loss_are_refused(llama, inputs):
    fresh(llama, "lotr")
    with unchanged(llama), pytest.raises(ValueError, match="no batch"):
        align_to_gradient(llama, [], loss=squares(llama))
    refused(llama, "does not depend", loss=lambda batch: torch.ones(()))
    refused(llama, "zero or not finite", loss=lambda batch: 0 * squares(llama)(batch))
    refused(llama, "zero or not finite", loss=lambda batch: squares(llama)(batch) * torch.nan)
    refused(llama, "one number", loss=lambda batch: llama(**batch)[0])

    def fail(batch):
        raise OSError("no more rows")

    refused(llama, "no more rows", OSError, loss=fail)
    refused(llama, "loss=", batches=[inputs], loss=None)  # no labels, so the model has no loss
