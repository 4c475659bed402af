"""Checkpoints run a forward again in the backward, with the adapters of the first run."""

import pytest
import torch
from banks import prompts, random_stack, small_llama
from torch.utils.checkpoint import checkpoint

import lortalib


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("then", ["other", "none", "later"])
def test_the_backward_uses_the_rows_of_the_forward(reentrant, then):
    model, inputs = small_llama().double(), prompts()
    bank = lortalib.nn.bank(model, "cp", 2, dtype=torch.float64)
    found = []
    for checkpoints in (False, True):
        own = {
            name: [t.detach().clone().requires_grad_() for t in ts]
            for name, ts in random_stack(bank, 2).items()
        }
        other = {name: [t.detach() + 1 for t in ts] for name, ts in own.items()}
        model.train(checkpoints)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with bank.using_tensors(own):
            loss = model(**inputs, use_cache=False)[0].square().mean()
            if then == "later":
                loss.backward()
        if then == "other":
            with bank.using_tensors(other):
                loss.backward()
        elif then == "none":
            loss.backward()
        found.append([t.grad for t in own["layers"]])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_function_that_names_several_rows_names_them_again(reentrant):
    model = small_llama().double()
    bank = lortalib.nn.bank(model, "cp", 2, dtype=torch.float64)
    bank.fill([0, 1], random_stack(bank, 2))
    embedded = model.get_input_embeddings()(prompts()["input_ids"]).detach()

    def twice(x):
        for names in ([0, None], [None, 1]):
            with bank.using(names):
                x = model.model(inputs_embeds=x, use_cache=False)[0]
        return x.square().sum()

    gradients = []
    for function in (twice, lambda x: checkpoint(twice, x, use_reentrant=reentrant)):
        x = embedded.clone().requires_grad_()
        function(x).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
