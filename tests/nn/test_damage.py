"""Loading what does not fit or is damaged: refused with the reason, and nothing is changed."""

import json

import peft
import pytest
import torch
from adapted import put, unchanged
from models import FAMILIES
from safetensors.torch import load as tensors_in
from safetensors.torch import save_file
from saved_files import FILE, description, edit
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import lortalib
from lortalib.nn import AdapterFileError, load, load_lora
from lortalib.nn._files.tensors import open_tensors
from lortalib.nn._files.upgrades import UPGRADES, upgrade

LLAMA_FAMILY = FAMILIES["Llama"]


@pytest.fixture
def saved(llama, tmp_path):
    put(llama, "tt", name="saved", train_also=["lm_head"]).save(tmp_path)
    return tmp_path


@pytest.fixture
def target():
    """A model to load onto that has an adapter already."""
    model = LLAMA_FAMILY.model("ForCausalLM")
    put(model, name="other", seed=1).merge()
    return model


def test_a_file_that_cannot_be_read_is_not_called_damaged(saved, target, monkeypatch):
    """As with a disk that fails, or without the right to read."""
    lora = lortalib.nn.adapters(target)["other"].export_lora(saved / "lora")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("lortalib.nn._files.folder.parse_json", fail)
    with unchanged(target), pytest.raises(AdapterFileError, match=r"config\.json cannot be read: "):
        load_lora(target, lora)
    monkeypatch.setattr("lortalib.nn._files.tensors.TensorFile.__init__", fail)
    refuses(target, saved, r"adapter\.safetensors cannot be read: .*Input/output error")


def refuses(model, folder, message, error=AdapterFileError):
    with unchanged(model), pytest.raises(error, match=message):
        load(model, folder)


# Other models


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"hidden_size": 24},
            r"does not fit LlamaForCausalLM; nothing was changed:\n  layers layer 0 q: heads, "
            r"query heads, head_dim, width are \(4, 4, 4, 16\) in the file, \(4, 4, 6, 24\) in the"
            r"(.|\n)*\.\.\. and 3 more",
        ),
        ({"num_hidden_layers": 1}, r"layers layer 1 q: the model has no such projection"),
        ({"num_attention_heads": 2}, r"\(2, 2, 8, 16\) in the model"),
        ({"num_key_value_heads": 4}, r"layer 0 k: .* \(2, 4, 4, 16\) in .*, \(4, 4, 4, 16\) in"),
        ({"num_key_value_heads": 1}, r"layer 0 v: .* \(1, 4, 4, 16\) in the model"),
        ({"head_dim": 8}, r"\(4, 4, 8, 16\) in the model"),
    ],
)
def test_a_llama_of_another_shape(llama, tmp_path, changed, message):
    put(llama).save(tmp_path)
    refuses(LLAMA_FAMILY.model("ForCausalLM", **changed), tmp_path, message)


@pytest.mark.parametrize("name", ["Bert", "OPT", "T5", "CLIP"])
def test_another_architecture(llama, tmp_path, name):
    llama.config._name_or_path = "someone/tiny-llama"
    put(llama).save(tmp_path)
    model = FAMILIES[name].model()
    message = (
        rf"trained on LlamaForCausalLM someone/tiny-llama\) does not fit {type(model).__name__}"
    )
    refuses(model, tmp_path, message)


def test_a_model_with_more_layers_takes_it(llama, tmp_path):
    put(llama).save(tmp_path)
    assert len(load(LLAMA_FAMILY.model(num_hidden_layers=3), tmp_path).sites) == 8


def test_a_model_without_attention(llama, tmp_path):
    put(llama).save(tmp_path)
    refuses(torch.nn.Linear(2, 2), tmp_path, "no attention was found in Linear", ValueError)


def test_a_module_trained_beside_it_that_is_missing_or_unlike(saved):
    message = r"trained beside the module 'lm_head', which LlamaModel does not have"
    refuses(LLAMA_FAMILY.model(), saved, message)
    message = r"'lm_head' saved with the adapter holds .*\(64, 16\).* the model's .*\(80, 16\)"
    refuses(LLAMA_FAMILY.model("ForCausalLM", vocab_size=80), saved, message)


