"""LoRA files: exported exactly, fit for every consumer, and read back."""

import importlib
import json
import os
import re
import time
import warnings
from contextlib import suppress

import peft
import pytest
import torch
from harness import close, each_format, examples, output, put, same_bits, unchanged
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, each_family
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lortalib
from lortalib.nn import AdapterFileError, adapters, export_lora, load, load_lora
from lortalib.nn._files import lora_config, read
from lortalib.nn._files.lora_config import Scaling
from lortalib.nn._files.lora_file import open_lora

# The ranks that vLLM 0.33 allows, read in its source.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def complaints(folder):
    """What vLLM's check of the configuration, llama.cpp's converter and TGI would object to."""
    config, tensors = config_of(folder), tensors_of(folder)
    found = [
        key
        for key in ("use_dora", "lora_bias", "layer_replication", "rank_pattern", "alpha_pattern")
        if config.get(key)
    ]
    found += [key for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]
    if config["bias"] != "none" or config["modules_to_save"] or config["use_rslora"]:
        found.append("bias, modules_to_save or use_rslora")
    if config["init_lora_weights"] is not True:
        found.append("init_lora_weights")
    # llama.cpp scales by alpha over the rank of each tensor, TGI stacks layers: one rank for all.
    if config["lora_alpha"] != config["r"]:
        found.append("alpha")
    modules = {key.rpartition(".lora_")[0] for key in tensors}
    for name in modules:
        a, b = (tensors.get(f"{name}.lora_{side}.weight") for side in "AB")
        if a is None or b is None or len(a) != config["r"] or b.shape[1] != config["r"]:
            found.append(name)
    if {f"{m}.lora_{s}.weight" for m in modules for s in "AB"} != set(tensors):
        found.append("other tensors")
    # The names that vLLM and the converter of llama.cpp strip before they look for the module.
    found += [key for key in tensors if not key.startswith("base_model.model.")]
    if config["r"] > max(VLLM_RANKS):
        found.append("rank")
    return found


def loaded_by_peft(family, folder, kind="Model"):
    model = family.model(kind)
    return peft.PeftModel.from_pretrained(model, folder).eval()


@each_family
def test_peft_computes_what_the_adapter_did(family, tmp_path):
    model, inputs = family.model(), family.inputs()
    adapter = put(model, "cp", targets="qkvo", alpha=0.7)
    with unchanged(model):
        assert adapter.export_lora(tmp_path) == tmp_path
    expected = output(model, inputs)
    adapter.disable()
    assert not close(output(model, inputs), expected, 1e-3)
    assert complaints(tmp_path) == []
    found = loaded_by_peft(family, tmp_path)
    assert close(output(found, inputs), expected)


@pytest.mark.parametrize("targets", ["qkvo", "all", "qv"])
@each_format
def test_every_format_is_exported(decomposition, targets, llama, inputs, tmp_path):
    adapter = put(llama, decomposition, targets=targets)
    adapter.export_lora(tmp_path)
    assert complaints(tmp_path) == []
    found = loaded_by_peft(FAMILIES["Llama"], tmp_path, "ForCausalLM")
    assert close(output(found, inputs), output(llama, inputs))


@pytest.mark.parametrize("name", ["GPT2", "Phi3", "GPTNeoX", "Falcon", "Bloom"])
@pytest.mark.parametrize("decomposition", ["cp", "lora"])
def test_fused_projections(name, decomposition, tmp_path):
    """Of one A where q, k and v read alike; of a block each where they do not, as in `lora`."""
    import transformers

    sizes = {
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "n_embd": 16, "n_layer": 2, "n_head": 4, "intermediate_size": 24, "pad_token_id": 0,
        "max_position_embeddings": 64,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes)

    def made():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}Model")(config).eval()

    model, ids = made(), {"input_ids": torch.arange(5, 19).view(2, 7)}
    adapter = put(model, decomposition, 2)
    adapter.export_lora(tmp_path)
    fused = any(site.rows is not None for site in adapter.sites)
    assert fused
    assert config_of(tmp_path)["r"] == (2 if decomposition == "cp" else 6)
    assert config_of(tmp_path)["fan_in_fan_out"] == (name == "GPT2")
    found = peft.PeftModel.from_pretrained(made(), tmp_path).eval()
    assert close(output(found, ids), output(model, ids))


