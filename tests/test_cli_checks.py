"""The commands `verify` and `compare`, on saved models and adapters."""

import json

import pytest
import torch
from models import FAMILIES, LAW_FAMILIES
from transformers import AutoModel

import lortalib
from lortalib.cli import main
from lortalib.nn.door import compare_updates


def saved(tmp_path, family, line="cp", **options):
    """Folders of a model and of a random adapter on it."""
    kind = "Model" if family.name != "T5" else "ForConditionalGeneration"
    family.model(kind).save_pretrained(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model")
    adapter = lortalib.nn.apply(model, line, 2, init="normal", alpha=0.1, **options)
    adapter.save(tmp_path / "adapter")
    return str(tmp_path / "model"), str(tmp_path / "adapter"), adapter


def asked(capsys, *arguments, code=0):
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", [n for n in LAW_FAMILIES if n != "experts"])
@pytest.mark.parametrize("line", ["cp", "indscal"])
def test_verify_finds_a_sound_adapter_sound(name, line, tmp_path, capsys):
    model, folder, _ = saved(tmp_path, LAW_FAMILIES[name], line)
    checks = asked(capsys, "verify", folder, "--model", model)["checks"]
    assert checks.pop("changes the output").startswith("by ")
    assert all(found.startswith("ok") for found in checks.values()), checks


def test_verify_says_what_a_lora_cannot_hold(tmp_path, capsys):
    model, folder, _ = saved(tmp_path, LAW_FAMILIES["experts"], targets="all")
    checks = asked(capsys, "verify", folder, "--model", model)["checks"]
    assert "no pair for it" in checks["exported LoRA = adapted"]
    assert checks["merged = adapted"].startswith("ok")


def test_verify_of_a_vision_model_and_of_a_trained_module(tmp_path, capsys):
    model, folder, _ = saved(tmp_path, FAMILIES["ViT"])
    assert asked(capsys, "verify", folder)["model"] == model  # the folder that the file names
    bert = FAMILIES["Bert"]
    model, folder, _ = saved(tmp_path / "two", bert, train_also=["pooler"])
    checks = asked(capsys, "verify", folder)["checks"]
    assert checks["exported LoRA = adapted"].startswith("ok")


def test_verify_fails_where_merging_or_the_export_is_wrong(tmp_path, capsys, monkeypatch):
    _, folder, _ = saved(tmp_path, FAMILIES["Llama"])
    kind = lortalib.nn.Adapter
    monkeypatch.setattr(kind, "export_lora", wrong_export)
    checks = asked(capsys, "verify", folder, code=1)["checks"]
    assert checks["exported LoRA = adapted"].startswith("FAILED")
    monkeypatch.setattr(kind, "merge", kind.disable)
    assert asked(capsys, "verify", folder, code=1)["checks"]["merged = adapted"].startswith(
        "FAILED"
    )
    monkeypatch.setattr(kind, "unmerge", lambda self: kind.disable(self) or spoil(self.model))
    checks = asked(capsys, "verify", folder, code=1)["checks"]
    assert checks["unmerged = base, bit for bit"].startswith("FAILED")


def test_verify_fails_where_a_tensor_has_no_effect(tmp_path, capsys, monkeypatch):
    _, folder, _ = saved(tmp_path, FAMILIES["Llama"])
    monkeypatch.setattr(lortalib.nn, "check_effect", lambda *_: {"layers": False})
    checks = asked(capsys, "verify", folder, code=1)["checks"]
    assert checks["every tensor has an effect"] == "FAILED: layers changes nothing"


def spoil(model):
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.01)


def wrong_export(adapter, folder):
    with torch.no_grad():
        next(adapter.parameters()).mul_(3)
    return lortalib.nn.export_lora(adapter, folder)


def test_verify_asks_for_a_model_that_it_may_load(tmp_path, capsys):
    model, folder, adapter = saved(tmp_path, FAMILIES["Bert"])
    adapter.model.config._name_or_path = "stranger/model"
    adapter.save(folder)
    assert "give it as --model" in asked(capsys, "verify", folder, code=1)["error"]
    refused = asked(capsys, "verify", folder, "--trust-remote-code", code=1)
    assert "goes with --model only" in refused["error"]
    assert asked(capsys, "verify", folder, "--model", model)


def test_verify_says_where_it_has_no_inputs(tmp_path, capsys):
    _, folder, _ = saved(tmp_path, FAMILIES["CLIP"])
    assert "Check it from Python" in asked(capsys, "verify", folder, code=1)["error"]


# compare


