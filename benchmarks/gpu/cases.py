"""What is timed: models of random weights, contenders on them, and their work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
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
FLOOR, LORA = "frozen base", "PEFT LoRA r8"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
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
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def _lortalib(decomposition: str, rank: int, **options: Any) -> Attach:
    def attach(model: nn.Module) -> nn.Module:
        lortalib.nn.apply(model, decomposition, rank, init="normal", alpha=1e-3, **options)
        return model

    return attach


def _peft(config: Callable[[], peft.PeftConfig]) -> Attach:
    def attach(model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The module without PeftModel around it, whose own forward is no part of the method.
            return peft.get_peft_model(model, config()).get_base_model()

    return attach


def _input_gradients(model: nn.Module) -> nn.Module:
    """The floor of training: gradients pass the whole model, and nothing else is done."""
    model.enable_input_require_grads()  # type: ignore[operator]
    return model


CONTENDERS: dict[str, Attach] = {
    FLOOR: _input_gradients,
    "lortalib CP r8": _lortalib("cp", 8),
    "lortalib CP r64": _lortalib("cp", 64),
    "lortalib INDSCAL r16, stream": _lortalib("indscal", 16, acts_on="stream"),
    LORA: _peft(lambda: peft.LoraConfig(r=8, target_modules=PROJECTIONS)),
    "PEFT VeRA r64": _peft(lambda: peft.VeraConfig(r=64, target_modules=PROJECTIONS)),
}


def twin(model: nn.Module) -> nn.Module:
    """A copy that has the very same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def training(model: nn.Module, ids: Tensor) -> Work:
    """A step: forward, backward and Adam; for the floor without Adam."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    capturable = bool(trained) and trained[0].is_cuda
    optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=capturable) if trained else None

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def prefill(model: nn.Module, ids: Tensor) -> Work:
    """A forward of whole prompts, without gradients."""
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return run


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
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 8)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token, at = ids[:, :1].clone(), torch.tensor([[ids.shape[1]]], device=ids.device)

    def run() -> Tensor:
        with torch.no_grad():  # the token is written at one place again and again
            return model(
                input_ids=token, position_ids=at, past_key_values=cache, use_cache=True
            ).logits

    return run


def bank_rows(base: nn.Module, ids: Tensor, adapters: int) -> dict[str, Work]:
    """A forward in which every row uses an adapter of its own: a bank beside PEFT's mixed batch."""
    served = twin(base)
    bank = lortalib.nn.bank(served, "cp", 8, capacity=adapters)
    shapes = {group: [t.shape for t in tensors] for group, tensors in bank[None].items()}
    names = [f"user-{k}" for k in range(adapters)]
    device = ids.device
    bank.fill(
        names,
        {
            group: [torch.randn(adapters, *shape, device=device) / 100 for shape in each]
            for group, each in shapes.items()
        },
    )
    rows = [names[k % adapters] for k in range(len(ids))]
    mixed = peft.get_peft_model(
        twin(base), peft.LoraConfig(r=8, target_modules=PROJECTIONS), adapter_name=names[0]
    )
    for name in names[1:]:
        mixed.add_adapter(name, peft.LoraConfig(r=8, target_modules=PROJECTIONS))
    mixed.eval()

    def by_bank() -> Tensor:
        with torch.no_grad(), bank.using(rows):
            return served(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    def by_peft() -> Tensor:
        with torch.no_grad():
            return mixed(
                input_ids=ids, adapter_names=rows, use_cache=False, logits_to_keep=1
            ).logits

    return {
        FLOOR: prefill(base, ids),
        f"lortalib bank of {adapters}": by_bank,
        f"PEFT mixed batch of {adapters}": by_peft,
    }
