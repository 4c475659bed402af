"""LoRA files: exported exactly, fit for every consumer, and read back."""

import warnings

import peft
import pytest
import torch
from adapted import close, output, put, unchanged
from lora_files import complaints, config_of, edit, loaded_by_peft, tensors_of
from models import FAMILIES, each_family
from safetensors import safe_open
from torch import nn

import lortalib
from lortalib.nn import AdapterFileError, adapters, export_lora, load_lora
from lortalib.nn._files import read


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


@pytest.mark.parametrize(
    ("name", "kind", "also"),
    [
        ("Bert", "ForSequenceClassification", []),
        ("Bert", "ForTokenClassification", []),
        ("Bert", "ForQuestionAnswering", []),
        ("Roberta", "ForSequenceClassification", ["classifier.out_proj"]),
        ("Qwen3", "ForSequenceClassification", []),
    ],
)
def test_a_head_that_did_not_train_is_the_models_own(name, kind, also, tmp_path):
    """PEFT looks for the whole head in the file of every task that it knows to have one."""
    family = FAMILIES[name]
    model, inputs = family.model(kind), family.inputs()
    put(model, train_also=also).export_lora(tmp_path)
    found = loaded_by_peft(family, tmp_path, kind)
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


def test_the_name_of_the_base_may_be_edited(llama, tmp_path):
    put(llama).export_lora(tmp_path)
    edit(tmp_path, base_model_name_or_path="someone/else", inference_mode=False)
    load_lora(llama, tmp_path, name="again")
    edit(tmp_path, lora_alpha=5)
    with pytest.raises(AdapterFileError, match="not as lortalib wrote them"):
        load_lora(llama, tmp_path, name="more")
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"format", "lortalib", "lortalib_sha256"}


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


def test_a_lora_is_not_written_over_an_adapter(llama, tmp_path):
    adapter = put(llama)
    lortalib.nn.convert(adapter.save(tmp_path / "own"), tmp_path / "peft")
    before = {file.name: file.read_bytes() for file in (tmp_path / "peft").iterdir()}
    with pytest.raises(FileExistsError, match="holds an adapter of lortalib"):
        adapter.export_lora(tmp_path / "peft")
    assert {file.name: file.read_bytes() for file in (tmp_path / "peft").iterdir()} == before
    with pytest.raises(ValueError, match=r"\*\.gguf"):
        lortalib.nn.export_gguf(adapter, tmp_path / "own" / "adapter.safetensors", llama)
    adapter.export_lora(tmp_path / "lora")
    adapter.export_lora(tmp_path / "lora")


def test_norms_of_float16_factors(llama):
    adapter = lortalib.nn.apply(llama, "cp", rank=2, dtype=torch.float16)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    site = adapter.sites[0]
    whole = adapter.norms(site).square().sum().sqrt()
    assert whole.item() == pytest.approx(adapter.delta(site).double().norm().item(), rel=0.05)
