"""Parameter counts of published configurations, from configs alone: no weight is allocated.

Counts are of the adapters only. Papers are named with each row; where a paper's table includes
something beside the adapter, the row says so.
"""

from functools import cache

import pytest
import torch
import transformers
from adapted import put
from transformers import AutoModel

from lortalib.nn import sites

MODELS = {
    "roberta-base": ("Roberta", {"vocab_size": 50265}),
    "roberta-large": (
        "Roberta",
        {
            "vocab_size": 50265, "hidden_size": 1024, "num_hidden_layers": 24,
            "num_attention_heads": 16, "intermediate_size": 4096,
        },
    ),
    "deberta-v2-xxlarge": (
        "DebertaV2",
        {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24},
    ),
    "llama-2-7b": ("Llama", {}),
    "llama-2-13b": (
        "Llama",
        {
            "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
            "intermediate_size": 13824,
        },
    ),
    "llama-3-8b": (
        "Llama",
        {"vocab_size": 128256, "num_key_value_heads": 8, "intermediate_size": 14336},
    ),
    "llama-3.2-3b": (
        "Llama",
        {
            "vocab_size": 128256, "hidden_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 24, "num_key_value_heads": 8, "intermediate_size": 8192,
        },
    ),
}  # fmt: skip


@cache
def on_meta(name):
    family, sizes = MODELS[name]
    with torch.device("meta"):
        return AutoModel.from_config(getattr(transformers, f"{family}Config")(**sizes))


def rows(model, decomposition, targets, counts, gqa="pool"):
    return [(model, decomposition, targets, rank, n, gqa) for rank, n in counts.items()]


COUNTS = [
    # LoRTA, arXiv 2410.04060, and sizes that follow from its formula r(d + d_h + H + L + M)
    *rows("roberta-base", "cp", "qkvo", {4: 3_440}),
    *rows("roberta-large", "cp", "qkvo", {8: 9_056}),
    *rows(
        "llama-2-7b",
        "cp",
        "qkvo",
        {1: 4_292, 12: 51_504, 32: 137_344, 192: 824_064, 768: 3_296_256},
    ),
    *rows("llama-2-13b", "cp", "qkvo", {6: 31_992, 768: 4_094_976}),
    # LoRA, arXiv 2106.09685, and the baselines of LoTR, HF PEFT, TensLoRA and LLaDA
    *rows("roberta-base", "lora", "qv", {1: 36_864, 2: 73_728, 8: 294_912, 32: 1_179_648}),
    *rows("roberta-base", "lora", "qkv", {8: 442_368}),
    *rows("roberta-large", "lora", "qv", {8: 786_432}),
    *rows("deberta-v2-xxlarge", "lora", "qv", {16: 4_718_592}),
    *rows("llama-2-7b", "lora", "qkvo", {1: 1_048_576, 32: 33_554_432}),
    *rows("llama-2-7b", "lora", "qv", {8: 4_194_304}),
    *rows("llama-3.2-3b", "lora", "qv", {32: 9_175_040, 64: 18_350_080}, "split"),
    # LoTR, arXiv 2402.01376; its table adds 1,536 for the classifier's output layer
    *rows(
        "roberta-base",
        "lotr",
        "qv",
        {
            1: 3_096 - 1_536, 2: 4_704 - 1_536, 4: 8_064 - 1_536, 8: 15_360 - 1_536,
            16: 32_256 - 1_536, 32: 75_264 - 1_536,
        },
    ),
    *rows("roberta-large", "lotr", "qv", {64: 327_680}),
    # MetaTT, arXiv 2506.09105
    *rows("roberta-base", "metatt_4d", "qv", {8: 13_184, 24: 44_928}),
    *rows("roberta-large", "metatt_4d", "qv", {16: 39_424, 32: 92_160}),
    *rows("roberta-base", "tt", "qv", {16: 19_968, 64: 159_744}),
    *rows("roberta-large", "tt", "qv", {16: 28_160, 64: 241_664}),
    # LoRA-XS, arXiv 2405.17604: 96 modules of roberta-large, r^2 each
    *rows("roberta-large", "lora_xs", "qkvo", {4: 1_536, 8: 6_144, 16: 24_576, 25: 60_000}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "decomposition", "targets", "rank", "count", "gqa"), COUNTS)
def test_published_counts(model, decomposition, targets, rank, count, gqa):
    adapter = put(on_meta(model), decomposition, rank, targets=targets, gqa=gqa)
    try:
        assert adapter.count() == count
        assert all(parameter.is_meta for parameter in adapter.parameters())
        trainable = [p for p in on_meta(model).parameters() if p.requires_grad]
        assert sum(p.numel() for p in trainable) == count
        assert f"{count:,} trainable parameters" in repr(adapter)
    finally:
        adapter.remove()


@pytest.mark.parametrize(
    ("model", "rank", "count", "gqa"),
    [
        ("roberta-base", 1024, 43_008, "pool"),
        ("roberta-large", 256, 61_440, "pool"),
        ("llama-3.2-3b", 256, 129_024, "pool"),
        ("llama-3.2-3b", 256, 129_024, "split"),
    ],
)
def test_vera_is_complete_with_its_output_vectors(model, rank, count, gqa):
    """VeRA (arXiv 2310.11454) trains one number more for each output of a projection."""
    adapter = put(on_meta(model), "vera", rank, targets="qv", gqa=gqa)
    outputs = sum(site.heads * site.head_dim for site in adapter.sites)
    adapter.remove()
    assert adapter.count() + outputs == count


def test_pooled_heads_cost_no_more_than_full_ones():
    """r(d + d_h + H + L + M), whatever the number of key/value heads; split adds a tensor."""
    pooled = put(on_meta("llama-3-8b"), "cp", 8)
    pooled.remove()
    assert pooled.count() == 8 * 4292
    split = put(on_meta("llama-3-8b"), "cp", 8, gqa="split")
    split.remove()
    assert split.count() == 8 * (4096 + 128 + 32 + 32 + 2) + 8 * (4096 + 128 + 8 + 32 + 2)


@pytest.mark.parametrize(
    ("model", "layers", "heads", "kv_heads", "head_dim", "width"),
    [
        ("roberta-large", 24, 16, 16, 64, 1024),
        ("llama-2-13b", 40, 40, 40, 128, 5120),
        ("llama-3.2-3b", 28, 24, 8, 128, 3072),
        ("deberta-v2-xxlarge", 48, 24, 24, 64, 1536),
    ],
)
def test_sites_of_full_size(model, layers, heads, kv_heads, head_dim, width):
    found = sites(on_meta(model))
    assert len(found) == 4 * layers
    sizes = {(s.role, s.heads, s.head_dim, s.width) for s in found}
    kv = {(role, kv_heads, head_dim, width) for role in "kv"}
    assert sizes == kv | {(role, heads, head_dim, width) for role in "qo"}
