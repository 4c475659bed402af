"""What the probe is tested on: tiny models with every way of laying out attention, and wrong plans."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import transformers
from models import BART, BERT, CLIP, IMAGE, LLAMA, T5, both_sides, image, image_and_words, words

from lortalib.nn import FeatureRows, sites, verify

GPT2 = {"vocab_size": 64, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
CODEGEN = {**GPT2, "n_embd": 32, "n_head": 8, "rotary_dim": 4}
BLOOM = {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4}
FALCON = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
WHISPER = {
    **BART, "decoder_layers": 2, "num_mel_bins": 8, "max_source_positions": 10,
    "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WAVLM = {
    **BERT, "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [5, 4],
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SWIN = {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {
    **BERT, **EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 6, "kv_lora_rank": 6,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 4,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
QWEN_NEXT = {
    **LLAMA, **EXPERTS, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4,
    "linear_value_head_dim": 4, "num_experts": 4, "shared_expert_intermediate_size": 8,
}  # fmt: skip


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def large_image():
    return {"pixel_values": random(2, 3, 32, 32)}


def sound():
    return {"input_values": random(2, 400)}


def spectrogram():
    return {"input_features": random(2, 8, 20), "decoder_input_ids": words(5)["input_ids"]}


@dataclass(frozen=True)
class Case:
    """A family, its sizes, its inputs, and how many heads should be seen and be coupled."""

    family: str
    sizes: dict[str, Any]
    heads: int
    inputs: Any = words
    coupled: int = 0

    def model(self):
        config = getattr(transformers, f"{self.family}Config")(**self.sizes)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(transformers, f"{self.family}Model")(config)


CASES = {
    "bert": Case("Bert", BERT, 32),
    "albert": Case("Albert", {**BERT, "embedding_size": 8}, 16),
    "gpt2": Case("GPT2", GPT2, 32),
    "llama": Case("Llama", LLAMA, 24),
    "qwen3": Case("Qwen3", {**LLAMA, "head_dim": 8}, 24),
    "olmo2": Case("Olmo2", LLAMA, 24, coupled=12),
    "qwen3_next": Case("Qwen3Next", QWEN_NEXT, 12),
    "gpt_neox": Case("GPTNeoX", BERT, 32),
    "bloom": Case("Bloom", BLOOM, 32),
    "falcon multi query": Case("Falcon", {**FALCON, "multi_query": True}, 20),
    "falcon multi head": Case("Falcon", {**FALCON, "multi_query": False}, 32),
    "falcon new": Case("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, 24),
    "gpt_bigcode multi query": Case("GPTBigCode", {**GPT2, "multi_query": True}, 20),
    "gpt_bigcode multi head": Case("GPTBigCode", {**GPT2, "multi_query": False}, 32),
    "codegen": Case("CodeGen", CODEGEN, 64),
    "phi3": Case("Phi3", LLAMA, 24),
    "deepseek_v3": Case("DeepseekV3", DEEPSEEK, 32),
    "deepseek_v3 without q_a": Case("DeepseekV3", {**DEEPSEEK, "q_lora_rank": None}, 32),
    "deberta": Case("Deberta", DEBERTA, 32),
    "deberta_v2": Case("DebertaV2", {**DEBERTA, "share_att_key": True, "position_buckets": 8}, 32),
    "t5": Case("T5", T5, 96, both_sides),
    "whisper": Case("Whisper", WHISPER, 64, spectrogram),
    "wavlm": Case("WavLM", WAVLM, 32, sound),
    "vit": Case("ViT", {**BERT, **IMAGE}, 32, image),
    "swin": Case("Swin", SWIN, 48, large_image),
    "clip": Case("CLIP", CLIP, 64, image_and_words),
    "siglip": Case("Siglip", CLIP | {"text_config": {**BERT, "projection_size": 16}}, 80,
                   image_and_words),
}  # fmt: skip


@cache
def made(name):
    return CASES[name].model()


def check(name, change=list):
    """The report on a model whose plan was changed."""
    model = made(name)
    return verify(model, CASES[name].inputs(), sites=change(list(sites(model))))


# Ways to spoil a plan


class Shuffled(FeatureRows):
    """The same features, heads 0 and 1 exchanged."""

    heads = 4

    def index(self, device=None):
        order = [1, 0, *range(2, self.heads)]
        return super().index(device).reshape(self.heads, -1)[order].reshape(-1)


class ShuffledPairs(Shuffled):
    heads = 2


def exchanged(one, other):
    names = {one: other, other: one}
    return lambda plan: [replace(site, role=names.get(site.role, site.role)) for site in plan]


def shuffled(roles, rows=Shuffled):
    def change(plan):
        for site in plan:
            known = site.rows or FeatureRows(0, ((site.features, 1),))
            moved = replace(site, rows=rows(known.offset, known.dims), fused=site.fused or 16)
            yield moved if site.role in roles else site

    return lambda plan: list(change(plan))


def laid_out(layout):
    def change(site):
        rows = layout(site.heads, site.heads, site.head_dim, site.head_dim)
        return site if site.writer else replace(site, rows=rows[site.role])

    return lambda plan: [change(site) for site in plan]


def split(factor):
    def change(site):
        sizes = int(site.heads * factor), int(site.query_heads * factor)
        return replace(
            site, heads=sizes[0], query_heads=sizes[1], head_dim=int(site.head_dim / factor)
        )

    return lambda plan: [change(site) for site in plan]
