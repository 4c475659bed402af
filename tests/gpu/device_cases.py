"""What the tests of devices share: kinds of adapters, a tiny model whose attention is plain products.

They need nothing but pytest beside what lortalib and PEFT need, so that they run wherever there is a GPU.
"""

import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib

KINDS = {
    "cp": {},
    "tucker": {},
    "lotr": {"targets": "all"},
    "lora_xs": {},
    "indscal": {"targets": "all", "acts_on": "stream"},
}


def llama(dtype=torch.float32, device="cpu", **sizes):
    """A tiny Llama; the same numbers on every device."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager", **sizes,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    return model.to(device, dtype).eval()


def token_ids(rows=2, length=6):
    """Token ids on the CPU; the same in every call."""
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))


def on(model, kind, rank=2, **options):
    """An adapter on the model's device; its numbers do not depend on the device."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ranks larger than the modes can fill")
        adapter = lortalib.nn.apply(model, kind, rank, **{**KINDS[kind], **options})
    randomise(adapter.parameters())
    return adapter


def randomise(parameters, seed=2):
    """Give parameters random numbers, the same on every device."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 2)


def step_inputs(device, model):
    """What a step of training needs, on a device before the step begins.

    A mask for every head, because transformers looks into numbers where it has none.
    """
    words = token_ids().to(device)
    rows, length = words.shape
    mask = torch.full((length, length), -1e4, device=device, dtype=model.dtype).triu(1)
    return {
        "inputs_embeds": model.get_input_embeddings()(words).detach(),
        "position_ids": torch.arange(length, device=device).expand(rows, -1),
        "attention_mask": mask.expand(rows, 1, length, length),
        "use_cache": False,
    }


def step(model, given):
    """A forward and a backward; returns the output."""
    output = model(**given).logits
    output.float().square().mean().backward()
    return output.detach()


def output(model, given):
    """The output, without gradients."""
    with torch.no_grad():
        return model(**given).logits


def adapter_of(model):
    """The one adapter of a model."""
    (adapter,) = lortalib.nn.adapters(model).values()
    return adapter


def same_bits(one, other):
    """Whether two tensors have the same bits."""
    one, other = (t.detach().cpu().contiguous().view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


def close(one, other, tolerance=1e-5):
    """Whether two tensors agree, relative to the largest entry."""
    one, other = one.detach().cpu().float(), other.detach().cpu().float()
    return (one - other).abs().max() <= tolerance * max(1.0, other.abs().max())
