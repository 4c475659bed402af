"""Tiny random models of many families, with what a reader of their configs expects of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

TEXT = {"vocab_size": 64, "max_position_embeddings": 64}
BERT = {
    **TEXT, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4,
    "intermediate_size": 24,
}  # fmt: skip
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0}
IMAGE = {"image_size": 8, "patch_size": 4}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 6, "num_heads": 4, "d_ff": 24, "num_layers": 2}
BART = {
    **TEXT, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
CLIP = {
    "text_config": {**BERT, "hidden_size": 24, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": {**BERT, **IMAGE},
    "projection_dim": 8,
}


@dataclass(frozen=True)
class Stack:
    """Expected of one stack: its layers, and the sizes of each projection in it."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int


def words(length=7, batch=2):
    """Token ids without special ones."""
    ids = torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def both_sides():
    return {**words(7), "decoder_input_ids": words(5)["input_ids"]}


def image():
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels}


def image_and_words():
    return {**words(), **image()}


@dataclass(frozen=True)
class Family:
    """A model family: how to make a tiny one, feed it, and what its sites should be.

    ``sizes`` are the arguments of the config; ``head`` is a class of the same family with something
    on top, whose sites must be those of the bare model.
    """

    name: str
    sizes: dict[str, Any]
    stacks: dict[str, Stack]
    head: str = ""
    inputs: Callable[[], dict[str, torch.Tensor]] = words

    def model(self, kind: str = "Model", seed: int = 0, **changes: Any) -> nn.Module:
        """A random float32 model in eval mode; the same bits for the same seed."""
        config = getattr(transformers, f"{self.name}Config")(**{**self.sizes, **changes})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, f"{self.name}{kind}")(config)
        return model.eval()


class Attention(nn.Module):
    """Attention as the rules expect it, with projections of any class and names.

    Its weights are stored as ``linear`` stores them; ``widths`` overrides the (in, out) of one.
    """

    def __init__(
        self,
        names=("q_proj", "k_proj", "v_proj", "o_proj"),
        heads=4,
        *,
        linear=nn.Linear,
        shape=(4, 4, 4, 16),
        **widths,
    ):
        super().__init__()
        n_q, n_kv, self.size, width = shape
        self.num_heads = heads
        read = [(width, n * self.size) for n in (n_q, n_kv, n_kv)]
        for name, pair in zip(names, [*read, (n_q * self.size, width)]):
            setattr(self, name, linear(*widths.get(name, pair)))

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (-1, self.size)).transpose(-2, -3)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) for t in (k, v))
        mixed = (q @ k.mT / self.size**0.5).softmax(-1) @ v
        return self.o_proj(mixed.transpose(-2, -3).flatten(-2))


class Stored(nn.Module):
    """Two layers of attention whose weights are stored (in, out), as GPT-2 stores its own."""

    def __init__(self):
        super().__init__()
        linear = lambda n_in, n_out: Conv1D(n_out, n_in)  # noqa: E731
        layers = [Attention(linear=linear, shape=(4, 2, 3, 10)) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return (x,)


class HandMade(Family):
    """A model that is not of transformers."""

    def model(self, kind="Model", seed=0, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Stored(**changes).eval()


def vectors():
    return {"x": torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1))}


def _same(layers=2, heads=4, kv_heads=None, head_dim=4, width=16):
    return Stack(layers, heads, kv_heads or heads, head_dim, width)


_ALL = (
    Family("Bert", BERT, {"encoder": _same()}, "ForSequenceClassification"),
    Family("Roberta", BERT, {"encoder": _same()}, "ForMaskedLM"),
    Family(
        "DistilBert",
        {**TEXT, "dim": 16, "n_heads": 4, "n_layers": 2, "hidden_dim": 24},
        {"layers": _same()},
        "ForSequenceClassification",
    ),
    Family(
        "Electra", {**BERT, "embedding_size": 8}, {"encoder": _same()}, "ForTokenClassification"
    ),
    Family(
        "Albert",
        {**BERT, "embedding_size": 8},
        {"encoder.albert_layer_groups.albert_layers": _same(1)},
        "ForMaskedLM",
    ),
    Family("Esm", {**BERT, "pad_token_id": 1}, {"encoder": _same()}, "ForMaskedLM"),
    Family("Llama", LLAMA, {"layers": _same(kv_heads=2)}, "ForCausalLM"),
    Family(
        "Mistral",
        {**LLAMA, "head_dim": 6},
        {"layers": _same(kv_heads=2, head_dim=6)},
        "ForCausalLM",
    ),
    Family("Qwen2", LLAMA, {"layers": _same(kv_heads=2)}, "ForCausalLM"),
    Family(
        "Qwen3",
        {**LLAMA, "head_dim": 8},
        {"layers": _same(kv_heads=2, head_dim=8)},
        "ForSequenceClassification",
    ),
    Family(
        "Gemma",
        {**LLAMA, "num_key_value_heads": 1, "head_dim": 6},
        {"layers": _same(kv_heads=1, head_dim=6)},
        "ForCausalLM",
    ),
    Family(
        "Gemma2",
        {**LLAMA, "head_dim": 8},
        {"layers": _same(kv_heads=2, head_dim=8)},
        "ForCausalLM",
    ),
    Family(
        "OPT",
        {**BERT, "ffn_dim": 24, "word_embed_proj_dim": 16},
        {"decoder": _same()},
        "ForCausalLM",
    ),
    Family("ViT", {**BERT, **IMAGE}, {"layers": _same()}, "ForImageClassification", image),
    Family(
        "T5",
        T5,
        {n: _same(head_dim=6) for n in ("encoder", "decoder", "decoder.EncDecAttention")},
        "ForConditionalGeneration",
        both_sides,
    ),
    Family(
        "Bart",
        BART,
        {
            "encoder": _same(),
            "decoder": _same(3, 2, head_dim=8),
            "decoder.encoder_attn": _same(3, 2, head_dim=8),
        },
        "ForConditionalGeneration",
        both_sides,
    ),
    Family(
        "CLIP",
        CLIP,
        {"text_model.encoder": _same(head_dim=6, width=24), "vision_model.encoder": _same()},
        inputs=image_and_words,
    ),
    HandMade("Conv1D", {}, {"layers": _same(kv_heads=2, head_dim=3, width=10)}, inputs=vectors),
)
FAMILIES = {family.name: family for family in _ALL}

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)

#: Layouts of weights that the table above leaves out.
GPT2 = Family("GPT2", {**TEXT, "n_embd": 16, "n_head": 4, "n_layer": 2}, {})
PHI3 = Family("Phi3", {**LLAMA, "bos_token_id": 1, "eos_token_id": 2}, {})
MIXTRAL = Family("Mixtral", {**LLAMA, "num_local_experts": 3, "head_dim": 6}, {})

#: The few families that every law is tested on: head widths that are no width / heads, fused weights, weights
#: stored (in, out), two stacks and the attention between them, and packed experts.
LAW_FAMILIES = {
    "decoder": FAMILIES["Mistral"],
    "encoder": FAMILIES["Bert"],
    "encoder-decoder": FAMILIES["T5"],
    "fused": PHI3,
    "fused, stored (in, out)": GPT2,
    "experts": MIXTRAL,
}