class Torch(nn.Module):
    """Two layers of torch's own attention, whose weights are read without calling them."""

    def __init__(self):
        super().__init__()
        made = [nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(nn.ModuleDict({"attention": layer}) for layer in made)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["attention"](x, x, x, need_weights=False)[0]
        return (x,)


@pytest.mark.parametrize("decomposition", ["cp", "lora"])
def test_multihead_attention_of_torch(decomposition, tmp_path):
    """Its output projection is refused: PEFT 0.21 adds a LoRA on it twice."""

    def made():
        torch.manual_seed(0)
        return Torch().eval()

    model, x = made(), {"x": torch.randn(2, 5, 16)}
    whole = put(model, decomposition)
    with pytest.raises(ValueError, match="adds a pair twice"):
        whole.export_lora(tmp_path)
    whole.remove()
    put(model, decomposition, targets="qkv").export_lora(tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["attention"]
    found = peft.PeftModel.from_pretrained(made(), tmp_path).eval()
    assert close(output(found, x), output(model, x))
    assert not close(output(made(), x), output(model, x), 1e-3)


def test_a_head_that_trained_beside_it_goes_along(tmp_path):
    family = FAMILIES["Bert"]
    model, inputs = family.model("ForSequenceClassification"), family.inputs()
    adapter = put(model, train_also=["classifier"])
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(3))
    adapter.export_lora(tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["classifier"]
    assert config_of(tmp_path)["task_type"] == "SEQ_CLS"
    found = loaded_by_peft(family, tmp_path, "ForSequenceClassification")
    assert close(output(found, inputs), output(model, inputs))


def test_some_layers_are_named_in_full(llama, inputs, tmp_path):
    put(llama, layers=1).export_lora(tmp_path)
    assert all("layers.1." in name for name in config_of(tmp_path)["target_modules"])
    found = loaded_by_peft(FAMILIES["Llama"], tmp_path, "ForCausalLM")
    assert close(output(found, inputs), output(llama, inputs))
    assert len(tensors_of(tmp_path)) == 8


def test_all_layers_are_named_in_short(llama, tmp_path):
    put(llama).export_lora(tmp_path)
    names = config_of(tmp_path)["target_modules"]
    assert names == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_what_has_no_pair_is_refused(tmp_path):
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    adapter = put(transformers.MixtralModel(config), targets="all")
    with pytest.raises(ValueError, match="packs experts; a LoRA file has no pair"):
        adapter.export_lora(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_no_reader_takes_is_not_exported(llama, tmp_path):
    adapter = put(llama, "cp", train_also=["lm_head"])
    adapter.export_lora(tmp_path)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for tensor, name in (
        (adapter.networks["layers"].in_r, "lora_A"),
        (adapter.networks["layers"].out_r, "lora_B"),
        (llama.lm_head.weight, "lm_head.weight"),
    ):
        with torch.no_grad():
            before = tensor[0, 0].item()
            tensor[0, 0] = float("nan")
        message = f"{name}.* holds NaN or infinity, so adapter 'default' was not exported; nothing"
        with unchanged(llama), pytest.raises(ValueError, match=message):
            adapter.export_lora(tmp_path)
        with torch.no_grad():
            tensor[0, 0] = before
    with torch.no_grad():  # finite, but their product is not
        adapter.networks["layers"].layer_r.fill_(3e38)
        adapter.networks["layers"].head_r.fill_(3e38)
    with pytest.raises(ValueError, match="NaN or infinity, so adapter"):
        adapter.export_lora(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


# Modules whose weight is another module's too


def tied_llama():
    return FAMILIES["Llama"].model("ForCausalLM", tie_word_embeddings=True)


def moved(model, path):
    with torch.no_grad():
        weight = model.get_submodule(path).weight
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    return model


@pytest.mark.parametrize(
    ("name", "kind", "module"),
    [("Llama", "ForCausalLM", "lm_head"), ("T5", "ForConditionalGeneration", "shared")],
)
def test_a_trained_module_with_anothers_weight_is_refused(name, kind, module, tmp_path):
    """PEFT would give it a weight of its own, and the other module would keep the base's."""
    family = FAMILIES[name]
    model = family.model(kind, tie_word_embeddings=True)
    adapter = put(model, train_also=[module])
    message = rf"the module '{module}', trained .*, holds the same weight as .*\.weight"
    with unchanged(model), pytest.raises(ValueError, match=message):
        adapter.export_lora(tmp_path / "out")
    folder = adapter.save(tmp_path / "own")
    with pytest.raises(ValueError, match=message):
        export_lora(read(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trained_modules_that_hold_one_weight_together(inputs, tmp_path):
    model = tied_llama()
    adapter = put(model, train_also=["lm_head", "embed_tokens"])
    expected = output(moved(model, "lm_head"), inputs)
    adapter.export_lora(tmp_path)
    found = peft.PeftModel.from_pretrained(tied_llama(), tmp_path).eval()
    assert close(output(found, inputs), expected)
    again = tied_llama()
    load_lora(again, tmp_path)
    assert close(output(again, inputs), expected)


def test_without_a_model_nobody_knows_what_is_tied(llama, tmp_path):
    adapter = put(llama, train_also=["lm_head"])
    adapter.remove()
    with pytest.warns(UserWarning, match="can only be told with the model"):
        export_lora(adapter, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_lora(adapter, tmp_path / "b", llama)
        export_lora(read(put(llama, train_also=["lm_head"]).save(tmp_path / "c")), tmp_path / "d")


def test_a_lora_that_trained_a_tied_head_is_read_exactly_or_refused(inputs, tmp_path):
    options = {"target_modules": ["q_proj"], "init_lora_weights": False}
    lora = peft.LoraConfig(r=2, modules_to_save=["lm_head"], **options)
    theirs = peft.get_peft_model(tied_llama(), lora).eval()
    theirs.save_pretrained(tmp_path / "same")
    model = tied_llama()
    load_lora(model, tmp_path / "same")
    assert close(output(model, inputs), output(theirs, inputs))
    moved(theirs, "base_model.model.lm_head.modules_to_save.default")
    theirs.save_pretrained(tmp_path / "moved")
    model = tied_llama()
    message = r"lm_head\.weight, whose weight is model\.embed_tokens\.weight's too"
    with unchanged(model), pytest.raises(AdapterFileError, match=message):
        load_lora(model, tmp_path / "moved")
    apart = FAMILIES["Llama"].model("ForCausalLM")
    load_lora(apart, tmp_path / "moved")
    with torch.no_grad():
        apart.model.embed_tokens.weight.copy_(tied_llama().model.embed_tokens.weight)
    assert close(output(apart, inputs), output(theirs, inputs))


# An export that is interrupted

STEPS = ["os.replace", "os.fsync", "os.link", "lortalib.nn._files.export_lora.write_tensors"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("place", STEPS)
def test_an_export_that_stops_leaves_the_old_or_the_new(
    llama, tmp_path, monkeypatch, place, calls, behind, error
):
    def files(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    put(llama, "cp", 2).export_lora(tmp_path)
    adapter = put(llama, "cp", 3, name="new")
    adapter.export_lora(tmp_path / "new")
    old, new = files(tmp_path), files(tmp_path / "new")
    module, _, name = place.rpartition(".")
    module = importlib.import_module(module)
    function, count = getattr(module, name), iter(range(1000))

    def stop(*arguments, **options):
        now = next(count) == calls
        if now and not behind:
            raise error("stop")
        result = function(*arguments, **options)
        if now:
            raise error("stop")
        return result

    with monkeypatch.context() as patched, unchanged(llama):
        patched.setattr(module, name, stop)
        with suppress(error):
            adapter.export_lora(tmp_path)
    assert files(tmp_path) in (old, new)
    with open_lora(tmp_path) as opened:
        opened.read()
    assert sorted(os.listdir(tmp_path)) == [*sorted(old), "new"]


def test_files_of_two_exports_are_told_apart(llama, tmp_path):
    """What a process that is killed between the two renames leaves."""
    put(llama, "cp", 2).export_lora(tmp_path / "one")
    put(llama, "cp", 3, name="b").export_lora(tmp_path / "two")
    config = (tmp_path / "one" / "adapter_config.json").read_bytes()
    (tmp_path / "two" / "adapter_config.json").write_bytes(config)
    other = FAMILIES["Llama"].model("ForCausalLM")
    with unchanged(other), pytest.raises(AdapterFileError, match="of two exports, or edited"):
        load_lora(other, tmp_path / "two")


def edit(folder, **changes):
    """Other values in the configuration."""
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **changes}))
    return folder


def test_the_name_of_the_base_may_be_edited(llama, tmp_path):
    put(llama).export_lora(tmp_path)
    edit(tmp_path, base_model_name_or_path="someone/else", inference_mode=False)
    load_lora(llama, tmp_path, name="again")
    edit(tmp_path, lora_alpha=5)
    with pytest.raises(AdapterFileError, match="not as lortalib wrote them"):
        load_lora(llama, tmp_path, name="more")
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"format", "lortalib", "lortalib_sha256"}


# Import


def trained(family, kind="Model", **options):
    """A model of PEFT with a LoRA of random numbers."""
    model = family.model(kind)
    names = sorted({site.path for site in lortalib.nn.sites(model)})
    options = {"target_modules": names, "r": 3, "lora_alpha": 5, **options}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return peft.get_peft_model(
            model, peft.LoraConfig(init_lora_weights=False, **options)
        ).eval()


@each_family
def test_a_lora_of_peft_is_read_exactly(family, tmp_path):
    theirs, inputs = trained(family), family.inputs()
    expected = output(theirs, inputs)
    theirs.save_pretrained(tmp_path)
    model = family.model()
    base = output(model, inputs)
    adapter = load_lora(model, tmp_path)
    assert adapter.config.decomposition == "lora"
    assert close(output(model, inputs), expected)
    assert not close(base, expected, 1e-3)
    adapter.disable()
    assert same_bits(output(model, inputs), base)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 1, "layers.1.self_attn.v_proj": 5}},
        {"alpha_pattern": {"o_proj": 11}, "rank_pattern": {"o_proj": 2}},
        {"target_modules": "all-linear"},
        {"target_modules": ["down_proj", "q_proj"]},
        {"target_modules": ["lm_head", "v_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    ],
)
def test_variants_of_lora(options, inputs, tmp_path):
    family = FAMILIES["Llama"]
    theirs = trained(family, "ForCausalLM", **options)
    expected = output(theirs, inputs)
    theirs.save_pretrained(tmp_path / "lora")
    model = family.model("ForCausalLM")
    adapter = load_lora(model, tmp_path / "lora")
    assert close(output(model, inputs), expected)
    # There and back, in both kinds of files.
    adapter.save(tmp_path / "own")
    adapter.export_lora(tmp_path / "again")
    other = family.model("ForCausalLM")
    load(other, tmp_path / "own")
    assert close(output(other, inputs), expected)
    assert close(
        output(loaded_by_peft(family, tmp_path / "again", "ForCausalLM"), inputs), expected
    )


def test_it_trains_on_and_merges(inputs, tmp_path):
    family = FAMILIES["Llama"]
    trained(family, "ForCausalLM").save_pretrained(tmp_path)
    model = family.model("ForCausalLM")
    adapter = load_lora(model, tmp_path)
    model(**inputs)[0].square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    expected = output(model, inputs)
    adapter.merge()
    assert close(output(model, inputs), expected)


def test_saved_modules_come_along(tmp_path):
    family = FAMILIES["Bert"]
    theirs = trained(family, "ForSequenceClassification", modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in theirs.classifier.modules_to_save.parameters():
            parameter.normal_()
    expected = output(theirs, family.inputs())
    theirs.save_pretrained(tmp_path)
    model = family.model("ForSequenceClassification")
    load_lora(model, tmp_path)
    assert close(output(model, family.inputs()), expected)


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "all"}, "trains biases"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "no side of a linear map"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_low_rank_pair_is_refused(what, llama, tmp_path):
    options, message = REFUSED[what]
    trained(FAMILIES["Llama"], "ForCausalLM", **options).save_pretrained(tmp_path)
    with unchanged(llama), pytest.raises(AdapterFileError, match=message):
        load_lora(llama, tmp_path)


VARIANTS = {
    "target_parameters": ["experts"], "layer_replication": [[0, 1]], "lora_bias": True,
    "trainable_token_indices": [1], "use_qalora": True, "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1}, "kasa_config": {"beta": 1}, "monteclora_config": {"x": 1},
    "use_bdlora": {"x": 1},
}  # fmt: skip


@pytest.fixture
def theirs(tmp_path):
    """A folder that PEFT wrote, without lortalib's digest."""
    trained(FAMILIES["Llama"], "ForCausalLM").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("key", VARIANTS)
def test_other_methods_of_the_same_file_are_refused(key, theirs, llama):
    edit(theirs, **{key: VARIANTS[key]})
    with unchanged(llama), pytest.raises(AdapterFileError, match=f"has {key}: "):
        load_lora(llama, theirs)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(start, theirs, llama):
    edit(theirs, init_lora_weights=start)
    with unchanged(llama), pytest.raises(AdapterFileError, match="changes the base's weights"):
        load_lora(llama, theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": value}
        for value in (None, "8", True, [8], 10**400, float("nan"), float("inf"), 1e300)
    ]
    + [{"lora_dropout": value} for value in (7, 1.0, -0.1, float("nan"), "0", [])]
    + [{"r": value} for value in (0, -1, 2.5, "3", None, True)]
    + [{"alpha_pattern": value} for value in (["a"], 5, {"q_proj": None}, {"q_proj": "1"})]
    + [{"alpha_pattern": {"q_proj": float("nan")}}, {"alpha_pattern": {"": 1}}]
    + [{"alpha_pattern": {name: 1}} for name in ("(", "q.*", "[a]", "a|b", "(([a-z_.0-9])+)+!")]
    + [{"rank_pattern": value} for value in (["a"], 5, {"q_proj": None})]
    + [{"modules_to_save": value} for value in (5, [5], [""], [None], {"a": 1})]
    + [{"modules_to_save": ["q_proj"]}, {"modules_to_save": ["self_attn"]}]
    + [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["rotary_emb"]}]
    + [{"use_rslora": "yes"}, {"bias": 5}, {"bias": "all"}, {"peft_type": 3}, {"peft_type": None}],
)
def test_odd_configurations_are_refused(changes, theirs, llama):
    edit(theirs, **changes)
    with unchanged(llama), pytest.raises(AdapterFileError):
        load_lora(llama, theirs)


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "{", "[" * 100_000, '{"peft_type": "LORA", "peft_type": "LORA"}']
)
def test_configurations_that_are_none(text, theirs, llama):
    (theirs / "adapter_config.json").write_text(text)
    with unchanged(llama), pytest.raises(AdapterFileError):
        load_lora(llama, theirs)
    (theirs / "adapter_config.json").write_bytes(b"\xff")
    with pytest.raises(AdapterFileError, match="damaged"):
        lora_config(theirs)


