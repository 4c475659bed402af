"""PEFT's own test suite, run on this method: CP, Tucker, tensor train, and INDSCAL on the stream.

The tests of the installed PEFT are fetched from the package registry (its source distribution) and
left as they are: beside them goes a file that puts `LortaConfig` in the place of PEFT's own lists of
methods, and tiny random models in the place of those of the hub.

    python tests/peft/suite.py [-k EXPRESSION] [-n WORKERS]

Needs the extra ``suite`` (diffusers, parameterized, scikit-learn and what else those tests import).
Writes runs/peft-suite/result.txt with every skip and its reason; the exit code is pytest's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "peft-suite"

BRIDGE = '''
"""Puts this method where PEFT's tests have their own, in the very lists that they read."""

import os

import lortalib
from lortalib.peft import LortaConfig

from . import {module} as theirs
from .{module} import {classes}

MODELS = os.environ["TINY_MODELS"]
FORMATS = ("cp", "tucker", "tt", "indscal")


def local(name):
    return os.path.join(MODELS, name)


{body}
'''

#: What is left out, and why.
LEFT_OUT = {
    "layer_indexing": "counts trainable parameter objects and expects more of them for more layers; one "
    "tensor has the same for any number (upstream leaves VeRA, VB-LoRA and UniLora out for this)",
}

# Inputs of these tests go up to 90 and three steps of plain SGD have a learning rate of 0.5, which
# upstream lowers for each method that it knows; alpha does it here.
CUSTOM = """
theirs.TEST_CASES[:] = [
    (
        f"Vanilla MLP {k} LortaConfig {f}",
        "MLP",
        LortaConfig,
        {"target_modules": t, "decomposition": f, "rank": 2, "alpha": 0.1, **more},
    )
    for f in FORMATS
    for k, (t, more) in enumerate(
        [
            ("lin0", {}),
            (["lin0"], {}),
            (["lin1"], {}),
            (["lin0", "lin1"], {}),
            (["lin0"], {"modules_to_save": ["lin1"]}),
            (["lin0", "lin1"], {"dropout": 0.1}),
        ],
        1,
    )
] + [
    (
        "Embedding + transformers Conv1D 1 LortaConfig",
        "EmbConv1D",
        LortaConfig,
        {"target_modules": ["conv1d"], "rank": 2, "alpha": 4.0},
    )
]
theirs.ALL_PEFT_CONFIG_CLASSES[:] = [LortaConfig]
one = {"target_modules": ["lin0"], "init_weights": False, "rank": 2}
theirs.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
    (
        f"LortaConfig {f} {kind}",
        "lorta",
        LortaConfig,
        *({**kwargs, "decomposition": f} for kwargs in (one, other)),
    )
    for f in FORMATS
    for kind, other in (("Same", one), ("Different", {**one, "target_modules": ["lin1"]}))
]
"""

LISTS = """
theirs.{models}[:] = [local(name) for name in {names}]
theirs.ALL_CONFIGS[:] = [
    (LortaConfig, {{"task_type": "{task}", "target_modules": None, "rank": 2, "decomposition": f}})
    for f in FORMATS
]
"""

SMALL_GRID = """
theirs.SMALL_GRID_MODELS[:] = theirs.PEFT_DECODER_MODELS_TO_TEST[:3]
"""

DECODERS = [
    "tiny-random-OPTForCausalLM",
    "tiny-random-GPT2LMHeadModel",
    "tiny-random-GPTJForCausalLM",
    "tiny-random-LlamaForCausalLM",
    "tiny-dummy-qwen2",
    "tiny-random-Gemma3ForCausalLM",
]
BOTH = [
    "tiny-random-T5ForConditionalGeneration-calibrated",
    "tiny-random-BartForConditionalGeneration",
]
ENCODERS = [f"tiny-random-{name}Model" for name in ("Bert", "Roberta", "Deberta", "DebertaV2")]
CLASSIFIERS = [
    "tiny-random-BertForSequenceClassification",
    "tiny-random-RobertaForSequenceClassification",
    "tiny-LlamaForSequenceClassification-3.2",
]


def bridges() -> dict[str, str]:
    """The files that stand beside PEFT's, by name."""

    def lists(models: str, names: list[str], task: str) -> str:
        return LISTS.format(models=models, names=names, task=task)

    files = {
        "custom": ("test_custom_models", "TestMultipleActiveAdapters, TestPeftCustomModel", CUSTOM),
        "decoders": (
            "test_decoder_models",
            "TestDecoderModels",
            lists("PEFT_DECODER_MODELS_TO_TEST", DECODERS, "CAUSAL_LM") + SMALL_GRID,
        ),
        "both": (
            "test_encoder_decoder_models",
            "TestEncoderDecoderModels",
            lists("PEFT_ENCODER_DECODER_MODELS_TO_TEST", BOTH, "SEQ_2_SEQ_LM"),
        ),
        "encoders": (
            "test_feature_extraction_models",
            "TestPeftFeatureExtractionModel",
            lists("PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST", ENCODERS, "FEATURE_EXTRACTION"),
        ),
        "classifiers": (
            "test_seq_classifier",
            "TestSequenceClassificationModels",
            lists("PEFT_SEQ_CLS_MODELS_TO_TEST", CLASSIFIERS, "SEQ_CLS"),
        ),
    }
    return {
        f"test_lorta_{name}.py": BRIDGE.replace("{module}", module)
        .replace("{classes}", classes)
        .replace("{body}", body)
        for name, (module, classes, body) in files.items()
    }


def fetch() -> Path:
    """The folder with PEFT's tests, of the version that is installed."""
    version = importlib.metadata.version("peft")
    folder = WORK / f"peft-{version}"
    if not (folder / "tests" / "test_custom_models.py").exists():
        WORK.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--no-build-isolation", f"peft=={version}", "-d", WORK], check=True)
        with tarfile.open(WORK / f"peft-{version}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
    tests = folder / "tests"
    (tests / "__init__.py").touch()
    for name, text in bridges().items():
        (tests / name).write_text(text, encoding="utf-8")
    return folder


def make_models(folder: Path) -> None:
    """Tiny random models under the names that PEFT's tests know, each with a tokenizer of words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: k for k, word in enumerate([*special, *(f"w{k}" for k in range(995))])}
    plain = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    bert = {
        **plain, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 37, "max_position_embeddings": 512,
    }  # fmt: skip
    llama = {**bert, "num_key_value_heads": 2}
    gpt2 = {**plain, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    made = {
        DECODERS[0]: ("OPT", "ForCausalLM", {**bert, "ffn_dim": 37, "word_embed_proj_dim": 32}),
        DECODERS[1]: ("GPT2", "LMHeadModel", gpt2),
        DECODERS[2]: ("GPTJ", "ForCausalLM", {**gpt2, "rotary_dim": 4}),
        DECODERS[3]: ("Llama", "ForCausalLM", llama),
        DECODERS[4]: ("Qwen2", "ForCausalLM", llama),
        DECODERS[5]: ("Gemma3Text", "", {**llama, "head_dim": 8}),
        BOTH[0]: (
            "T5",
            "ForConditionalGeneration",
            {**plain, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 37, "num_layers": 2,
             "decoder_start_token_id": 0},
        ),
        BOTH[1]: (
            "Bart",
            "ForConditionalGeneration",
            {**plain, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "decoder_ffn_dim": 37,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 37,
             "max_position_embeddings": 512, "decoder_start_token_id": 2},
        ),
        **{name: (name[12:-5], "Model", {**bert, "type_vocab_size": 2}) for name in ENCODERS},
        CLASSIFIERS[0]: ("Bert", "ForSequenceClassification", bert),
        CLASSIFIERS[1]: ("Roberta", "ForSequenceClassification", {**bert, "type_vocab_size": 2}),
        CLASSIFIERS[2]: ("Llama", "ForSequenceClassification", llama),
    }  # fmt: skip
    for name, (family, kind, sizes) in made.items():
        if (folder / name / "config.json").exists():
            continue
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**sizes)
        cls = getattr(transformers, f"{family.removesuffix('Text')}{kind or 'ForCausalLM'}")
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
            unk_token="<unk>", mask_token="<mask>", model_max_length=512,
        ).save_pretrained(folder / name)  # fmt: skip
        cls(config).save_pretrained(folder / name)


def main() -> int:
    """Fetch, prepare, run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-k", default="LortaConfig", help="which tests (default: this method's)")
    parser.add_argument("-n", default="2", help="processes")
    options = parser.parse_args()
    folder = fetch()
    make_models(WORK / "models")
    files = [f"tests/{name}" for name in bridges()]
    command = [
        sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-o", "addopts=",
        # This PEFT calls names that this transformers has deprecated; other warnings stay errors.
        "-W", "ignore::FutureWarning", "-n", options.n,
        "-k", " and not ".join([f"({options.k})", *LEFT_OUT]), "--timeout", "60", *files,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # the tests go online by themselves; fail at once
        "TINY_MODELS": str(WORK / "models"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        with open(WORK / "result.txt", "w", encoding="utf-8") as result:
            for name, why in LEFT_OUT.items():
                result.write(f"left out: {name}: {why}\n")
            for line in process.stdout:
                print(line, end="", flush=True)
                result.write(line)
    return process.returncode


if __name__ == "__main__":
    raise SystemExit(main())
