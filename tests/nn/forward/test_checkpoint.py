"""Checkpoints, and the tensors that a forward saves for its backward."""

from collections import Counter

import pytest
import torch
from adapted import close, output, put
from changes import SEEN
from dense_forward import (
    adapted_model,
    all_close,
    dense_gradients,
    each_model,
    inputs_of,
    loss_of,
    projection,
    take_gradients,
    vectors,
    weighed,
)
from models import words
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lortalib.nn import set_active


def loss_on(model, inputs):
    return model(**inputs)[0].float().square().mean()


def gradients_on(model, inputs):
    model.zero_grad()
    loss_on(model, inputs).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


re_entrant = pytest.mark.parametrize("use_reentrant", [True, False])


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")
@re_entrant
@pytest.mark.parametrize("decomposition", ["cp", "lora"])
def test_checkpoints_of_many_layers_leave_the_gradients_as_they_are(decomposition, use_reentrant):
    model, adapter = adapted_model("Llama", decomposition, sizes={"num_hidden_layers": 4})
    model.train()
    expected = dense_gradients(model, 1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for early_stop in (True, False, True):
        with set_checkpoint_early_stop(early_stop):
            loss_of(model, 1).backward()
        assert all_close(take_gradients(adapter), expected)
        torch.optim.SGD(adapter.parameters(), lr=0.0).step()


@re_entrant
def test_checkpoints_of_single_projections(use_reentrant):
    model, adapter = adapted_model("Llama")
    x, values = vectors().requires_grad_(), 0
    for role in "qkv":
        module, _ = projection(model, adapter, role)
        values = values + weighed(checkpoint(module, x, use_reentrant=use_reentrant))
    values.backward()
    found = take_gradients(adapter)
    dense = [projection(model, adapter, role)[1] for role in "qkv"]
    expected = torch.autograd.grad(sum(weighed(d(x)) for d in dense), list(adapter.parameters()))
    assert all_close(found, expected)


def saved_in(call):
    """Shapes of the tensors that a call saves for the backward."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return Counter(shapes)


@each_model
def test_a_forward_that_is_repeated_saves_what_it_saved_at_first(name):
    """Whoever made the pairs, and whatever came between."""
    model, adapter = adapted_model(name)
    call = lambda: model(**inputs_of(name))[0]  # noqa: E731
    first = saved_in(call)
    assert saved_in(call) == first
    output(model, inputs_of(name))
    assert saved_in(call) == first
    weighed(call()).backward()
    assert saved_in(call) == first
    SEEN["SGD"](model, adapter)
    output(model, inputs_of(name))
    assert saved_in(call) == first


@pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2"])
def test_of_the_pairs_only_small_tensors_are_saved(name):
    """Beyond what the base saves: the inputs it has anyway, products of length p, and the pairs."""
    model, _ = adapted_model(name)
    set_active(model, [])
    model.get_input_embeddings().requires_grad_(True)
    base = saved_in(lambda: model(**words()))
    set_active(model, "default")
    beyond = saved_in(lambda: model(**words())) - base
    assert beyond
    assert all(2 in shape or shape[-1] == 16 for shape in beyond)


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_same_dropout(llama, inputs, use_reentrant):
    llama.train()
    put(llama, dropout=0.5)
    torch.manual_seed(0)
    expected = gradients_on(llama, inputs)
    llama.enable_input_require_grads()
    llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(0)
    assert all(close(a, b, 1e-6) for a, b in zip(gradients_on(llama, inputs), expected))