def test_a_configuration_of_any_length_costs_no_time(theirs, llama):
    (theirs / "adapter_config.json").write_text('{"peft_type": "' + "x" * 50_000_000 + '"}')
    start = time.monotonic()
    with pytest.raises(AdapterFileError, match="more than 16,777,216 bytes"):
        load_lora(llama, theirs)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (a[:0], b[:, :0]), "is not whole"),
        (lambda a, b: (a[:2], b), "is not whole"),
        (lambda a, b: (a.to(torch.complex64), b), "is of type C64"),
        (lambda a, b: (a.to(torch.float8_e5m2), b), "is of type F8_E5M2"),
        (lambda a, b: (a.int(), b), "no pair's numbers"),
        (lambda a, b: (a[None], b), "is no side of a linear map's pair"),
        (lambda a, b: (a * 0 + 3e38, b * 0 + 3e38), "is beyond float32"),
        (lambda a, b: (a.double() * 0 + 1e300, b), "is beyond float32"),
    ],
)
def test_odd_pairs_are_refused(change, message, theirs, llama):
    file = theirs / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_A" in key)
    a, b = change(tensors[key], tensors[key.replace("lora_A", "lora_B")])
    changed = {key: a.contiguous(), key.replace("lora_A", "lora_B"): b.contiguous()}
    save_file({**tensors, **changed}, file)
    with unchanged(llama), pytest.raises(AdapterFileError, match=message):
        load_lora(llama, theirs)


