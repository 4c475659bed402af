"""The command line, on saved models and adapters, and on what users get wrong."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib
from lortalib.cli import main

IDS = {"input_ids": torch.arange(5, 19).view(2, 7)}


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=24, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a model and of an adapter on it, and the logits with it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny().save_pretrained(folder / "model")
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    generator = torch.Generator().manual_seed(1)
    adapter = lortalib.nn.apply(model, "cp", 3, init="normal", alpha=0.5, generator=generator)
    adapter.save(folder / "adapter")
    with torch.no_grad():
        return folder / "model", folder / "adapter", model(**IDS)[0]


def run(capsys, *arguments, code=0):
    """What the command printed."""
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


def machine(capsys, *arguments, code=0):
    return json.loads(run(capsys, *arguments, "--json", code=code).out)


def test_info(saved, capsys):
    model, folder, _ = saved
    found = machine(capsys, "info", folder)
    assert found["trainable parameters"] == found["tensors"][0]["trainable parameters"]
    assert len(found["sites"]) == 8
    host = LlamaForCausalLM.from_pretrained(model)
    adapter = lortalib.nn.load(host, folder)
    for entry, site in zip(found["sites"], adapter.sites):
        delta = adapter.delta(site).detach()
        assert entry["norm"] == pytest.approx(delta.norm().item(), rel=1e-4)
        side = delta.T if site.writer else delta
        heads = side.reshape(site.heads, -1).norm(dim=1).tolist()
        assert entry["norm by head"] == pytest.approx(heads, rel=1e-4)
    text = run(capsys, "info", folder).out
    assert "in r, out r, head r, layer r, matrix r" in text
    assert "norm of the update" in text


def test_plan(saved, capsys):
    found = machine(capsys, "plan", saved[0], "--rank", 2, 4, "--decomposition", "cp", "lora")
    counts = {(p["decomposition"], p["rank"]): p["trainable parameters"] for p in found["plans"]}
    for (name, rank), count in counts.items():
        assert lortalib.nn.apply(tiny(), name, rank).count() == count
    assert "LoRA of this rank / it" in run(capsys, "plan", saved[0]).out


def test_sites(saved, capsys):
    found = machine(capsys, "sites", saved[0], "--targets", "all")
    assert len(found["sites"]) == 14
    assert "2 query heads share one of its heads" in found["sites"][1]["why"]
    assert "model.layers.1.self_attn.o_proj" in run(capsys, "sites", saved[0]).out


def test_merge(saved, capsys, tmp_path):
    model, folder, logits = saved
    found = machine(capsys, "merge", model, folder, tmp_path / "out")
    assert found["projections changed"] == 8
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(merged(**IDS)[0], logits, atol=1e-5)
    refused = run(capsys, "merge", model, folder, tmp_path / "out", code=1)
    assert "exists and is not empty" in refused.err


def test_export_lora(saved, capsys, tmp_path):
    model, folder, logits = saved
    found = machine(capsys, "export-lora", folder, tmp_path / "lora")
    assert (found["rank"], found["modules"]) == (3, 8)
    base = LlamaForCausalLM.from_pretrained(model)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    with torch.no_grad():
        assert torch.allclose(adapted(**IDS)[0], logits, atol=1e-5)


def test_check(saved, capsys, tmp_path):
    folder = saved[1]
    assert machine(capsys, "check", folder)["fits"] is True
    config = tiny().config
    config.hidden_size = 32
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    found = machine(capsys, "check", folder, "--model", tmp_path / "wide", code=1)
    assert found["sound"] is True
    assert found["fits"] is False
    assert "does not fit" in found["why"]
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    file = broken / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    found = machine(capsys, "check", broken, code=1)
    assert found["sound"] is False
    assert "damaged" in found["why"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "no adapter.safetensors in nowhere"),
        (["plan", "{adapter}"], "holds no config.json"),
        (["plan", "{model}", "--decomposition", "nonsense"], "unknown decomposition 'nonsense'"),
        (["plan", "{model}", "--rank", "0"], "must be an integer >= 1"),
        (["sites", "{model}", "--targets", "z"], "fits no projection"),
        (["merge", "{model}", "nowhere", "out"], "no adapter.safetensors"),
        (
            ["merge", "{model}", "{adapter}", "{out}", "--dtype", "float99"],
            "unknown dtype 'float99'",
        ),
        (["export-lora", "nowhere", "out"], "no adapter.safetensors"),
    ],
)
def test_errors_of_users_are_one_line_and_no_traceback(saved, arguments, message, capsys, tmp_path):
    known = {"model": saved[0], "adapter": saved[1], "out": tmp_path / "out"}
    filled = [argument.format(**known) for argument in arguments]
    shown = run(capsys, *filled, code=1)
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert message in json.loads(run(capsys, *filled, "--json", code=1).out)["error"]
    assert not (tmp_path / "out").exists()


def test_wrong_usage_leaves_with_2(capsys):
    with pytest.raises(SystemExit) as left:
        main(["nonsense"])
    assert left.value.code == 2


def test_python_m_lortalib(saved):
    done = subprocess.run(
        [sys.executable, "-m", "lortalib", "info", str(saved[1]), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert json.loads(done.stdout)["decomposition"] == "cp"