def test_a_linear_map_of_another_size(tmp_path):
    """What load_lora makes of a classifier has a role of its own, and is held against the model."""

    def bert(width, labels):
        config = BertConfig(
            vocab_size=64, hidden_size=width, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=24, num_labels=labels,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval()

    model = bert(16, 2)
    lora = peft.LoraConfig(r=2, target_modules=["classifier"], init_lora_weights=False)
    peft.get_peft_model(bert(16, 2), lora).save_pretrained(tmp_path / "lora")
    load_lora(model, tmp_path / "lora").save(tmp_path / "own")
    assert load(bert(16, 2), tmp_path / "own").sites[0].path == "classifier"
    message = r"\(1, 1, 2, 16\) in the file, \(1, 1, 5, 32\) in the model"
    refuses(bert(32, 5), tmp_path / "own", message)
    other = bert(16, 2)
    other.classifier = nn.Identity()
    refuses(other, tmp_path / "own", "the model has no such projection")


def test_a_trained_module_that_holds_a_projection_of_this_model(llama, tmp_path):
    put(llama, targets="qkvo", train_also=["lm_head"]).save(tmp_path)
    other = LLAMA_FAMILY.model("ForCausalLM")
    other.lm_head = nn.Sequential(nn.Linear(16, 16))
    refuses(other, tmp_path, "'lm_head' saved with the adapter holds")


# Missing and damaged files


def test_missing_files(target, saved):
    refuses(target, saved / "nowhere", r"no adapter\.safetensors in .*nowhere", FileNotFoundError)
    (saved / FILE).unlink()
    refuses(target, saved, r"a saved adapter is a folder with", FileNotFoundError)
    (saved / "adapter.json").write_text("{}")
    refuses(target, saved, r"in .*, beside its adapter\.json", FileNotFoundError)
    (saved / "adapter.json").unlink()
    (saved / "adapter_config.json").write_text("{}")
    refuses(target, saved, r"a LoRA with lortalib\.nn\.load_lora", FileNotFoundError)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_file_cut_short(target, saved, kept):
    (saved / FILE).write_bytes((saved / FILE).read_bytes()[:kept])
    refuses(target, saved, r"adapter\.safetensors is damaged or cut short")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is damaged: Expecting value"),
        ("{", r"is damaged"),
        ("nonsense", r"is damaged"),
        ("[]", r"does not describe a lortalib adapter"),
        ("{}", r"does not describe a lortalib adapter"),
        ('{"peft_type": "LORA"}', r"does not describe a lortalib adapter"),
        ('{"format": "lortalib adapter", "format": "x"}', "the key 'format' stands twice"),
        ('{"format": "\\ud800"}', "surrogates not allowed"),
        ('{"format": NaN}', "NaN is no number of JSON"),
        ("[" * 100_000, "nested too deep"),
        (" " * (16 * 2**20 + 1), r"more than 16,777,216 bytes"),
    ],
)
def test_a_description_that_is_none(target, saved, text, message):
    edit(saved, text=text)
    refuses(target, saved, message)


def test_a_file_of_tensors_alone(target, saved):
    values = tensors_in((saved / FILE).read_bytes())
    for metadata in (None, {"format": "pt"}):
        save_file(values, saved / FILE, metadata=metadata)
        refuses(target, saved, "it describes no adapter of lortalib")
    save_file(values, saved / FILE, metadata={"format": "pt", "of": "somebody"})
    refuses(target, saved, "it describes no adapter of lortalib")


# Versions


@pytest.mark.parametrize("version", [3, 4, 10**30])
def test_a_newer_format_version(target, saved, version):
    edit(saved, lambda d: d.update(format_version=version, new_field=1))
    refuses(
        target,
        saved,
        rf"safetensors was written by a newer lortalib \(format {version}\); update lortalib",
    )


@pytest.mark.parametrize("version", [0, -1, "1", "2", 2.0, True, None, [1]])
def test_an_unknown_format_version(target, saved, version):
    edit(saved, lambda d: d.update(format_version=version))
    refuses(target, saved, r"format version is .*; versions 1 to 2 are known")


def test_version_1_within_the_file(target, saved):
    edit(saved, lambda d: d.update(format_version=1))
    refuses(target, saved, "of format version 1, which keeps it elsewhere")


def test_a_description_beside_the_file_of_a_later_version(target, saved):
    (saved / "adapter.json").write_text(json.dumps(description(saved)))
    save_file(tensors_in((saved / FILE).read_bytes()), saved / FILE)
    refuses(target, saved, r"adapter\.json is of format version 2, which keeps it elsewhere")