def test_tensors_beside_the_pairs(theirs, llama):
    file, name = theirs / "adapter_model.safetensors", "base_model.model.lm_head.weight"
    tensors = load_file(file)
    save_file({**tensors, name: llama.lm_head.weight.data.clone()}, file)  # as PEFT may write it
    load_lora(llama, theirs).remove()
    for value, message in (
        (torch.zeros(64, 16), "holds other values of 'lm_head.weight' than the model"),
        (torch.zeros(3), "holds the tensor 'lm_head.weight', which is no pair"),
    ):
        save_file({**tensors, name: value}, file)
        with unchanged(llama), pytest.raises(AdapterFileError, match=message):
            load_lora(llama, theirs)
    key = next(iter(tensors))
    save_file({**tensors, key.removeprefix("base_model.model."): tensors[key].clone()}, file)
    with unchanged(llama), pytest.raises(AdapterFileError, match="which are the same"):
        load_lora(llama, theirs)


WORDS = st.lists(st.sampled_from(["a", "b", "ab", "0", "q_proj"]), min_size=1, max_size=4)


@given(
    path=WORDS.map(".".join),
    names=st.lists(WORDS.flatmap(lambda w: st.sampled_from([".".join, "_".join]).map(
        lambda join: join(w))), max_size=4),
    marks=st.lists(st.sampled_from(["{}", "^{}", "{}$", "^{}$"]), min_size=4, max_size=4),
    escaped=st.booleans(),
)  # fmt: skip
@examples(400)
def test_names_in_patterns_mean_what_they_mean_to_peft(path, names, marks, escaped):
    patterns = {}
    for number, (name, mark) in enumerate(zip(names, marks)):
        name = re.escape(name).replace("_", "_") if escaped else name
        patterns[mark.format(name)] = number + 10
    expected = patterns.get(get_pattern_key(list(patterns), path), 1)
    assert Scaling({"lora_alpha": 1, "alpha_pattern": patterns})(path, 1) == expected


