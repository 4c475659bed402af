"""Banks of random adapters on tiny models, and what each adapter computes alone."""

import torch
from adapted import output, put
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib


def filled(model, decomposition="cp", rank=2, number=4, **options):
    """A bank with so many random adapters, and the model's output with each alone."""
    bank = lortalib.nn.bank(model, decomposition, rank, capacity=2, **options)
    for seed in range(number):
        adapter = put(model, decomposition, rank, seed=seed, alpha=0.5)
        bank[seed] = adapter
        adapter.remove()
    return bank


def alone(model, seed, inputs, decomposition="cp", rank=2):
    """The output with one of these adapters on the model, or none."""
    if seed is None:
        return output(model, inputs)
    adapter = put(model, decomposition, rank, seed=seed, alpha=0.5)
    found = output(model, inputs)
    adapter.remove()
    return found


def rows_of(model, bank, names, inputs):
    with bank.using(names):
        return output(model, inputs)


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(rows=2, length=5):
    draw = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, 60, (rows, length), generator=draw)}


def equal_tensors(one, other):
    return all(torch.equal(a, b) for group in one for a, b in zip(one[group], other[group]))


def random_stack(bank, number, seed=0):
    """Random numbers for so many adapters; a tied parameter has those of the parameter before it."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for name, tensors in bank[None].items():
        own = [term for term in bank.legs[name].terms if not term.shared]
        found[name] = []
        for term, like in zip(own, tensors, strict=True):
            drawn = torch.randn(number, *like.shape, generator=draw, dtype=like.dtype)
            found[name].append(found[name][-1] if term.tied else drawn)
    return found


def constant(bank, value, *lead):
    return {
        name: [torch.full((*lead, *t.shape), float(value)) for t in ts]
        for name, ts in bank[None].items()
    }


def is_in(frame, *folders):
    path = frame.f_code.co_filename.replace("\\", "/")
    return any(folder in path for folder in folders)
