"""LoRA files: exported exactly, fit for every consumer, and read back."""

import json

import peft
import pytest
import torch
from harness import close, each_format, output, put, same_bits, unchanged
from models import FAMILIES, each_family
from safetensors.torch import load_file, save_file
from torch import nn

import lortalib
from lortalib.nn import AdapterFileError, adapters, export_lora, load, load_lora

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
