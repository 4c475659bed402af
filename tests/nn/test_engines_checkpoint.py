"""Checkpoints run a forward again in the backward: with the adapters of that forward, whatever is on now."""

import copy

import pytest
import torch
from adapted import close, put
from models import FAMILIES
from torch.utils.checkpoint import checkpoint

import lortalib

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
OTHER = torch.tensor([[9, 10, 11, 12], [13, 14, 15, 16]])

each_kind = pytest.mark.parametrize("reentrant", [False, True], ids=["default", "reentrant"])


@pytest.fixture(scope="module")
def base():
    return FAMILIES["Llama"].model("ForCausalLM").train()


def two_adapters(base, **options):
    model = copy.deepcopy(base)
    adapters = [
        put(model, name=name, seed=seed, **options)
        for seed, name in enumerate(("query", "document"))
    ]
    return model, adapters


def checkpointed(model, reentrant):
    model.enable_input_require_grads()  # without it, reentrant checkpoints have no gradient to pass on
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def contrast(model, between=lambda: None):
    """Forwards with one adapter and with the other, and then a backward through both."""
    lortalib.nn.set_active(model, "query")
    query = loss_of(model, IDS)
    lortalib.nn.set_active(model, "document")
    document = loss_of(model, OTHER)
    between()
    (query * document).backward()


def gradients(adapters):
    return [
        None if p.grad is None else p.grad.clone()
        for a in adapters
        for p in a.networks.parameters()
    ]


def alike(found, wanted):
    """Whether gradients agree, and are there and not zero where they are wanted."""
    pairs = list(zip(found, wanted, strict=True))
    there = all((f is None) == (w is None) for f, w in pairs)
    return there and all(
        f.any() and close(f / w.abs().max(), w / w.abs().max()) for f, w in pairs if w is not None
    )


@each_kind
def test_each_adapter_gets_the_gradient_of_its_own_forward(base, reentrant):
    plain, owners = two_adapters(base)
    contrast(plain)
    model, own = two_adapters(base)
    contrast(checkpointed(model, reentrant))
    assert alike(gradients(own), gradients(owners))


@each_kind
@pytest.mark.parametrize(
    "switch",
    [
        lambda model: lortalib.nn.set_active(model, []),
        lambda model: lortalib.nn.set_active(model, ["query", "document"]),
        lambda model: lortalib.nn.adapters(model)["document"].disable(),
    ],
    ids=["none", "both", "disabled"],
)
def test_what_is_on_in_the_backward_does_not_matter(base, reentrant, switch):
    plain, owners = two_adapters(base)
    contrast(plain)
    model, own = two_adapters(base)
    contrast(checkpointed(model, reentrant), lambda: switch(model))
    assert alike(gradients(own), gradients(owners))


@each_kind
def test_adapters_of_other_formats_too(base, reentrant):
    """torch itself notices only that tensors of other shapes are saved."""
    found = []
    for checkpoints in (False, True):
        model = copy.deepcopy(base)
        own = [put(model, "cp", 2, name="query"), put(model, "tucker", 3, name="document")]
        contrast(checkpointed(model, reentrant) if checkpoints else model)
        found.append(gradients(own))
    assert alike(*reversed(found))


@each_kind
def test_a_step_after_another_is_not_mixed_up_with_it(base, reentrant):
    """What was remembered of a forward belongs to that forward."""
    plain, owners = two_adapters(base)
    model, own = two_adapters(base)
    checkpointed(model, reentrant)
    for name in ("query", "document", "query"):
        for each in (plain, model):
            lortalib.nn.set_active(each, name)
            each.zero_grad()
            loss_of(each, IDS).backward()
        assert alike(gradients(own), gradients(owners)), name


@each_kind
def test_the_whole_model_in_one_checkpoint(base, reentrant):
    found = []
    for checkpoints in (False, True):
        model, own = two_adapters(base)
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

        def forward(x, model=model):
            return model(inputs_embeds=x, use_cache=False).logits

        lortalib.nn.set_active(model, "query")
        once = (
            checkpoint(forward, embedded, use_reentrant=reentrant)
            if checkpoints
            else forward(embedded)
        )
        lortalib.nn.set_active(model, "document")
        once.square().sum().backward()
        found.append(gradients(own))
    assert alike(*reversed(found))


