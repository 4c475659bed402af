"""The command ``from-lora``: a LoRA of PEFT as an adapter of lortalib."""

import json

import peft
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import lortalib
from lortalib.cli import main

IDS = {"input_ids": torch.tensor([[3, 1, 4, 1, 5]])}


@pytest.fixture
def lora(tmp_path):
    """Folders of a model and of a LoRA on it with a trained head, and the logits with it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 50}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes))
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "dense"], exclude_modules=r".*pooler.*", r=3,
        lora_alpha=5, rank_pattern={"query": 2}, init_lora_weights=False,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    config.base_model_name_or_path = str(tmp_path / "model")
    with torch.no_grad():
        adapted.get_submodule("base_model.model.classifier").weight.add_(0.5)
    adapted.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        return tmp_path / "model", tmp_path / "lora", adapted.eval()(**IDS).logits


def run(capsys, *arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


@pytest.mark.parametrize("named", [True, False])
def test_it_computes_the_same(lora, named, capsys, tmp_path):
    model, folder, logits = lora
    asked = () if named else ("--model", model)
    if not named:
        file = folder / "adapter_config.json"
        known = json.loads(file.read_text())
        file.write_text(json.dumps({**known, "base_model_name_or_path": "user/name"}))
        assert "give --model" in run(capsys, "from-lora", folder, tmp_path / "out", code=1).err
    found = json.loads(run(capsys, "from-lora", folder, tmp_path / "out", *asked, "--json").out)
    assert found["decomposition"] == "lora"
    plain = BertForSequenceClassification.from_pretrained(model).eval()
    adapter = lortalib.nn.load(plain, tmp_path / "out")
    assert found["parameters"] == adapter.count(trainable_only=False)
    with torch.no_grad():
        assert torch.allclose(plain(**IDS).logits, logits, atol=1e-6)


def test_what_is_no_lora_is_refused_and_nothing_is_written(lora, capsys, tmp_path):
    model = lora[0]
    plain = BertForSequenceClassification.from_pretrained(model)
    other = lortalib.nn.apply(plain, "cp", 2).save(tmp_path / "other")
    for source in (other, tmp_path / "nowhere"):
        said = run(capsys, "from-lora", source, tmp_path / "out", "--model", model, code=1)
        assert "Traceback" not in said.err
        assert "adapter_config.json" in said.err
    assert not (tmp_path / "out").exists()
