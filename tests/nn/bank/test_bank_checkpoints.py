"""Checkpoints run a forward again in the backward, with the adapters of the first run."""

import pytest
import torch
from banks import prompts, random_stack, small_llama

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
