"""Saving and loading: what the files hold, and that a model takes back the same adapter."""

import json
import os
import pkgutil
import re
import subprocess
import sys

import pytest
import torch
from harness import (
    changes,
    close,
    each_format,
    examples,
    output,
    picture,
    put,
    same_bits,
    unchanged,
)
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, each_family
from safetensors import safe_open

from lortalib import decomp
from lortalib.nn import AdapterFileError, adapters, apply, export_lora, load, set_active

FILES = ["adapter.json", "adapter.safetensors"]


def description(folder):
    return json.loads((folder / "adapter.json").read_text(encoding="utf-8"))


def tensors(folder):
    with safe_open(folder / "adapter.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


# Round trip


@pytest.mark.parametrize("gqa", ["pool", "split"])
@each_format
def test_round_trip_of_every_format(decomposition, gqa, llama, inputs, tmp_path):
    base = output(llama, inputs)
    adapter = put(llama, decomposition, gqa=gqa, alpha=0.7, dropout=0.1)
    expected = output(llama, inputs)
    assert adapter.save(tmp_path) == tmp_path
    other = FAMILIES["Llama"].model("ForCausalLM")
    loaded = load(other, tmp_path)
    assert same_bits(output(other, inputs), expected)
    assert loaded.config == adapter.config
    assert loaded.groups == adapter.groups
    assert loaded.count() == adapter.count()
    for one, two in zip(adapter.named_parameters(), loaded.named_parameters()):
        assert one[0] == two[0]
        assert one[1].requires_grad == two[1].requires_grad
        assert same_bits(one[1], two[1])
    loaded.merge()
    assert close(output(other, inputs), expected)
    loaded.remove()
    assert same_bits(output(other, inputs), base)


@each_family
def test_round_trip_of_every_family(family, tmp_path):
    model = family.model()
    put(model, "tt").save(tmp_path)
    other = family.model()
    look = picture(other)
    loaded = load(other, tmp_path)
    assert same_bits(output(other, family.inputs()), output(model, family.inputs()))
    loaded.remove()
    assert changes(look, picture(other)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "ov", "layers": [1]},
        {"targets": lambda site: (site.role, site.layer) in {("q", 0), ("v", 1)}},
        {"decomposition": "layer in r, layer matrix head out r", "rank": 3},
        {"decomposition": lambda shape, rank: decomp.cp(dict(sorted(shape.items())), rank)},
        {"decomposition": "in p (frozen), layer matrix p out, head out matrix", "rank": 2},
        {"decomposition": "cp", "rank": 1, "init": "lorta", "alpha": 16},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
    ],
)
def test_round_trip_of_unusual_adapters(llama, inputs, options, tmp_path):
    adapter = put(llama, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3)
    adapter.save(tmp_path)
    other = FAMILIES["Llama"].model("ForCausalLM")
    loaded = load(other, tmp_path)
    assert same_bits(output(other, inputs), output(llama, inputs))
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in adapter.parameters()]


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_an_adapter_is_saved_in_any_state(llama, inputs, state, tmp_path):
    adapter = put(llama)
    expected = output(llama, inputs)
    adapter.disable() if state == "disabled" else adapter.merge()
    with unchanged(llama):
        adapter.save(tmp_path)
    other = FAMILIES["Llama"].model("ForCausalLM")
    load(other, tmp_path)
    assert same_bits(output(other, inputs), expected)


def test_saving_what_was_loaded_gives_the_same_files(llama, tmp_path):
    put(llama, "tucker", gqa="split").save(tmp_path / "one")
    other = FAMILIES["Llama"].model("ForCausalLM")
    load(other, tmp_path / "one").save(tmp_path / "two")
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


SCRIPT = """
import torch
from harness import output, same_bits
from models import FAMILIES
from lortalib.nn import load

inputs, expected = torch.load("expected.pt")
model = FAMILIES["Llama"].model("ForCausalLM")
assert not same_bits(output(model, inputs), expected)
load(model, "adapter")
assert same_bits(output(model, inputs), expected)
"""