@each_kind
def test_a_function_that_switches_itself_does_so_again(base, reentrant):
    found = []
    for checkpoints in (False, True):
        model, own = two_adapters(base)
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

        def forward(x, model=model):
            lortalib.nn.set_active(model, "query")
            one = model(inputs_embeds=x, use_cache=False).logits
            lortalib.nn.set_active(model, "document")
            return one * model(inputs_embeds=x, use_cache=False).logits

        both = (
            checkpoint(forward, embedded, use_reentrant=reentrant)
            if checkpoints
            else forward(embedded)
        )
        both.sum().backward()
        found.append(gradients(own))
    assert alike(*reversed(found))


def test_checkpoints_within_checkpoints(base):
    found = []
    for checkpoints in (False, True):
        model, own = two_adapters(base)
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        if checkpoints:
            checkpointed(model, reentrant=False)

        def forward(x, model=model):
            return model(inputs_embeds=x, use_cache=False).logits

        lortalib.nn.set_active(model, "query")
        once = (
            checkpoint(forward, embedded, use_reentrant=False) if checkpoints else forward(embedded)
        )
        lortalib.nn.set_active(model, "document")
        once.square().sum().backward()
        found.append(gradients(own))
    assert alike(*reversed(found))


@each_kind
def test_modules_with_other_values_meanwhile_are_refused(base, reentrant):
    """What trains with an adapter is in the model itself, and is no longer what it was."""
    model = copy.deepcopy(base)
    put(model, name="query", train_also=["model.layers.0.mlp"])
    put(model, name="document", seed=1)
    with pytest.raises(
        RuntimeError,
        match="merged, unmerged, switched or removed, or a bank removed, after the forward",
    ):
        contrast(checkpointed(model, reentrant))


@each_kind
def test_an_adapter_that_was_merged_in_the_forward_is_refused(base, reentrant):
    model = copy.deepcopy(base)
    merged = put(model, name="merged")
    put(model, name="trained", seed=1)
    merged.merge()
    loss = loss_of(checkpointed(model, reentrant), IDS)
    merged.unmerge()
    with pytest.raises(RuntimeError):  # torch's own check of saved weights may come first
        loss.backward()


@each_kind
def test_an_adapter_that_was_merged_after_the_forward_is_refused(base, reentrant):
    """Its gradient would be lost without a word: the merged weights have no part of it."""
    model = copy.deepcopy(base)
    adapter = put(model)
    loss = loss_of(checkpointed(model, reentrant), IDS)
    expected = loss.detach().clone()
    adapter.merge()
    with pytest.raises(RuntimeError, match="merged, unmerged, switched"):
        loss.backward()
    assert close(loss_of(model, IDS), expected)  # merged, its hooks add nothing
    adapter.unmerge()
    assert close(loss_of(model, IDS), expected)
    del loss
    loss_of(model, IDS).backward()
    assert all(p.grad.any() for p in adapter.networks.parameters())
    adapter.merge()
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks


def test_nothing_is_remembered_without_checkpoints_and_after_them(base):
    model, own = two_adapters(base)
    contrast(model)
    assert len(own[0].remembered) == 0
    contrast(checkpointed(model, reentrant=False))
    assert len(own[0].remembered) == 0  # the graph is gone, and what was remembered with it
    kept = loss_of(model, IDS)
    assert len(own[0].remembered) > 0
    del kept


@each_kind
def test_an_adapter_that_was_removed_before_the_backward_is_refused(base, reentrant):
    model, (query, document) = two_adapters(base)
    lortalib.nn.set_active(checkpointed(model, reentrant), "query")
    losses = [loss_of(model, IDS) for _ in range(2)]
    document.remove()  # had no part in it
    losses[0].backward()
    query.remove()
    with pytest.raises(RuntimeError, match="switched or removed"):
        losses[1].backward()


@each_kind
def test_a_forward_after_a_refused_one_counts_again(base, reentrant):
    model, own = two_adapters(base)
    loss = loss_of(checkpointed(model, reentrant), IDS)
    own[0].merge()
    with pytest.raises(RuntimeError, match="call backward"):
        loss.backward()
    own[0].unmerge()
    loss_of(model, IDS).backward()
    assert all(p.grad is not None for p in own[0].networks.parameters())
