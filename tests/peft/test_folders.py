"""One kind of folder: what PEFT saved and what `Adapter.save` saved are read by the same calls."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from adapted import close, output, put, same_bits
from models import FAMILIES, GPT2, MIXTRAL, PHI3
from safetensors.torch import load_file, save_file
from wrapped_models import second, wrapped

import lortalib
from lortalib.cli import main

LLAMA = FAMILIES["Llama"]
TAKEN = [LLAMA, FAMILIES["Bert"], FAMILIES["T5"], PHI3, GPT2]
each = pytest.mark.parametrize("family", TAKEN, ids=lambda family: family.name)
each_format = pytest.mark.parametrize("decomposition", ["cp", "tucker", "tt", "lora", "lotr"])


def bits_of(adapter):
    return {name: tensor.detach() for name, tensor in adapter.networks.named_parameters()}


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(same_bits(one[name], other[name]) for name in one)


@each
@each_format
def test_what_peft_saved_is_loaded_and_read(family, decomposition, tmp_path):
    model = wrapped(family, decomposition=decomposition, alpha=0.5)
    model.save_pretrained(tmp_path)
    plain = family.model()
    adapter = lortalib.nn.load(plain, tmp_path)
    assert same_bits(output(plain, family.inputs()), output(model, family.inputs()))
    read = lortalib.nn.read(tmp_path)
    assert [site.path for site in read.sites] == [site.path for site in adapter.sites]
    equal(bits_of(read), bits_of(model.base_model.lorta_adapters["default"]))
    config = lortalib.nn.read_description(tmp_path)["config"]
    assert (config["decomposition"], config["scaling"]) == (decomposition, 0.5)


@each
@each_format
def test_both_ways_and_every_number_keeps_its_bits(family, decomposition, tmp_path):
    model = family.model()
    adapter = put(model, decomposition, alpha=0.5)
    adapter.save(tmp_path / "own")
    lortalib.nn.convert(tmp_path / "own", tmp_path / "theirs")
    lortalib.nn.convert(tmp_path / "theirs", tmp_path / "back")
    again = lortalib.nn.read(tmp_path / "back")
    equal(bits_of(again), bits_of(adapter))
    assert again.sites == adapter.sites
    opened = peft.PeftModel.from_pretrained(family.model(), tmp_path / "theirs").eval()
    assert same_bits(output(opened, family.inputs()), output(model, family.inputs()))


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "all", "layers": [1]},
        {"targets": ["q_proj", "gate_proj"], "dropout": 0.1},
        {"decomposition": "in p, out q, head q, layer matrix p q"},
        {"init": "lorta", "alpha": 3.0, "rank": 3},
        {"rank": {"r": 4}},
        {"decomposition": "tucker", "rank": {"p": 3, "q": 2, "s": 2, "t": 1, "u": 2}},
        {"decomposition": "tt", "rank": 3},
        {"acts_on": "stream", "decomposition": "indscal"},
        {"train_also": ["lm_head"]},
        {"gqa": "split"},
        {"decomposition": "tt_lora", "targets": "all"},
    ],
    ids=str,
)
def test_whatever_an_adapter_was_made_with(options, tmp_path):
    model = LLAMA.model("ForCausalLM")
    options = {"decomposition": "cp", "rank": 2, **options}
    adapter = put(model, **options)
    with torch.no_grad():
        for parameter in adapter.networks.parameters():
            parameter.add_(0.1)
        if adapter.trained_modules.paths:
            model.lm_head.weight.add_(0.1)
    adapter.save(tmp_path / "own")
    lortalib.nn.convert(tmp_path / "own", tmp_path / "theirs")
    opened = peft.PeftModel.from_pretrained(LLAMA.model("ForCausalLM"), tmp_path / "theirs").eval()
    assert same_bits(output(opened, LLAMA.inputs()), output(model, LLAMA.inputs()))
    opened.save_pretrained(tmp_path / "again")
    plain = LLAMA.model("ForCausalLM")
    lortalib.nn.load(plain, tmp_path / "again")
    assert same_bits(output(plain, LLAMA.inputs()), output(model, LLAMA.inputs()))


def test_a_weight_that_two_modules_share(tmp_path):
    def tied():
        model = LLAMA.model()
        one, two = (layer.self_attn.q_proj for layer in model.layers)
        two.weight = one.weight
        return model

    model = tied()
    adapter = put(model)
    assert any(site.tied_paths for site in adapter.sites)
    lortalib.nn.convert(adapter.save(tmp_path / "own"), tmp_path / "theirs")
    opened = peft.PeftModel.from_pretrained(tied(), tmp_path / "theirs").eval()
    assert same_bits(output(opened, LLAMA.inputs()), output(model, LLAMA.inputs()))


def test_modules_that_train_as_a_whole_and_second_adapters(tmp_path):
    model = wrapped(LLAMA, "ForCausalLM", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    second(model, target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path)
    plain = LLAMA.model("ForCausalLM")
    adapter = lortalib.nn.load(plain, tmp_path)
    assert adapter.trained_modules.paths == ("lm_head",)
    assert same_bits(output(plain, LLAMA.inputs()), output(model, LLAMA.inputs()))
    adapter.remove()
    model.set_adapter("other")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapters in its other"):
        lortalib.nn.load(plain, tmp_path)
    assert lortalib.nn.load(plain, tmp_path / "other").name == "other"


def test_a_sum_and_a_loaded_one_are_described_as_they_are(tmp_path):
    model = second(wrapped(LLAMA, "ForCausalLM"))
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both")
    model.set_adapter("both")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    plain = LLAMA.model("ForCausalLM")
    lortalib.nn.load(plain, tmp_path / "both")
    assert close(output(plain, LLAMA.inputs()), output(model, LLAMA.inputs()), 1e-6)
    again = peft.PeftModel.from_pretrained(LLAMA.model("ForCausalLM"), tmp_path / "both")
    again.save_pretrained(tmp_path / "again")
    other = LLAMA.model("ForCausalLM")
    lortalib.nn.load(other, tmp_path / "again")
    assert same_bits(output(other, LLAMA.inputs()), output(plain, LLAMA.inputs()))


def test_a_bank_takes_it(tmp_path):
    model = wrapped(LLAMA, "ForCausalLM")
    model.save_pretrained(tmp_path)
    plain = LLAMA.model("ForCausalLM")
    bank = lortalib.nn.bank(plain, "cp", 2)
    bank.add("theirs", tmp_path)
    inputs = LLAMA.inputs()
    with bank.using(["theirs"] * len(next(iter(inputs.values())))):
        assert close(output(plain, inputs), output(model, inputs), 1e-6)


def test_every_command_takes_it(tmp_path, capsys):
    base, folder, out = (str(tmp_path / name) for name in ("base", "theirs", "out"))
    LLAMA.model("ForCausalLM").save_pretrained(base)
    model = wrapped(LLAMA, "ForCausalLM")
    model.save_pretrained(folder)
    for line in (
        ["info", folder],
        ["check", folder, "--model", base],
        ["export-lora", folder, f"{out}/lora"],
        ["convert", folder, f"{out}/own"],
        ["merge", base, folder, f"{out}/merged"],
        ["merge", base, f"{out}/own", f"{out}/same"],
        ["convert", f"{out}/own", f"{out}/back"],
    ):
        assert main([*line, "--json"]) == 0, capsys.readouterr()
        assert "error" not in json.loads(capsys.readouterr().out)
    one, other = (load_file(f"{out}/{name}/model.safetensors") for name in ("merged", "same"))
    equal(one, other)
    equal(
        load_file(f"{out}/back/adapter_model.safetensors"),
        load_file(f"{folder}/adapter_model.safetensors"),
    )
    assert main(["convert", folder, f"{out}/own", "--json"]) == 1
    assert "holds adapter.safetensors already" in json.loads(capsys.readouterr().out)["error"]


def test_what_peft_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    def custom(shape, rank, **options):
        return lortalib.decomp.cp(shape, rank, **options)

    cases = [
        (MIXTRAL.model("ForCausalLM"), {"targets": "mlp"}, "packs experts"),
        (LLAMA.model(), {"targets": "all", "share_residual": True}, "share_residual"),
        (LLAMA.model(), {"decomposition": custom}, "is a function"),
    ]
    for number, (model, options, message) in enumerate(cases):
        put(model, **options).save(tmp_path / str(number))
        with pytest.raises(ValueError, match=message):
            lortalib.nn.convert(tmp_path / str(number), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def theirs(tmp_path):
    wrapped(LLAMA, "ForCausalLM").save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    file = folder / "adapter_config.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("description"), "early lortalib"),
        (lambda value: value.update(peft_type="VERA"), "another method of PEFT"),
        (lambda value: value["description"].pop("groups"), "groups"),
        (lambda value: value["description"].update(format_version=3), "newer lortalib"),
        (lambda value: value["description"]["groups"][0].update(ranks={"r": 3}), "damaged"),
        (lambda value: value["description"].update(format="other"), "damaged"),
    ],
)
def test_a_damaged_configuration_is_refused(change, message, theirs):
    edit(theirs, change)
    for call in (lortalib.nn.read, lambda folder: lortalib.nn.load(LLAMA.model(), folder)):
        with pytest.raises(lortalib.nn.AdapterFileError, match=message):
            call(theirs)


def test_tensors_that_are_no_part_of_it_are_refused(theirs):
    file = theirs / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.embed.delta": torch.ones(2)}, file)
    with pytest.raises(lortalib.nn.AdapterFileError, match=r"only PEFT reads them"):
        lortalib.nn.read(theirs)


def test_a_lora_is_still_told(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(LLAMA.model(), config).save_pretrained(tmp_path)
    with pytest.raises(lortalib.nn.AdapterFileError, match=r"lortalib\.nn\.load_lora"):
        lortalib.nn.load(LLAMA.model(), tmp_path)


def test_transformers_says_what_to_call(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    LLAMA.model("ForCausalLM").save_pretrained(base)
    model = wrapped(LLAMA, "ForCausalLM")
    model.save_pretrained(folder)
    edit(folder, lambda value: value.update(base_model_name_or_path=str(base)))
    plain = LLAMA.model("ForCausalLM")
    calls = [
        lambda: transformers.AutoModelForCausalLM.from_pretrained(folder),
        lambda: transformers.pipeline("text-generation", model=str(folder), tokenizer=object()),
        lambda: plain.load_adapter(str(folder)),
        lambda: plain.add_adapter(lortalib.peft.LortaConfig(rank=2)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"does not support .*LORTA.*use `get_peft_model`"):
            call()
    whole = tmp_path / "embedded"  # a model that was saved beside the adapter
    shutil.copytree(base, whole)
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"does not support .*LORTA"):
        transformers.AutoModelForCausalLM.from_pretrained(whole)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert same_bits(output(auto.eval(), LLAMA.inputs()), output(model, LLAMA.inputs()))


def test_there_and_back_the_file_is_the_same_and_knows_what_was_shared(tmp_path):
    model = LLAMA.model("ForCausalLM")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    adapter = put(model, train_also=["lm_head"])
    adapter.save(tmp_path / "own")
    lortalib.nn.convert(tmp_path / "own", tmp_path / "theirs")
    lortalib.nn.convert(tmp_path / "theirs", tmp_path / "back")
    known = [lortalib.nn.read_description(tmp_path / name) for name in ("own", "back")]
    assert known[0]["shared_weights"]
    assert known[0]["shared_weights"] == known[1]["shared_weights"]
    untied = LLAMA.model("ForCausalLM")
    for name in ("own", "theirs", "back"):
        with pytest.raises(lortalib.nn.AdapterFileError, match="lm_head"):
            lortalib.nn.load(untied, tmp_path / name)


def test_two_adapters_in_one_folder_are_told_apart(tmp_path):
    wrapped(LLAMA, decomposition="tt").save_pretrained(tmp_path)
    model = LLAMA.model()
    adapter = put(model, "cp")
    adapter.save(tmp_path)
    adapter.remove()
    for read in (lortalib.nn.read, lambda folder: lortalib.nn.load(model, folder)):
        with pytest.raises(lortalib.nn.AdapterFileError, match="holds two adapters"):
            read(tmp_path)
    assert lortalib.nn.read(tmp_path / "adapter.safetensors").config.decomposition == "cp"
    assert lortalib.nn.read(tmp_path / "adapter_model.safetensors").config.decomposition == "tt"


def test_a_lora_beside_an_adapter_is_no_second_adapter(tmp_path):
    adapter = put(LLAMA.model(), "cp")
    adapter.save(tmp_path)
    adapter.export_lora(tmp_path)
    assert lortalib.nn.read(tmp_path).config.decomposition == "cp"