def test_every_older_version_has_an_upgrade():
    assert set(UPGRADES) == {1}
    group = {
        "name": "a.b", "legs": "in r, out r, dense r, dense",
        "sites": [{"also": ["x"], "bypassed": True, "role": "q"}, None],
    }  # fmt: skip
    old = {
        "format_version": 1, "settings": {"alpha": 1}, "trained_beside": ["h"], "groups": [group],
    }  # fmt: skip
    new, names = upgrade(old, {"beside.h:weight": 1, "networks.a.r": 2})
    assert new["format_version"] == 2
    assert (new["config"], new["trained_modules"]) == ({"alpha": 1}, ["h"])
    site = {"tied_paths": ["x"], "weight_read_directly": True, "role": "q"}
    assert new["groups"][0]["sites"] == [site, None]
    assert new["groups"][0]["parameters"] == ["in_r", "out_r", "dense_r", "dense"]
    assert names == {"trained_modules.h:weight": 1, "networks.a.r": 2}
    assert old["groups"][0] is group
    assert "parameters" not in group


# The fields


@pytest.mark.parametrize(
    "key", ["name", "config", "trained_modules", "groups", "base_model", "lortalib_version"]
)
def test_a_field_that_is_missing(target, saved, key):
    edit(saved, lambda d: d.pop(key))
    refuses(target, saved, f"'{key}'")


def group(change):
    return lambda d: change(d["groups"][0])


def site(change):
    return lambda d: change(d["groups"][0]["sites"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(more=1), "unknown field 'more' of Description"),
        (lambda d: d["config"].update(more=1), "unknown field 'more' of AdapterConfig"),
        (group(lambda g: g.update(more=1)), "unknown field 'more' of SavedGroup"),
        (site(lambda s: s.update(more=1)), "unknown field 'more' of Site"),
        (lambda d: d["base_model"].update(more="1"), "unknown field 'more' of base_model"),
        (lambda d: d.update(base_model="x"), "field 'base_model' of Description is 'x'"),
        (lambda d: d["base_model"].update(name=5), "field 'base_model' of Description is {"),
        (lambda d: d["config"].update(alpha=2.0), "scaling 1 does not follow from alpha 2"),
        (lambda d: d["config"].update(alpha=2.0, init="lorta", scaling=1.5), "does not follow"),
        (lambda d: d["config"].update(alpha=0.0, scaling=0.0), "alpha must be a finite number"),
        (lambda d: d["config"].update(alpha=1e39, scaling=1e39), "alpha must be a finite number"),
        (lambda d: d["config"].update(dropout=1.0), "dropout is 1"),
        (lambda d: d["config"].update(gqa="x"), "gqa is 'x'"),
        (lambda d: d["config"].update(share_residual=1), "field 'share_residual'"),
        (lambda d: d.update(name="a.b"), "an adapter is called 'a.b'"),
        (lambda d: d.update(groups=[]), "no list of 1 to 2,000 groups"),
        (lambda d: d["groups"].append(d["groups"][0]), "two groups have one name"),
        (group(lambda g: g.update(name="training")), "no group can be called 'training'"),
        (group(lambda g: g.update(name="_modules")), "no group can be called '_modules'"),
        (group(lambda g: g.update(name="a.b")), "no group can be called 'a.b'"),
        (group(lambda g: g["sites"].append(g["sites"][3])), "twice"),
        (group(lambda g: g["layers"].append(0)), "a layer or role stands twice"),
        (group(lambda g: g.update(layers=[0, 7])), "is outside its group"),
        (group(lambda g: g.update(roles=["q"])), "is outside its group"),
        (group(lambda g: g.update(sites=[])), "has no sites, layers or roles"),
        (group(lambda g: g["modes"].update(layer=3)), "do not fit its sites"),
        (group(lambda g: g["modes"].update(out=3)), "does not fit the modes of 'layers'"),
        (group(lambda g: g["modes"].update(out=0)), "the sizes of group 'layers' are"),
        (group(lambda g: g["ranks"].update(a=2**25)), "the sizes of group 'layers' are"),
        (group(lambda g: g["ranks"].update(z=2)), "are not of its bonds"),
        (group(lambda g: g["ranks"].pop("a")), "are not of its bonds"),
        (group(lambda g: g["parameters"].pop()), "the parameters of group 'layers' are called"),
        (group(lambda g: g["parameters"].__setitem__(0, "d_out")), "lacks the tensor"),
        (group(lambda g: g.update(shared={"x": "y"})), "the shared parameters of group"),
        (group(lambda g: g.update(shared={"in_a": "y"})), "would be shared with 'y'"),
        (group(lambda g: g.update(shared={"in_a": "networks.layers.out_d"})), "would be shared"),
        (site(lambda s: s.update(path="")), "the path of a module is ''"),
        (site(lambda s: s.update(path="x" * 501)), "the path of a module is"),
        (site(lambda s: s.update(path="lm_head.0")), "holds the adapted projection 'lm_head.0'"),
        (site(lambda s: s.update(path="lm_head")), "holds the adapted projection 'lm_head'"),
        (site(lambda s: s.update(tied_paths=["lm_head"])), "holds the adapted projection"),
        (site(lambda s: s.update(fused=10**12)), "a size of site .* is above"),
        (site(lambda s: s.update(fused=12)), "has one of rows and fused"),
        (site(lambda s: s.update(rows={"offset": 0, "dims": [[16, 1]]})), "has one of rows and"),
        (
            site(lambda s: s.update(fused=16, rows={"offset": 1, "dims": [[16, 1]]})),
            "the rows of site",
        ),
        (
            site(lambda s: s.update(fused=16, rows={"offset": 0, "dims": [[8, 1]]})),
            "the rows of site",
        ),
        (
            site(lambda s: s.update(fused=16, rows={"offset": 0, "dims": [[16, 0]]})),
            "the rows of site",
        ),
        (site(lambda s: s.update(layer=-1)), "a site is"),
        (lambda d: d.update(trained_modules=["lm_head", "lm_head"]), "the trained modules are"),
        (lambda d: d.update(trained_modules=["lm_head", "lm_head.a"]), "cannot be a trained"),
        (lambda d: d.update(trained_modules=["lm_head", "other"]), "lacks the values of .*'other'"),
        (lambda d: d.update(trained_modules=[]), "'shared_weights' speaks of modules"),
        (lambda d: d.update(trained_modules=["model"]), "'model.layers.0.self_attn.q_proj'"),
    ],
)  # fmt: skip
def test_a_field_that_does_not_fit(target, saved, change, message):
    def also(value):
        if "'shared_weights'" not in message:
            value["shared_weights"] = None
        change(value)

    edit(saved, also)
    refuses(target, saved, message)


