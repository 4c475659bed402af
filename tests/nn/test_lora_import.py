"""LoRAs of PEFT on a model: read exactly, or refused whatever is in their files."""

import re
import time

import peft
import pytest
import torch
from adapted import close, output, put, same_bits, unchanged
from hypothesis import example, given
from hypothesis import strategies as st
from lora_files import config_of, edit, loaded_by_peft
from models import FAMILIES, each_family
from peft.utils.other import get_pattern_key
from safetensors.torch import load as tensors_in
from safetensors.torch import save_file
from strategies import examples

import lortalib
from lortalib.nn import AdapterFileError, load, load_lora
from lortalib.nn._files import lora_config
from lortalib.nn._files.lora_config import Scaling


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


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_pair_with_one_side_is_refused(rank, side, llama, tmp_path):
    trained(FAMILIES["Llama"], "ForCausalLM", r=rank).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = tensors_in(file.read_bytes())
    lost = next(key for key in tensors if side in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, file)
    with unchanged(llama), pytest.raises(AdapterFileError, match="is not whole"):
        load_lora(llama, tmp_path)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_dropout_of_a_lora_goes_on(dropout, tmp_path):
    trained(FAMILIES["Llama"], lora_dropout=dropout).save_pretrained(tmp_path)
    assert load_lora(FAMILIES["Llama"].model(), tmp_path).dropout == dropout


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


@pytest.mark.parametrize("layers", ["01", "0", "1"])
def test_modules_that_hold_one_weight_keep_their_own_pairs(layers, tmp_path):
    def tied():
        model = FAMILIES["Llama"].model()
        one, two = (layer.self_attn.q_proj for layer in model.layers)
        two.weight = one.weight
        return model

    targets = rf"layers\.[{layers}]\.self_attn\.q_proj"
    lora = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    theirs, inputs = peft.get_peft_model(tied(), lora).eval(), FAMILIES["Llama"].inputs()
    theirs.save_pretrained(tmp_path)
    model = tied()
    load_lora(model, tmp_path)
    assert close(output(model, inputs), output(theirs, inputs))


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
    tensors = tensors_in(file.read_bytes())
    key = next(key for key in tensors if "lora_A" in key)
    a, b = change(tensors[key], tensors[key.replace("lora_A", "lora_B")])
    changed = {key: a.contiguous(), key.replace("lora_A", "lora_B"): b.contiguous()}
    save_file({**tensors, **changed}, file)
    with unchanged(llama), pytest.raises(AdapterFileError, match=message):
        load_lora(llama, theirs)


def test_tensors_beside_the_pairs(theirs, llama):
    file, name = theirs / "adapter_model.safetensors", "base_model.model.lm_head.weight"
    tensors = tensors_in(file.read_bytes())
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


@st.composite
def paths_and_patterns(draw):
    """A path, and names that are ends of it or nearly so, as a configuration may write them."""
    path = ".".join(
        draw(st.lists(st.sampled_from(["a", "ab", "0", "v_proj"]), min_size=1, max_size=4))
    )
    patterns = {}
    for value in range(10, 10 + draw(st.integers(0, 3))):
        name = path[draw(st.integers(0, len(path) - 1)) :]
        name = name.replace(
            *draw(st.sampled_from([("x", "x"), ("_", "."), (".", "_"), ("a", ".")]))
        )
        name = re.escape(name) if draw(st.booleans()) else name
        mark = draw(st.sampled_from(["{}", "{}", "{}", "^{}", "{}$", "^{}$"]))
        patterns[mark.format(name)] = value
    return path, patterns


@given(case=paths_and_patterns())
@example(case=("ab", {"b": 10}))
@example(case=("a.b", {"^b": 10}))
@examples(400)
def test_names_in_patterns_mean_what_they_mean_to_peft(case):
    path, patterns = case
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
    tensors = tensors_in(file.read_bytes())
    key = next(iter(tensors))
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
