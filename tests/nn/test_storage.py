"""Saving and loading: what the file holds, and that a model takes back the same adapter."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapted import changes, each_format, output, picture, put, same_bits, unchanged
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, each_family
from saved_files import FILE, description, edit, tensors
from strategies import examples

from lortalib import decomp
from lortalib.nn import (
    AdapterFileError,
    adapters,
    apply,
    export_lora,
    load,
    read,
    read_description,
    set_active,
)
from lortalib.nn._files import read_adapter
from lortalib.nn._files.tensors import open_tensors

# Round trip


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


def test_saving_what_was_loaded_gives_the_same_bytes(llama, tmp_path):
    put(llama, "tucker", gqa="split", train_also=["lm_head"]).save(tmp_path / "0")
    for k in range(5):  # an order that is drawn for each file would show
        other = FAMILIES["Llama"].model("ForCausalLM")
        load(other, tmp_path / str(k)).save(tmp_path / str(k + 1))
        assert (tmp_path / "0" / FILE).read_bytes() == (tmp_path / str(k + 1) / FILE).read_bytes()


@each_format
def test_read_gives_the_adapter_on_no_model(decomposition, llama, tmp_path):
    adapter = put(llama, decomposition, alpha=0.7, train_also=["lm_head"])
    found = read(adapter.save(tmp_path))
    assert not found.is_on_model
    assert (found.name, found.config, found.groups) == ("default", adapter.config, adapter.groups)
    assert all(same_bits(found.delta(site), adapter.delta(site)) for site in adapter.sites)
    values = found.trained_modules.values(None)["lm_head"]["weight"]
    assert same_bits(values, llama.lm_head.weight)


def test_a_folder_and_its_file_are_the_same(llama, tmp_path):
    adapter = put(llama)
    adapter.save(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / FILE, str(tmp_path / FILE)):
        assert read(place).count() == adapter.count()
        assert read_description(place)["name"] == "default"
        load(llama, place, name="again").remove()
    (tmp_path / FILE).rename(tmp_path / "mine.safetensors")
    assert read(tmp_path / "mine.safetensors").count() == adapter.count()


def test_an_adapter_fits_a_model_without_being_put_on_it(llama, inputs, tmp_path):
    expected = put(llama).save(tmp_path) and output(llama, inputs)
    other = FAMILIES["Llama"].model("ForCausalLM")
    with unchanged(other):
        adapter = read_adapter(other, tmp_path, name="x")
    assert adapter.name == "x"
    assert not adapter.is_on_model
    load(other, tmp_path)
    assert same_bits(output(other, inputs), expected)


def test_the_file_is_read_once(llama, tmp_path, monkeypatch):
    put(llama).save(tmp_path)
    opened = []
    own = open_tensors

    def count(path):
        opened.append(path)
        return own(path)

    monkeypatch.setattr("lortalib.nn._files.saved.open_tensors", count)
    load(llama, tmp_path, name="again")
    assert opened == [tmp_path / FILE]


# Parameters that several networks have, and their names

CLASH = "in dense, out dense, head dense, layer dense, matrix dense, dense"


def test_a_parameter_whose_name_is_an_attribute(llama, inputs, tmp_path):
    """`dense` is a method of a network, so its parameter of that name is called `dense_`."""
    adapter = put(llama, CLASH)
    assert adapter.networks["layers"].names[-1] == "dense_"
    expected = output(llama, inputs)
    adapter.save(tmp_path)
    assert description(tmp_path)["groups"][0]["parameters"][-1] == "dense_"
    other = FAMILIES["Llama"].model("ForCausalLM")
    loaded = load(other, tmp_path)
    assert same_bits(output(other, inputs), expected)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in adapter.named_parameters()]


@pytest.mark.parametrize("gqa", ["pool", "split"])
def test_a_shared_factor_is_stored_once_and_stays_shared(gqa, llama, inputs, tmp_path):
    adapter = put(llama, "cp", targets="all", gqa=gqa, share_residual=True)
    numbers = {id(p): p.numel() for p in adapter.networks.parameters()}
    adapter.save(tmp_path)
    assert sum(tensor.numel() for tensor in tensors(tmp_path).values()) == sum(numbers.values())
    other = FAMILIES["Llama"].model("ForCausalLM")
    loaded = load(other, tmp_path)
    assert len(list(loaded.networks.parameters())) == len(numbers)
    assert loaded.count() == adapter.count()
    assert same_bits(output(other, inputs), output(llama, inputs))


def test_two_groups_of_one_network_stay_one(llama, tmp_path):
    made = {}

    def one_for_all(shape, rank):
        return made.setdefault(tuple(shape.items()), decomp.cp(shape, rank))

    adapter = put(llama, one_for_all, targets="qk", gqa="split")
    twin = adapter.networks["layers_4x4_16"]
    # The two groups have other head counts, so let them share the factors that are of one size.
    other = adapter.networks["layers_2x4_16"]
    for name in ("in_r", "out_r"):
        other.register_parameter(name, twin.get_parameter(name))
    adapter.save(tmp_path)
    loaded = load(FAMILIES["Llama"].model("ForCausalLM"), tmp_path)
    assert loaded.networks["layers_2x4_16"].in_r is loaded.networks["layers_4x4_16"].in_r
    assert loaded.count() == adapter.count()


SCRIPT = """
import torch
from adapted import output, same_bits
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


