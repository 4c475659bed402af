"""The models and the contenders that the benchmarks of speed and size compare.

Every contender adapts the same sites: q, k, v, o of every layer. All contenders of one model are
copies that have the base's weight tensors in common, so none of them gains or loses by memory.

* ``floor``: the frozen base's own forward, and the backward that any adapter on these sites needs.
  The outputs of q, k, v of layer 0 come first of all sites; they are marked as requiring gradients,
  so the backward runs down to them and no further.
* ``cp``, ``tucker``, ``tt``: lortalib.
* ``lora``, ``vera``: HF PEFT. Its k and v may be narrower than q: VeRA keeps one frozen pair of the
  largest widths and takes slices of it.
* ``products``: the products of CP's update alone, from pairs that are parameters themselves: what is
  left if the pairs cost nothing and the library asks nothing. For Llama only; see `products`.
* ``dense``: LoRTA the published way: in every forward every projection forms its dense update.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from products import add_products
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

import lortalib

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

LORTALIB = ("cp", "tucker", "tt")
LABELS = {
    "base": "base",
    "floor": "floor",
    "cp": "lortalib CP",
    "tucker": "lortalib Tucker",
    "tt": "lortalib TT",
    "lora": "PEFT LoRA",
    "vera": "PEFT VeRA",
    "products": "products of CP alone",
    "dense": "dense LoRTA",
}


class Contender(NamedTuple):
    """What is put on a model."""

    kind: str
    rank: int = 0

    @property
    def key(self) -> str:
        """Short name, the key in dictionaries and files."""
        return f"{self.kind}-{self.rank}" if self.rank else self.kind

    @property
    def label(self) -> str:
        """Name in tables."""
        return f"{LABELS[self.kind]}, rank {self.rank}" if self.rank else LABELS[self.kind]


@dataclass
class Subject:
    """A model with one contender on it.

    Attributes:
        contender: what was put on it.
        model: the transformers model that carries it.
        parameters: what trains.
        sites: how many projections are adapted.
    """

    contender: Contender
    model: nn.Module
    parameters: list[nn.Parameter]
    sites: int

    def perturb(self, seed: int = 0) -> None:
        """Move all that trains off its start, so that no factor is zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.02 * noise.to(parameter.device, parameter.dtype))

    def bump(self) -> None:
        """Change what trains a little, as an optimiser does, so that no cache outlives a step."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(1e-7)

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


# Models


def real_minilm() -> nn.Module:
    """all-MiniLM-L6-v2 with its real weights; without dropout, whose random numbers would only add
    the same noise to all contenders."""
    from assets import minilm
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        minilm(), dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.pooler = None  # no part of the loss
    return model


def real_smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct with its real weights."""
    from assets import smollm2
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def llama(
    hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int = 1000
) -> nn.Module:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
        )
    )


def wide_llama() -> nn.Module:
    """Two layers of a Llama of width 2048."""
    return llama(2048, 2, 5632, 32, 8)


def small_llama(layers: int = 6) -> nn.Module:
    """Some layers of the shape of SmolLM2-135M, with a small vocabulary."""
    return llama(576, layers, 1536, 9, 3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MiniLM": real_minilm,
    "SmolLM2-135M": real_smollm2,
    "Llama, width 2048, 2 layers": wide_llama,
    "Llama, width 576, 6 layers": small_llama,
    "Llama, width 576, 2 layers": lambda: small_llama(2),
}


def load(name: str) -> nn.Module:
    """A base model by name, frozen, in training mode."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = MODELS[name]()
    return model.requires_grad_(False).train()


# Contenders


def put(base: nn.Module, contender: Contender) -> Subject:
    """A contender on a copy of the base that has the base's weight tensors."""
    model = twin(base)
    projections = lortalib.nn.sites(model)
    kind, rank = contender
    if kind in LORTALIB:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # ranks of short modes are cut
            sites = len(lortalib.nn.apply(model, kind, rank).sites)
    elif kind in ("lora", "vera"):
        # Without the PeftModel around it, whose own forward is no matter of the adapter's.
        model = peft_model(model, contender).get_base_model()
        sites = sum(type(module).__module__.startswith("peft") for module in adapted(model))
    elif kind == "dense":
        sites = DenseLorta.attach(model, rank)
    elif kind == "products":
        sites = add_products(model, rank)
    elif kind == "floor":
        mark_first(model)
        sites = len(projections)
    else:
        sites = len(projections)
    if sites != len(projections):
        raise RuntimeError(f"{contender.label} adapts {sites} sites instead of {len(projections)}")
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    subject = Subject(contender, model, trains, sites)
    subject.perturb()
    return subject


def twin(base: nn.Module) -> nn.Module:
    """A copy of all modules that has the very tensors of the base."""
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def adapted(model: nn.Module) -> list[nn.Module]:
    """PEFT's layers: modules with a base layer inside."""
    return [module for module in model.modules() if hasattr(module, "base_layer")]