@pytest.mark.filterwarnings("error")
def test_norms_keep_no_graph(tmp_path):
    """torch warns, once in a process, of a number that is read of a tensor with gradients."""
    folder = lortalib.nn.apply(FAMILIES["Llama"].model(), "lora", 2, gqa="split").save(tmp_path)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        assert compare_updates(folder, folder)[0].relative == pytest.approx(0, abs=1e-6)
    finally:
        torch.set_warn_always(before)


@pytest.mark.parametrize("name", [n for n in LAW_FAMILIES if n != "experts"])
def test_an_adapter_and_its_lora_are_alike(name, tmp_path, capsys):
    _, folder, adapter = saved(tmp_path, LAW_FAMILIES[name])
    adapter.export_lora(tmp_path / "lora")
    found = asked(capsys, "compare", folder, tmp_path / "lora")
    modules = {site.path for site in adapter.sites}
    assert {row["module"] for row in found["differences"]} == modules
    assert found["alike"] == found["modules"] == len(modules)
    norms = {row["module"]: row["norm of A"] for row in found["differences"]}
    for path in modules:
        dense = [adapter.delta(site).detach() for site in adapter.sites if site.path == path]
        expected = sum(float(part.norm()) ** 2 for part in dense) ** 0.5
        assert norms[path] == pytest.approx(expected, rel=1e-4)


def test_the_distance_is_that_of_the_dense_updates(tmp_path, capsys):
    _, one, first = saved(tmp_path / "one", FAMILIES["Llama"])
    _, two, second = saved(tmp_path / "two", FAMILIES["Llama"], "tt", targets="qv")
    found = asked(capsys, "compare", one, two, code=1)
    theirs = {site.path: site for site in second.sites}
    for row in found["differences"]:
        here = first.delta(row["module"]).detach().double()
        there = (
            second.delta(theirs[row["module"]]).detach() if row["module"] in theirs else 0 * here
        )
        assert row["distance"] == pytest.approx(float((here - there).norm()), rel=1e-4)
        assert row["norm of B"] == pytest.approx(float(there.norm()), rel=1e-4, abs=1e-9)
    assert any(row["norm of B"] == 0 and row["relative"] == 1 for row in found["differences"])


def test_a_small_difference_is_measured_and_not_lost(tmp_path, capsys):
    _, one, adapter = saved(tmp_path, FAMILIES["Bert"])
    with torch.no_grad():
        next(adapter.parameters()).mul_(1 + 1e-5)
    adapter.save(tmp_path / "two")
    found = asked(capsys, "compare", one, tmp_path / "two")
    for row in found["differences"]:
        assert row["relative"] == pytest.approx(1e-5, rel=0.1)
    asked(capsys, "compare", one, tmp_path / "two", "--tolerance", "1e-6", code=1)


def test_modules_that_trained_as_a_whole_are_compared(tmp_path, capsys):
    _, one, adapter = saved(tmp_path, FAMILIES["Bert"], train_also=["pooler"])
    with torch.no_grad():
        adapter.model.pooler.dense.bias.add_(1)
    adapter.save(tmp_path / "two")
    found = asked(capsys, "compare", one, tmp_path / "two", code=1)
    unlike = [row["module"] for row in found["differences"] if row["relative"] > 1e-4]
    assert unlike == ["pooler.dense.bias"]
    adapter.export_lora(tmp_path / "lora")
    assert asked(capsys, "compare", tmp_path / "two", tmp_path / "lora")


def test_on_the_stream_the_model_is_needed(tmp_path, capsys):
    model, folder, adapter = saved(tmp_path, FAMILIES["Llama"], "indscal")
    adapter.export_lora(tmp_path / "lora")
    assert (
        "weights of its model"
        in asked(capsys, "compare", folder, tmp_path / "lora", code=1)["error"]
    )
    found = asked(capsys, "compare", folder, tmp_path / "lora", "--model", model)
    assert found["relative distance"] < 1e-4


def test_the_ten_that_differ_most_are_shown(tmp_path, capsys):
    _, one, _ = saved(tmp_path / "one", FAMILIES["Bart"])
    _, two, _ = saved(tmp_path / "two", FAMILIES["Bart"], "tt")
    assert main(["compare", one, two]) == 1
    few = capsys.readouterr().out
    assert "--all lists every one" in few
    assert main(["compare", one, two, "--all"]) == 1
    assert few.count("self_attn") < capsys.readouterr().out.count("self_attn")


def test_what_is_no_adapter(tmp_path, capsys):
    _, folder, _ = saved(tmp_path, FAMILIES["Bert"])
    assert "no adapter.safetensors" in asked(capsys, "compare", folder, "nowhere", code=1)["error"]
