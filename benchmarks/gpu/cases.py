"""What is timed: models of random weights, contenders on them, and their work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from clock import Work
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import lortalib

#: Width, layers, width of the MLP, heads, key/value heads, vocabulary.
SHAPES = {
    "tiny": (64, 2, 128, 4, 2, 256),
    "1B": (2048, 16, 8192, 32, 8, 32_000),
    "7B": (4096, 32, 11_008, 32, 32, 32_000),
}
FLOOR, LORA, MERGED = "frozen base", "PEFT LoRA r8", "lortalib CP r8, merged"
CP8, CP64 = "lortalib CP r8", "lortalib CP r64"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
#: Tokens that a cache has room for behind the prompt; more than runs follow each other without a rewind.
ROOM = 16
Attach = Callable[[nn.Module], nn.Module]


def llama(shape: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen Llama of random weights, drawn on the device."""
    width, layers, inner, heads, kv_heads, words = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=words,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """A copy that has the very same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def _lortalib(decomposition: str, rank: int, **options: Any) -> Attach:
    def attach(base: nn.Module) -> nn.Module:
        model = twin(base)
        lortalib.nn.apply(model, decomposition, rank, init="normal", alpha=1e-3, **options)
        return model

    return attach


def _merged(base: nn.Module) -> nn.Module:
    model = copy.deepcopy(base)  # merging writes into the weights
    lortalib.nn.apply(model, "cp", 8, init="normal", alpha=1e-3).merge()
    return model


def _peft(config: Callable[[], peft.PeftConfig]) -> Attach:
    def attach(base: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The module without PeftModel around it, whose own forward is no part of the method.
            return peft.get_peft_model(twin(base), config()).get_base_model()

    return attach


def _frozen(base: nn.Module) -> nn.Module:
    """The floor of training: gradients pass the whole model, and nothing else is done."""
    model = twin(base)
    model.enable_input_require_grads()  # type: ignore[operator]
    return model


CONTENDERS: dict[str, Attach] = {
    FLOOR: _frozen,
    CP8: _lortalib("cp", 8),
    CP64: _lortalib("cp", 64),
    "lortalib LoTR r8": _lortalib("lotr", 8),
    "lortalib INDSCAL r16, stream": _lortalib("indscal", 16, acts_on="stream"),
    MERGED: _merged,
    LORA: _peft(lambda: peft.LoraConfig(r=8, target_modules=PROJECTIONS)),
    "PEFT VeRA r64": _peft(lambda: peft.VeraConfig(r=64, target_modules=PROJECTIONS)),
}


def training(model: nn.Module, ids: Tensor) -> Work:
    """A step: forward, backward and Adam; for the floor without Adam."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    capturable = ids.device.type != "cpu"
    optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=capturable) if trained else None

    def step() -> Any:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Work(step)


def prefill(model: nn.Module, ids: Tensor) -> Work:
    """A forward of whole prompts, without gradients."""
    model.eval()

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return Work(run)


def decoding(model: nn.Module, ids: Tensor, keep_pairs: bool = True) -> Work:
    """The forward of one token of every row behind a prompt, with a cache of fixed size.

    Args:
        model: the model.
        ids: the prompts.
        keep_pairs: whether lortalib's low-rank pairs are kept from one token to the next.
    """
    model.eval()
    for adapter in lortalib.nn.adapters(model).values() if keep_pairs else ():
        adapter.keep_pairs().__enter__()  # for as long as the process lives
    rows, length = ids.shape
    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=length + ROOM)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, :1].clone()
    at = torch.full((rows, 1), length, device=ids.device)

    def run() -> Any:
        with torch.no_grad():
            return model(
                input_ids=token, position_ids=at, past_key_values=cache, use_cache=True
            ).logits

    def rewind() -> None:
        """Let the next token be written behind the prompt again; a full cache would refuse it."""
        layers: Any = cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(length)

    return Work(run, rewind)


WORKS: dict[str, Callable[[nn.Module, Tensor], Work]] = {
    "training step": training,
    "prefill": prefill,
    "decoding": decoding,
    "decoding, pairs made anew": partial(decoding, keep_pairs=False),
}


def bank_rows(base: nn.Module, prompt: Tensor, adapters: int) -> dict[str, Callable[[], Work]]:
    """A forward in which every row uses an adapter of its own: a bank beside PEFT's mixed batch.

    Args:
        base: the model.
        prompt: (1, tokens), the prompt of every row.
        adapters: how many adapters, and rows.
    """
    ids = prompt.repeat(adapters, 1)
    names = [f"user-{k}" for k in range(adapters)]

    def by_bank() -> Work:
        model = twin(base).eval()
        bank = lortalib.nn.bank(model, "cp", 8, capacity=adapters, device=ids.device)
        stacks = {
            group: [torch.randn(adapters, *t.shape, device=ids.device) / 100 for t in tensors]
            for group, tensors in bank[None].items()
        }
        bank.fill(names, stacks)

        def run() -> Any:
            with torch.no_grad(), bank.using(names):
                return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

        return Work(run)

    def by_peft() -> Work:
        lora = peft.LoraConfig(r=8, target_modules=PROJECTIONS, init_lora_weights=False)
        model = peft.get_peft_model(twin(base), lora, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, lora)
        model.eval()

        def run() -> Any:
            with torch.no_grad():
                return model(
                    input_ids=ids, adapter_names=names, use_cache=False, logits_to_keep=1
                ).logits

        return Work(run)

    return {
        FLOOR: lambda: prefill(_frozen(base), ids),
        f"lortalib bank of {adapters}": by_bank,
        f"PEFT mixed batch of {adapters}": by_peft,
    }
