"""Trainer and TRL: what they do with a model of PEFT they do with this method."""

import json
import math

import peft
import pytest
import torch
from adapted import close, output, same_bits
from models import FAMILIES
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from wrapped_models import factors, wrapped

from lortalib.peft import LortaConfig

LLAMA = FAMILIES["Llama"]


def rows(number=24, length=9):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 60, (number, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, **options):
    options = {
        "max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "seed": 0,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, **options,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=folder, **options)
    return Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(8))


def fresh():
    return wrapped(kind="ForCausalLM", init_weights=True)


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def test_checkpoints_hold_the_adapter_alone_and_resume_to_the_bit(tmp_path):
    model = fresh()
    whole = trainer(model, tmp_path)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    checkpoint = tmp_path / "checkpoint-3"
    stored = load_file(checkpoint / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == model.get_nb_trainable_parameters()[0]
    assert not (checkpoint / "model.safetensors").exists()
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORTA"
    again = fresh()
    resumed = trainer(again, tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for one, two in zip(factors(model).values(), factors(again).values()):
        assert same_bits(one.data, two.data)
    assert losses(resumed)[-3:] == losses(whole)[-3:]


def test_the_best_checkpoint_is_loaded(tmp_path):
    model = fresh()
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    done = trainer(model, tmp_path, load_best_model_at_end=True, learning_rate=0.5, **options)
    done.train()
    best = done.state.best_metric
    assert done.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_alike(reentrant, tmp_path):
    plain, saved = fresh(), fresh()
    trainer(plain, tmp_path / "plain", max_steps=3).train()
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    trainer(saved, tmp_path / "saved", max_steps=3, **options).train()
    for one, two in zip(factors(plain).values(), factors(saved).values()):
        assert close(one.data, two.data, 1e-4)


@pytest.mark.parametrize(
    "options", [{"bf16": True}, {"gradient_accumulation_steps": 2}, {"optim": "adafactor"}]
)
def test_other_ways_to_train(options, tmp_path):
    model = fresh()
    done = trainer(model, tmp_path, **options)
    before = done.evaluate()["eval_loss"]
    done.train()
    assert done.evaluate()["eval_loss"] < before
    assert all(p.dtype == torch.float32 for p in factors(model).values())


@pytest.mark.slow
def test_torch_compile_trains_alike(tmp_path):
    plain, compiled = fresh(), fresh()
    trainer(plain, tmp_path / "plain", max_steps=3).train()
    trainer(compiled, tmp_path / "compiled", max_steps=3, torch_compile=True).train()
    for one, two in zip(factors(plain).values(), factors(compiled).values()):
        assert close(one.data, two.data, 1e-3)


# TRL


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: k for k, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{k}" for k in range(61))])
    }
    found = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="</s>")


def texts(number=8):
    generator = torch.Generator().manual_seed(2)
    draws = torch.randint(0, 61, (number, 3, 5), generator=generator).tolist()
    return [[" ".join(f"w{k}" for k in part) for part in row] for row in draws]


@pytest.mark.parametrize("ready", [False, True], ids=["peft_config", "PeftModel"])
def test_sft(ready, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": f"{a} {b}"} for a, b, _ in texts()])
    arguments = trl.SFTConfig(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, max_length=16, disable_tqdm=True,
    )  # fmt: skip
    model = fresh() if ready else LLAMA.model("ForCausalLM")
    config = None if ready else LortaConfig(rank=2, task_type="CAUSAL_LM")
    done = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=config,
    )
    before = [p.detach().clone() for p in factors(done.model).values()]
    done.train()
    assert not all(map(torch.equal, before, factors(done.model).values()))
    done.save_model(tmp_path / "out")
    again = peft.PeftModel.from_pretrained(LLAMA.model("ForCausalLM"), tmp_path / "out").eval()
    assert close(output(again, LLAMA.inputs()), output(done.model.eval(), LLAMA.inputs()))


@pytest.mark.parametrize("ready", [False, True], ids=["peft_config", "PeftModel"])
def test_dpo_begins_at_ln_2(ready, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    pairs = [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in texts()]
    arguments = trl.DPOConfig(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    model = wrapped(kind="ForCausalLM") if ready else LLAMA.model("ForCausalLM")
    config = None if ready else LortaConfig(rank=2, task_type="CAUSAL_LM")
    done = trl.DPOTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer(), peft_config=config,
    )  # fmt: skip
    done.train()
    assert losses(done)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(done)[-1] < math.log(2)