def test_share_residual_without_a_shared_factor(llama, tmp_path):
    put(llama, "cp", gqa="split").save(tmp_path)
    edit(tmp_path, lambda d: d["config"].update(share_residual=True))
    refuses(LLAMA_FAMILY.model("ForCausalLM"), tmp_path, "two networks have factors of their own")


# The tensors

NAME = "networks.layers.layer_a_b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"lacks the tensor '{NAME}'"),
        (lambda t: t.pop("trained_modules.lm_head:weight"), "lacks the values of .*'lm_head'"),
        (
            lambda t: t.update({"trained_modules.lm_head:more": torch.ones(2)}),
            "'lm_head' saved with the adapter holds .*more.* the model's holds",
        ),
        (lambda t: t.update(more=torch.ones(2)), "holds unknown tensors: 'more'"),
        (
            lambda t: t.update({f"more{k}": torch.ones(2) for k in range(100)}),
            "unknown tensors: 'more0', .* and 95 more",
        ),
        (
            lambda t: t.update({NAME: t[NAME][:, :1].contiguous()}),
            r"has the shape \(2, 1, 2\); its legs \(layer a b\) have the sizes \(2, 2, 2\)",
        ),
        (lambda t: t.update({NAME: t[NAME][0].contiguous()}), r"has the shape \(2, 2\)"),
        (lambda t: t.update({NAME: t[NAME].repeat(2, 1, 1)}), r"has the shape \(4, 2, 2\)"),
        (lambda t: t.update({NAME: t[NAME].int()}), f"factor '{NAME}' is of type I32, no numbers"),
        (lambda t: t.update({NAME: t[NAME].half()}), "of group 'layers' are of different types"),
        (lambda t: t[NAME].view(-1)[3:4].fill_(float("nan")), f"'{NAME}' holds NaN or infinity"),
        (lambda t: t["trained_modules.lm_head:weight"][0].fill_(float("inf")), "lm_head.* holds"),
    ],
)
def test_tensors_that_do_not_fit(target, saved, change, message):
    edit(saved, numbers=change)
    refuses(target, saved, message)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
@pytest.mark.parametrize("name", [NAME, "trained_modules.lm_head:weight"])
def test_numbers_that_nobody_can_check(dtype, name, target, saved):
    with open_tensors(saved / FILE) as file:
        metadata = file.metadata
    values = tensors_in((saved / FILE).read_bytes())
    save_file({**values, name: values[name].to(dtype)}, saved / FILE, metadata=metadata)
    refuses(target, saved, f"tensor '{name}' is of type .*; convert it")