def peft_model(model: nn.Module, contender: Contender, name: str = "default") -> Any:
    """PEFT on the projections that lortalib adapts."""
    import peft

    paths = [site.path for site in lortalib.nn.sites(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers to PEFT
        return peft.get_peft_model(model, peft_config(contender, paths), adapter_name=name)


def peft_config(contender: Contender, paths: list[str]) -> Any:
    """Settings of PEFT without dropout, scaling 1."""
    import peft

    rank = contender.rank
    if contender.kind == "vera":
        return peft.VeraConfig(r=rank, target_modules=paths, vera_dropout=0.0)
    return peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=paths)


def first_sites(model: nn.Module) -> list[nn.Module]:
    """The projections q, k, v of layer 0, which come first of all sites."""
    sites = lortalib.nn.sites(model)
    return [model.get_submodule(s.path) for s in sites if s.layer == 0 and s.role != "o"]


def mark_first(model: nn.Module) -> None:
    """Let the outputs of the first sites require gradients."""
    for module in first_sites(model):
        module.register_forward_hook(lambda *call: call[-1].requires_grad_())


class DenseLorta(nn.Module):
    """LoRTA as published: dW of a projection is formed in its every forward, then used densely.

    Each head's block is ``B diag(C_layer * C_head * C_matrix) A``; the blocks of a projection are made
    in one batched product, which is kinder than the published loop. Where k and v have fewer heads,
    each takes the mean of its group, as lortalib does, so the function is that of ``cp``.
    """

    def __init__(self, layers: int, heads: int, width: int, head_dim: int, rank: int) -> None:
        super().__init__()
        sizes = {"a": width, "b": head_dim, "head": heads, "layer": layers, "matrix": 4}
        for name, size in sizes.items():
            # Of the size that keeps the update small; the start plays no part in the time.
            self.register_parameter(name, nn.Parameter(torch.randn(size, rank) * 0.2))

    @classmethod
    def attach(cls, model: nn.Module, rank: int) -> int:
        """Put it on all projections by forward hooks; the number of them."""
        sites = lortalib.nn.sites(model)
        first = sites[0]
        layers = 1 + max(site.layer for site in sites)
        model.dense_lorta = cls(layers, first.query_heads, first.width, first.head_dim, rank)
        for site in sites:
            model.get_submodule(site.path).register_forward_hook(model.dense_lorta.share(site))
        return len(sites)

    def update(self, site: lortalib.nn.Site) -> Tensor:
        """The dense update of a projection, as its weight is stored: (out, in)."""
        matrix = self.matrix["qkvo".index(site.role)]
        scales = self.layer[site.layer] * matrix * self.head  # (heads, rank)
        blocks = (scales[:, None] * self.b) @ self.a.mT  # (heads, head_dim, width)
        if site.heads != site.query_heads:
            blocks = blocks.unflatten(0, (site.heads, -1)).mean(1)
        dense = blocks.flatten(0, 1)
        return dense.mT if site.role == "o" else dense

    def share(self, site: lortalib.nn.Site) -> Callable[..., Tensor]:
        """The forward hook of one projection."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + linear(args[0], self.update(site).to(args[0].dtype))

        return hook


# A step


@dataclass
class Batch:
    """Random tokens, and the tokens that the loss asks for."""

    inputs: dict[str, Tensor]
    targets: Tensor

    @classmethod
    def of(cls, model: nn.Module, rows: int, length: int) -> Batch:
        """A batch for a model, the same in every run."""
        generator = torch.Generator().manual_seed(rows * length)
        tokens = torch.randint(5, model.config.vocab_size, (2, rows, length), generator=generator)
        return cls({"input_ids": tokens[0]}, tokens[1].flatten())


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a causal language model; mean square of the last states of an encoder."""
    if hasattr(model, "lm_head"):
        logits = model(**batch.inputs, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1).float(), batch.targets)
    return model(**batch.inputs).last_hidden_state.float().square().mean()


def training_step(subject: Subject, batch: Batch, autocast: bool = False) -> None:
    """Gradients dropped, forward, backward; no optimiser, which would be the same work for all."""
    subject.clear()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = loss_of(subject.model, batch)
    loss.backward()


def check(subject: Subject, batch: Batch) -> None:
    """Every trainable parameter gets a finite gradient that is not zero, else raise."""
    training_step(subject, batch)
    for number, parameter in enumerate(subject.parameters):
        gradient = parameter.grad
        if gradient is None or not torch.isfinite(gradient).all() or not gradient.any():
            shape = tuple(parameter.shape)
            raise RuntimeError(f"{subject.contender.label}: no gradient for {number}, {shape}")
    subject.clear()