def test_a_fresh_process_computes_the_same(llama, inputs, tmp_path):
    put(llama, "tt", gqa="split").save(tmp_path / "adapter")
    torch.save((inputs, output(llama, inputs)), tmp_path / "expected.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", SCRIPT], **options)
    assert done.returncode == 0, done.stderr[-2000:]


# What the files hold


def test_two_files_and_each_tensor_once(llama, tmp_path):
    adapter = put(llama, "cp", 3)
    adapter.save(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == FILES
    saved = tensors(tmp_path / "new" / "folder")
    assert list(saved) == sorted(
        f"networks.layers.{leg}_r" for leg in ("in", "out", "head", "layer", "matrix")
    )
    assert sum(tensor.numel() for tensor in saved.values()) == adapter.count()
    own = {f"networks.{name}": p for name, p in adapter.networks.named_parameters()}
    own = {name.replace("networks.networks.", "networks."): p for name, p in own.items()}
    assert all(same_bits(saved[name], own[name]) for name in saved)
    size = sum((tmp_path / "new" / "folder" / file).stat().st_size for file in FILES)
    assert size < 4 * adapter.count() + 8_000


def test_others_may_read_every_file_alike(llama, tmp_path):
    adapter = apply(llama, "cp", rank=2)
    adapter.save(tmp_path / "own")
    export_lora(adapter, tmp_path / "lora")
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    files = [*(tmp_path / "own").iterdir(), *(tmp_path / "lora").iterdir()]
    assert len(files) == 4
    assert {file.stat().st_mode for file in files} == {usual}


def test_the_description_is_for_people_too(llama, tmp_path):
    llama.config._name_or_path = "someone/tiny-llama"
    put(llama, "metatt", 2, alpha=0.5, targets="qv", layers=1).save(tmp_path)
    text = description(tmp_path)
    assert text["format_version"] == 1
    base = text["base_model"]
    assert (base["class"], base["model_type"]) == ("LlamaForCausalLM", "llama")
    assert base["name"] == "someone/tiny-llama"
    assert re.fullmatch("[0-9a-f]{16}", base["shape_fingerprint"])
    assert text["settings"]["decomposition"] == "tt"
    assert text["settings"]["scaling"] == 0.5
    (group,) = text["groups"]
    assert group["legs"] == "in a, layer a b, matrix b c, head c d, out d"
    assert group["modes"] == {"layer": 1, "head": 4, "matrix": 2, "in": 16, "out": 4}
    assert group["ranks"] == {"a": 2, "b": 2, "c": 2, "d": 2}
    assert (group["layers"], group["roles"]) == ([1], ["q", "v"])
    paths = [site["path"] for site in group["sites"]]
    assert paths == [f"model.layers.1.self_attn.{role}_proj" for role in "qv"]


def test_paths_are_only_a_hint(llama, inputs, tmp_path):
    put(llama, gqa="split").save(tmp_path)
    expected = output(llama, inputs)
    text = (tmp_path / "adapter.json").read_text().replace("self_attn.", "renamed.")
    (tmp_path / "adapter.json").write_text(text)
    other = FAMILIES["Llama"].model("ForCausalLM")
    load(other, tmp_path)
    assert same_bits(output(other, inputs), expected)


@pytest.mark.parametrize("name", ["Bert", "Llama", "Qwen3", "ViT", "T5"])
def test_it_moves_between_a_bare_model_and_one_with_a_head(name, tmp_path):
    family = FAMILIES[name]
    for first, second in (("Model", family.head), (family.head, "Model")):
        adapter = put(family.model(first))
        adapter.save(tmp_path / first)
        loaded = load(family.model(second), tmp_path / first)
        for one, two in zip(adapter.sites, loaded.sites):
            assert one.key == two.key
            assert same_bits(adapter.delta(one), loaded.delta(two))


# Names, states


def test_names(llama, tmp_path):
    put(llama, name="mine").save(tmp_path)
    message = "already has an adapter called 'mine'; give name="
    with unchanged(llama), pytest.raises(ValueError, match=message):
        load(llama, tmp_path)
    second = load(llama, str(tmp_path), name="yours")
    assert list(adapters(llama)) == ["mine", "yours"]
    assert second.name == "yours"
    with unchanged(llama), pytest.raises(ValueError, match="without dots"):
        load(llama, tmp_path, name="a.b")
    with unchanged(llama), pytest.raises(ValueError, match="name"):
        load(llama, tmp_path, name="training")


def test_loading_inactive_and_unfrozen(llama, inputs, tmp_path):
    adapter = put(llama)
    adapter.save(tmp_path)
    expected = output(llama, inputs)
    adapter.remove()
    before = output(llama, inputs)
    loaded = load(llama, tmp_path, active=False, freeze=False)
    assert not loaded.active
    assert same_bits(output(llama, inputs), before)
    assert all(p.requires_grad for p in llama.parameters())
    set_active(llama, "default")
    assert same_bits(output(llama, inputs), expected)


def test_loading_onto_a_training_model_trains(llama, tmp_path):
    put(llama, dropout=0.5).save(tmp_path)
    other = FAMILIES["Llama"].model("ForCausalLM").train()
    assert load(other, tmp_path).training


@given(alpha=st.floats(-1e3, 1e3).filter(bool), dropout=st.floats(0, 0.99), rank=st.integers(1, 5))
@examples(15)
def test_settings_come_back_exactly(tmp_path_factory, alpha, dropout, rank):
    folder = tmp_path_factory.mktemp("adapter")
    model = FAMILIES["Bert"].model(num_hidden_layers=1)
    adapter = put(model, rank=rank, alpha=alpha, dropout=dropout)
    adapter.save(folder)
    loaded = load(model, folder, name="b")
    assert loaded.config == adapter.config
    assert all(same_bits(loaded.delta(s), adapter.delta(s)) for s in adapter.sites)


# Saving that fails


def after(calls, function):
    """A function that fails as on a full disk, once it was called so many times."""
    count = iter(range(100))

    def call(*args, **kwargs):
        if next(count) == calls:
            raise OSError("no space left on device")
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("place", "calls"),
    [
        ("lortalib.nn._storage.save_file", 0),
        ("pathlib.Path.write_text", 0),
        ("os.replace", 0),
        ("os.replace", 1),
    ],
)
def test_a_failing_save_leaves_the_old_files(llama, tmp_path, monkeypatch, place, calls):
    adapter = put(llama)
    adapter.save(tmp_path)
    old = {file: (tmp_path / file).read_bytes() for file in FILES}
    with torch.no_grad():
        next(adapter.parameters()).neg_()
    with monkeypatch.context() as patched, unchanged(llama):
        patched.setattr(place, after(calls, pkgutil.resolve_name(place)))
        with pytest.raises(OSError, match="no space left"):
            adapter.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    assert {file: (tmp_path / file).read_bytes() for file in FILES} == old


def test_saving_onto_a_file_or_from_the_meta_device(llama, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OSError, match="taken"):
        put(llama).save(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    with torch.device("meta"):
        on_meta = FAMILIES["Llama"].model()
    with pytest.raises(ValueError, match="on the meta device: it has no numbers to save"):
        put(on_meta).save(tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


def test_saving_over_an_adapter_replaces_it(llama, tmp_path):
    put(llama, "lora", 4, name="big").save(tmp_path)
    adapter = put(llama, "cp", 1, name="small")
    adapter.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    loaded = load(FAMILIES["Llama"].model("ForCausalLM"), tmp_path)
    assert loaded.name == "small"
    assert loaded.count() == adapter.count()


def test_the_error_is_a_value_error():
    assert issubclass(AdapterFileError, ValueError)
