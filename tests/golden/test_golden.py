"""Folders that were once written are read for ever, and give the same logits.

``adapter-v1`` was written by the last library that wrote format version 1 (commit 4bae70f), together with
the logits; ``adapter-v2`` and ``lora`` were written from it. ``adapter-split`` was written by the library
that first split modes; its line has the sizes of the factors. ``adapter-tasks`` was written by the library
that first named tasks, with the logits of each. They are never written again: a change of the
format gets a version, an entry in UPGRADES, and a folder of its own here.
"""

import json
from pathlib import Path

import peft
import pytest
import torch
from adapted import close
from golden_model import IDS, golden_model, logits

from lortalib.nn import load, load_lora
from lortalib.nn._files import read, read_description

HERE = Path(__file__).parent
FOLDERS = {"adapter-v1": load, "adapter-v2": load, "lora": load_lora, "adapter-split": load}


def expected(name="adapter-v1"):
    file = "expected-split.json" if name == "adapter-split" else "expected.json"
    value = json.loads((HERE / file).read_text())
    return torch.tensor(value["logits"]).view(value["shape"])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_golden_folder_gives_the_same_logits(name):
    model = golden_model()
    base = logits(model)
    adapter = FOLDERS[name](model, HERE / name)
    assert close(logits(model), expected(name))
    assert not close(base, expected(name))
    adapter.disable()
    assert torch.equal(logits(model), base)


def test_each_part_of_it_matters():
    """The pairs and the head that trained with them both move the logits by much."""
    model = golden_model()
    adapter = load(model, HERE / "adapter-v1")
    with torch.no_grad():
        adapter.networks["layers_2x4_16"].matrix_b_c.zero_()
    assert (logits(model) - expected()).abs().max() > 0.01
    assert adapter.trained_modules.paths == ("lm_head",)
    assert adapter.config.share_residual
    first, second = adapter.networks.values()
    assert first.in_a is second.in_a


def test_the_line_of_a_file_has_the_sizes_of_the_factors():
    (group,) = read_description(HERE / "adapter-split")["groups"]
    assert group["legs"].startswith("matrix in.1:2 a, in.2:8 a b, head.1:2 b c, layer.1:1 head.2:2")
    assert group["modes"] == {"layer": 2, "head": 4, "matrix": 4, "in": 16, "out": 4}


def test_a_golden_folder_of_tasks_gives_the_same_logits_for_each():
    value = json.loads((HERE / "expected-tasks.json").read_text())
    model = golden_model()
    adapter = load(model, HERE / "adapter-tasks")
    assert adapter.tasks == ("sst2", "mrpc")
    wanted = torch.tensor(value["logits"]).view(value["shape"])
    assert not close(wanted[0], wanted[1], 1e-2)
    for task, found in zip(adapter.tasks, wanted, strict=True):
        with adapter.using(task):
            assert close(logits(model), found)


def test_peft_reads_the_golden_lora():
    found = peft.PeftModel.from_pretrained(golden_model(), HERE / "lora").eval()
    with torch.no_grad():
        assert close(found(input_ids=IDS).logits, expected())


@pytest.mark.parametrize("name", ["adapter-v1", "adapter-v2"])
def test_what_is_saved_today_says_what_was_said_then(name, tmp_path):
    """A field may be added; one that is renamed or means something else needs a new format version."""
    folder = load(golden_model(), HERE / name).save(tmp_path)
    then, now = read_description(HERE / "adapter-v2"), read_description(folder)
    assert holds(now, {**then, "lortalib_version": now["lortalib_version"]})
    one, two = read(HERE / "adapter-v2"), read(folder)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    values = [each.trained_modules.values(None)["lm_head"]["weight"] for each in (one, two)]
    assert torch.equal(*values)


def holds(now, then):
    """Whether a JSON value has all that another has."""
    if isinstance(then, dict):
        return all(key in now and holds(now[key], value) for key, value in then.items())
    if isinstance(then, list):
        return len(now) == len(then) and all(map(holds, now, then))
    return now == then
