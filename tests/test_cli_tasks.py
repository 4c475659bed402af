"""The commands on an adapter of several tasks, of which they take one."""

import json

import pytest
import torch
from models import FAMILIES
from transformers import AutoModel

import lortalib
from lortalib.cli import main

TASKS = ["films", "news"]


def output(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7]]))[0]


@pytest.fixture
def saved(tmp_path):
    """Folders of a model, of an adapter of two tasks and of an ordinary one; the outputs by task."""
    FAMILIES["Llama"].model("Model").save_pretrained(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    adapter = lortalib.nn.apply(model, "metatt_41d", 2, tasks=TASKS, init="normal", alpha=0.3)
    adapter.save(tmp_path / "several")
    outputs = {}
    for task in TASKS:
        with adapter.using(task):
            outputs[task] = output(model)
    adapter.remove()
    lortalib.nn.apply(model, "cp", 2).save(tmp_path / "plain")
    return str(tmp_path / "model"), str(tmp_path / "several"), str(tmp_path / "plain"), outputs


def asked(capsys, *arguments, code=0):
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_each_command_takes_the_task_that_is_named(saved, tmp_path, capsys):
    model, folder, _, outputs = saved
    out = {name: str(tmp_path / name) for name in ("merged", "lora", "peft")}
    asked(capsys, "merge", model, folder, out["merged"], "--task", "news")
    found = output(AutoModel.from_pretrained(out["merged"]).eval())
    torch.testing.assert_close(found, outputs["news"])
    asked(capsys, "export-lora", folder, out["lora"], "--task", "news")
    other = AutoModel.from_pretrained(model).eval()
    lortalib.nn.load_lora(other, out["lora"])
    torch.testing.assert_close(output(other), outputs["news"])
    asked(capsys, "convert", folder, out["peft"], "--task", "news")
    other = AutoModel.from_pretrained(model).eval()
    lortalib.nn.load(other, out["peft"])
    torch.testing.assert_close(output(other), outputs["news"])
    checks = asked(capsys, "verify", folder, "--task", "films")["checks"]
    assert all(row.startswith(("ok", "by")) for row in checks.values())


def test_compare_takes_a_task_of_each_side(saved, tmp_path, capsys):
    _, folder, _, _ = saved
    lora = str(tmp_path / "lora")
    asked(capsys, "export-lora", folder, lora, "--task", "news")
    asked(capsys, "compare", folder, lora, "--task-a", "news")
    asked(capsys, "compare", lora, folder, "--task-b", "films", code=1)
    found = asked(
        capsys, "compare", folder, folder, "--task-a", "news", "--task-b", "films", code=1
    )
    assert 0.1 < found["relative distance"] < 2


@pytest.mark.parametrize(
    "command", ["merge MODEL FOLDER OUT", "export-lora FOLDER OUT", "verify FOLDER", "convert FOLDER OUT"]
)  # fmt: skip
def test_a_task_that_is_missing_unknown_or_superfluous(command, saved, tmp_path, capsys):
    model, several, plain, _ = saved
    places = {"MODEL": model, "OUT": str(tmp_path / "out")}

    def refused(folder, *more):
        words = [{**places, "FOLDER": folder}.get(word, word) for word in command.split()]
        assert main([*words, *more]) == 1
        return " ".join(capsys.readouterr().err.split())

    assert "has the tasks films, news" in refused(several)
    assert "as in --task films" in refused(several)
    assert "no task 'sports'; choose one of films, news" in refused(several, "--task", "sports")
    assert "has no tasks; leave out --task films" in refused(plain, "--task", "films")
    assert not (tmp_path / "out").exists()


def test_compare_names_its_options(saved, capsys):
    _, several, plain, _ = saved
    assert main(["compare", plain, several, "--task-a", "news"]) == 1
    assert "leave out --task-a news" in " ".join(capsys.readouterr().err.split())
    assert main(["compare", plain, several]) == 1
    assert "give --task-b" in " ".join(capsys.readouterr().err.split())