def test_the_configuration_alone(llama, tmp_path):
    put(llama, "cp", 3).export_lora(tmp_path)
    assert lora_config(tmp_path)["r"] == 3
    assert lora_config(str(tmp_path)) == config_of(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        lora_config(tmp_path / "nowhere")


def test_other_models_and_damaged_files_are_refused(llama, tmp_path):
    trained(FAMILIES["Llama"], "ForCausalLM").save_pretrained(tmp_path)
    bert = FAMILIES["Bert"].model()
    with unchanged(bert), pytest.raises(AdapterFileError, match="which the model does not have"):
        load_lora(bert, tmp_path)
    wide = FAMILIES["Llama"].model("ForCausalLM", hidden_size=32)
    with (
        unchanged(wide),
        pytest.raises(AdapterFileError, match="of a 8 x 16 matrix; the model's is 16 x 32"),
    ):
        load_lora(wide, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with unchanged(llama), pytest.raises(AdapterFileError, match="is not whole"):
        load_lora(llama, tmp_path)
    save_file({**tensors, key: tensors[key] * float("nan")}, file)
    with unchanged(llama), pytest.raises(AdapterFileError, match="NaN or infinity"):
        load_lora(llama, tmp_path)
    file.write_bytes(file.read_bytes()[:50])
    with unchanged(llama), pytest.raises(AdapterFileError, match="damaged"):
        load_lora(llama, tmp_path)
    file.unlink()
    with unchanged(llama), pytest.raises(FileNotFoundError, match="no adapter_model"):
        load_lora(llama, tmp_path)


def test_an_adapter_of_ours_is_no_lora(llama, tmp_path):
    put(llama).save(tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter_config"):
        load_lora(llama, tmp_path, name="other")


def test_export_reads_the_cut_of_a_bank_of_layers_once(llama, tmp_path):
    """The pairs come from the parameters as they are, not as they were at the last forward."""
    adapter = put(llama)
    export_lora(adapter, tmp_path / "one")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.5)
    export_lora(adapter, tmp_path / "two")
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    key = next(key for key in one if "lora_B" in key)
    assert not torch.equal(one[key], two[key])
    assert len(adapters(llama)) == 1
