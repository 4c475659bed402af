"""Sixty model types of every layout through the checks of ``benchmarks/survey/survey.py``."""

import pytest
import survey
import transformers
from packaging.version import Version

#: What a type needs; the popular ones, and one or more of every kind of layout.
TYPES = {
    "apart": "llama mistral gemma2 olmo2 qwen2 opt gptj gpt_neo phi cohere2 starcoder2 stablelm",
    "grouped queries": "qwen3 gemma3_text smollm3 granite",
    "gated queries": "qwen3_next qwen3_5_text",
    "fused": "gpt2 phi3 gpt_neox bloom falcon gpt_bigcode codegen mpt modernbert deberta openai-gpt",
    "latent": "deepseek_v2 deepseek_v3 minicpm3",
    "experts": "mixtral qwen2_moe gpt_oss",
    "hybrid": "jamba lfm2",
    "encoder": "bert roberta distilbert albert electra deberta-v2 esm mpnet roformer",
    "encoder and decoder": "t5 bart pegasus marian whisper",
    "vision": "vit dinov2 swin segformer vit_mae",
    "audio": "wav2vec2 wavlm",
    "towers": "clip siglip",
}
#: The first transformers that has a type, or whose attention of that type can be read, if older ones are
#: supported.
SINCE = {"deepseek_v2": "5.15", "minicpm3": "5.13"}
#: Refused, with the reason.
REFUSED = ("convbert", "xlnet")
#: No softmax attention.
WITHOUT = ("mamba", "resnet")

SAMPLE = [model_type for names in TYPES.values() for model_type in names.split()]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_covered(model_type):
    if Version(transformers.__version__) < Version(SINCE.get(model_type, "5")):
        pytest.skip(f"needs transformers {SINCE[model_type]}")
    row = survey.examine(model_type)
    assert row.plan == "planned", row.why
    wanted = list(survey.CHECKS)
    assert {name: row.checks.get(name) for name in wanted} == dict.fromkeys(wanted, "yes")


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_with_the_block_and_the_reason(model_type):
    row = survey.examine(model_type)
    assert row.plan == "refused"
    assert "nothing was changed" in row.why


@pytest.mark.parametrize("model_type", WITHOUT)
def test_without_attention(model_type):
    assert survey.examine(model_type).plan == "no attention"


def test_the_sample_has_sixty_types():
    assert len({*SAMPLE, *REFUSED, *WITHOUT}) >= 60