def test_one_file_and_each_tensor_once(llama, tmp_path):
    adapter = put(llama, "cp", 3)
    adapter.save(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == [FILE]
    saved = tensors(tmp_path / "new" / "folder")
    assert list(saved) == sorted(
        f"networks.layers.{leg}_r" for leg in ("in", "out", "head", "layer", "matrix")
    )
    assert sum(tensor.numel() for tensor in saved.values()) == adapter.count()
    own = {f"networks.{name}": p for name, p in adapter.networks.named_parameters()}
    own = {name.replace("networks.networks.", "networks."): p for name, p in own.items()}
    assert all(same_bits(saved[name], own[name]) for name in saved)
    assert (tmp_path / "new" / "folder" / FILE).stat().st_size < 4 * adapter.count() + 8_000


def test_others_may_read_every_file_alike(llama, tmp_path):
    adapter = apply(llama, "cp", rank=2)
    adapter.save(tmp_path / "own")
    export_lora(adapter, tmp_path / "lora")
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    files = [*(tmp_path / "own").iterdir(), *(tmp_path / "lora").iterdir()]
    assert len(files) == 3
    assert {file.stat().st_mode for file in files} == {usual}


def test_the_description_is_for_people_too(llama, tmp_path):
    llama.config._name_or_path = "someone/tiny-llama"
    put(llama, "metatt", 2, alpha=0.5, targets="qv", layers=1).save(tmp_path)
    text = description(tmp_path)
    assert text == read_description(tmp_path)
    assert (text["format"], text["format_version"]) == ("lortalib adapter", 2)
    base = text["base_model"]
    assert (base["class"], base["model_type"]) == ("LlamaForCausalLM", "llama")
    assert base["name"] == "someone/tiny-llama"
    assert re.fullmatch("[0-9a-f]{16}", base["shape_fingerprint"])
    assert text["config"]["decomposition"] == "tt"
    assert text["config"]["scaling"] == 0.5
    assert text["trained_modules"] == []
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
    edit(tmp_path, text=json.dumps(description(tmp_path)).replace("self_attn.", "renamed."))
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


# Older and newer versions


def test_a_field_that_later_versions_add_may_be_missing(llama, inputs, tmp_path):
    """Whatever has a default: the files of today stay sound when such a field is added."""
    put(llama, gqa="split").save(tmp_path)
    expected = output(llama, inputs)

    def older(value):
        del value["config"]["share_residual"], value["shared_weights"]
        for group in value["groups"]:
            for site in group["sites"]:
                for name in ("transposed", "parameter", "rows", "fused", "tied_paths", "experts"):
                    del site[name]

    edit(tmp_path, older)
    other = FAMILIES["Llama"].model("ForCausalLM")
    assert load(other, tmp_path).config.share_residual is False
    assert same_bits(output(other, inputs), expected)


def test_what_version_1_left_is_removed(llama, tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "adapter-v1"
    for file in golden.iterdir():
        shutil.copy(file, tmp_path)
    put(llama, name="new").save(tmp_path)
    assert os.listdir(tmp_path) == [FILE]
    # What is no description of an adapter is somebody else's, and is never looked at.
    (tmp_path / "adapter.json").write_text('{"format": "another"}')
    put(llama, name="newer").save(tmp_path)
    assert read(tmp_path).name == "newer"
    assert sorted(os.listdir(tmp_path)) == ["adapter.json", FILE]


# Modules that trained as a whole, where their weight is another's too


def tied(**changes):
    return FAMILIES["Llama"].model("ForCausalLM", tie_word_embeddings=True, **changes)


def test_a_tied_head_goes_onto_a_tied_model_only(inputs, tmp_path):
    model = tied()
    adapter = put(model, train_also=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    expected = output(model, inputs)
    adapter.save(tmp_path)
    assert description(tmp_path)["shared_weights"] == {"lm_head": ["model.embed_tokens.weight"]}
    other = tied()
    load(other, tmp_path)
    assert same_bits(output(other, inputs), expected)
    apart = FAMILIES["Llama"].model("ForCausalLM")
    with (
        unchanged(apart),
        pytest.raises(AdapterFileError, match=r"shared with model\.embed_tokens"),
    ):
        load(apart, tmp_path)
    put(apart, train_also=["lm_head"]).save(tmp_path)
    other = tied()
    with unchanged(other), pytest.raises(AdapterFileError, match="were shared with nothing"):
        load(other, tmp_path)


def test_saving_over_an_adapter_replaces_it(llama, tmp_path):
    put(llama, "lora", 4, name="big").save(tmp_path)
    adapter = put(llama, "cp", 1, name="small")
    adapter.save(tmp_path)
    assert os.listdir(tmp_path) == [FILE]
    loaded = load(FAMILIES["Llama"].model("ForCausalLM"), tmp_path)
    assert loaded.name == "small"
    assert loaded.count() == adapter.count()


def test_the_error_is_a_value_error():
    assert issubclass(AdapterFileError, ValueError)
