"""The PEFT method: everything that PEFT's users do with one, and the same numbers as lortalib.nn."""

import json
import pickle
import re
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from adapted import FORMATS, changes, close, output, picture, put, same_bits
from models import FAMILIES, each_family
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, GenerationConfig
from wrapped_models import LLAMA, factors, reloaded, second, wrapped

import lortalib
from lortalib.peft import LortaConfig, LortaLayer

# The same as lortalib.nn


@each_family
def test_it_computes_what_the_hooks_compute(family):
    theirs, ours, inputs = wrapped(family, alpha=0.7), family.model(), family.inputs()
    base = output(ours, inputs)
    adapter = put(ours, alpha=0.7)
    for (name, one), two in zip(adapter.networks.named_parameters(), factors(theirs).values()):
        one.data.copy_(two.data)
        assert factors(theirs)[name] is two
    assert same_bits(output(theirs, inputs), output(ours, inputs))
    assert not close(output(theirs, inputs), base, 1e-3)
    with theirs.disable_adapter():
        assert same_bits(output(theirs, inputs), base)
    assert theirs.get_nb_trainable_parameters()[0] == adapter.count()


@pytest.mark.parametrize("decomposition", ["cp", "tucker", "vera"])
def test_loaded_and_merged_for_good_it_computes_the_same(decomposition, tmp_path):
    model, inputs = wrapped(decomposition=decomposition), LLAMA.inputs()
    expected = output(model, inputs)
    again = reloaded(model, tmp_path)
    assert same_bits(output(again, inputs), expected)
    assert again.peft_config["default"].decomposition == decomposition
    merged = model.merge_and_unload(safe_merge=True)
    assert close(output(merged, inputs), expected, 1e-4)
    assert not any(isinstance(m, LortaLayer) for m in merged.modules())


# Targets


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({}, 8),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*layers\.1\..*(q|k)_proj"}, 2),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"layers_to_transform": [1]}, 4),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 1),
        ({"gqa": "split"}, 8),
        ({"target_modules": ("q_proj", "v_proj")}, 4),
    ],
)
def test_targets_as_peft_users_write_them(options, modules, tmp_path):
    model, inputs = wrapped(kind="ForCausalLM", **options), LLAMA.inputs()
    assert sum(isinstance(m, LortaLayer) for m in model.modules()) == modules
    expected = output(model, inputs)
    assert same_bits(output(reloaded(model, tmp_path, kind="ForCausalLM"), inputs), expected)
    assert close(output(model.merge_and_unload(), inputs), expected)


def test_all_linear_means_the_same_for_every_adapter():
    model = wrapped(kind="ForCausalLM", target_modules=["q_proj"])
    for name in ("other", "third"):
        second(model, name, target_modules="all-linear")
        assert len(model.base_model.lorta_adapters[name].sites) == 14
        assert model.peft_config[name].target_modules == wrapped(
            kind="ForCausalLM", target_modules="all-linear"
        ).peft_config["default"].target_modules  # fmt: skip


class Plain(nn.Module):
    """Nothing that a rule knows."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(7, 7)}) for _ in range(3))
        self.last = nn.Linear(7, 2)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block["fc"](x).tanh()
        return (self.last(x),)


def test_modules_that_no_rule_knows():
    torch.manual_seed(0)
    base = Plain()
    x = {"x": torch.randn(4, 5)}
    expected = output(base, x)
    names = ["first", "fc", "last"]
    config = LortaConfig(target_modules=names, rank=2, init_weights=False)
    model = peft.get_peft_model(base, config)
    shapes = [dict(g.shape) for g in model.base_model.lorta_adapters["default"].groups]
    assert sorted(shape["layer"] for shape in shapes) == [1, 1, 3]
    adapted = output(model, x)
    assert not close(adapted, expected, 1e-3)
    assert close(output(model.merge_and_unload(), x), adapted)


def test_errors_name_the_reason_and_leave_the_model_alone():
    for name in ("rank_pattern", "alpha_pattern", "target_parameters"):
        with pytest.raises(ValueError, match=f"{name} is not supported: .*"):
            LortaConfig(**{name: {"q_proj": 2}})
    assert LortaConfig(bias="none") == LortaConfig()
    with pytest.raises(TypeError, match="has no bias='all'"):
        LortaConfig(bias="all")
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        LortaConfig(alpha=0)
    for rank in (2**16 + 1, {"r": 10**9}):
        with pytest.raises(ValueError, match="rank must be at most 65,536 for every bond"):
            LortaConfig(rank=rank)
    LortaConfig(decomposition="uni_lora", rank={"r": 4, "n": 10**6})
    bad = [
        (LortaConfig(decomposition="nonsense"), "unknown decomposition 'nonsense'"),
        (LortaConfig(target_modules=["norm"]), "is not supported"),
        (LortaConfig(target_modules=["absent"]), "not found"),
        (LortaConfig(rank=0), "rank of bond"),
    ]
    for config, message in bad:
        base = LLAMA.model()
        before = picture(base)
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(base, config)
        assert changes(before, picture(base)) == []


def test_a_failing_second_adapter_leaves_the_first():
    model, inputs = wrapped(), LLAMA.inputs()
    expected = output(model, inputs)
    with pytest.raises(ValueError, match="unknown decomposition"):
        model.add_adapter("other", LortaConfig(decomposition="nonsense"))
    assert list(model.peft_config) == ["default"]
    assert same_bits(output(model, inputs), expected)


# Life of adapters


def test_two_adapters_by_turns_and_together():
    model, inputs = second(wrapped()), LLAMA.inputs()
    alone = {"default": output(model, inputs)}
    model.set_adapter("other")
    alone["other"] = output(model, inputs)
    assert not close(alone["default"], alone["other"], 1e-3)
    assert not any(p.requires_grad for p in factors(model).values())
    assert all(p.requires_grad for p in factors(model, "other").values())
    model.base_model.set_adapter(["default", "other"])
    both = output(model, inputs)
    model.merge_adapter()
    assert close(output(model, inputs), both)
    model.unmerge_adapter()
    model.set_adapter("default")
    assert same_bits(output(model, inputs), alone["default"])
    model.delete_adapter("other")
    assert list(model.base_model.lorta_adapters) == ["default"]
    assert same_bits(output(model, inputs), alone["default"])


def test_unmerging_gives_every_bit_back():
    model = second(wrapped())
    weights = [m.weight.clone() for m in model.modules() if isinstance(m, LortaLayer)]
    for names in (["default"], ["other", "default"], ["other"]):
        model.merge_adapter(names)
        assert not all(
            same_bits(m.weight, w)
            for m, w in zip((m for m in model.modules() if isinstance(m, LortaLayer)), weights)
        )
        model.unmerge_adapter()
        layers = [m for m in model.modules() if isinstance(m, LortaLayer)]
        assert all(same_bits(m.weight, w) for m, w in zip(layers, weights))


def test_a_weight_that_two_modules_share_is_merged_once():
    def tied():
        model = LLAMA.model()
        one, two = (layer.self_attn.q_proj for layer in model.layers)
        two.weight = one.weight
        return model

    inputs = LLAMA.inputs()
    model = peft.get_peft_model(tied(), LortaConfig(rank=2, init_weights=False)).eval()
    assert sum(isinstance(m, LortaLayer) for m in model.modules()) == 8
    before = model.base_model.model.layers[1].self_attn.q_proj.weight.clone()
    expected = output(model, inputs)
    assert not close(output(tied(), inputs), expected, 1e-3)
    model.merge_adapter()
    assert close(output(model, inputs), expected)
    model.unmerge_adapter()
    assert same_bits(model.base_model.model.layers[1].self_attn.q_proj.weight, before)
    assert close(output(model.merge_and_unload(), inputs), expected)


def test_unloading_leaves_no_trace():
    inputs = LLAMA.inputs()
    base = LLAMA.model()
    before = picture(base)
    model = peft.get_peft_model(base, LortaConfig(rank=2, init_weights=False))
    output(model, inputs)
    bare = model.unload()
    assert bare is base
    left = [name for name in changes(before, picture(base)) if "requires_grad" not in name]
    assert not any("hook" in name or "lorta" in name for name in left)
    assert same_bits(output(base, inputs), output(LLAMA.model(), inputs))


def test_files_hold_each_number_once(tmp_path):
    model = second(wrapped())
    model.save_pretrained(tmp_path)
    for folder, name in ((tmp_path, "default"), (tmp_path / "other", "other")):
        stored = load_file(folder / "adapter_model.safetensors")
        own = factors(model, name)
        assert {key.split("networks.")[1] for key in stored} == set(own)
        assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in own.values())
        assert {key.split("networks.")[0] for key in stored} == {"base_model.lorta_adapters."}
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["peft_type"] == "LORTA"
    again = peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path, adapter_name="one").eval()
    again.load_adapter(tmp_path / "other", adapter_name="two")
    inputs = LLAMA.inputs()
    assert same_bits(output(again, inputs), output(model, inputs))
    again.set_adapter("two")
    model.set_adapter("other")
    assert same_bits(output(again, inputs), output(model, inputs))


@pytest.mark.parametrize("low", [True, False])
def test_loading_with_little_memory(low, tmp_path):
    model, inputs = wrapped(), LLAMA.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = reloaded(model, tmp_path, low_cpu_mem_usage=low)
    assert not any(p.is_meta for p in again.parameters())
    assert same_bits(output(again, inputs), output(model, inputs))
    assert not any(p.requires_grad for p in again.parameters())
    trainable = reloaded(model, tmp_path, low_cpu_mem_usage=low, is_trainable=True)
    assert all(p.requires_grad for p in factors(trainable).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_float32_unless_told_otherwise(dtype, tmp_path):
    base = LLAMA.model().to(dtype)
    model = peft.get_peft_model(base, LortaConfig(rank=2, init_weights=False))
    assert {p.dtype for p in factors(model).values()} == {torch.float32}
    assert model(**LLAMA.inputs())[0].dtype == dtype
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(LLAMA.model().to(dtype), tmp_path)
    for one, two in zip(factors(model).values(), factors(again).values()):
        assert same_bits(one.data, two.data)
    narrow = peft.get_peft_model(
        LLAMA.model().to(dtype), LortaConfig(rank=2), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in factors(narrow).values()} == {dtype}


# Batches whose rows differ


@pytest.mark.parametrize("name", ["Llama", "Bert", "T5", "Conv1D"])
def test_rows_with_adapters_of_their_own(name):
    family = FAMILIES[name]
    model = second(wrapped(family), rank=5)
    second(
        model,
        "third",
        3,
        decomposition="tucker",
        target_modules=model.peft_config["default"].target_modules,
    )
    inputs = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in family.inputs().items()}
    rows = ["other", "__base__", "third", "default"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=rows)[0]
    for k, row in enumerate(rows):
        one = {key: value[k : k + 1] for key, value in inputs.items()}
        if row == "__base__":
            with model.disable_adapter():
                expected = output(model, one)
        else:
            model.set_adapter(row)
            expected = output(model, one)
        assert close(mixed[k : k + 1], expected), row


def test_generation_with_rows_beams_and_errors():
    model = second(wrapped(kind="ForCausalLM"))
    inputs = {k: v.clone() for k, v in LLAMA.inputs().items()}
    rows = ["other", "default"]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    mixed = model.generate(**inputs, adapter_names=rows, **options)
    for k, row in enumerate(rows):
        model.set_adapter(row)
        alone = model.generate(**{n: v[k : k + 1] for n, v in inputs.items()}, **options)
        assert torch.equal(mixed[k], alone[0])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**inputs, adapter_names=["default", "absent"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(**inputs, adapter_names=["default"])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(**inputs, adapter_names=rows)


def beams(model, options, inputs, **given):
    return model.generate(**inputs, **options, **given)


def beams_of_a_config(model, options, inputs, **given):
    return model.generate(**inputs, generation_config=GenerationConfig(**options), **given)


def beams_of_a_config_by_position(model, options, inputs, **given):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return model.generate(ids, GenerationConfig(**options), attention_mask=mask, **given)


def beams_of_the_model(model, options, inputs, **given):
    model.generation_config.update(**options)
    return model.generate(**inputs, **given)


@pytest.mark.parametrize(
    "way", [beams, beams_of_a_config, beams_of_a_config_by_position, beams_of_the_model]
)
@pytest.mark.parametrize("repeats", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_rows_are_repeated_whoever_says_so(way, repeats):
    model = second(wrapped(kind="ForCausalLM"))
    inputs = {k: v.clone() for k, v in LLAMA.inputs().items()}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **repeats}
    rows = ["other", "default"]
    mixed = way(model, options, inputs, adapter_names=rows)
    alone = []
    for k, row in enumerate(rows):
        model.set_adapter(row)
        alone.append(way(model, options, {n: v[k : k + 1] for n, v in inputs.items()}))
    assert torch.equal(mixed, torch.cat(alone))


def test_sequences_are_sampled_for_each_row():
    model = second(wrapped(kind="ForCausalLM"))
    config = GenerationConfig(
        num_return_sequences=3, do_sample=True, max_new_tokens=3, pad_token_id=0
    )
    found = model.generate(
        **LLAMA.inputs(), generation_config=config, adapter_names=["other", "__base__"]
    )
    assert len(found) == 6


@pytest.mark.parametrize("rows", [[], ["default"], ["default"] * 3])
def test_rows_that_are_no_beams_are_refused(rows):
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        wrapped()(**LLAMA.inputs(), adapter_names=rows)


# Sums


@pytest.mark.parametrize("decomposition", [*FORMATS, "layer in.1 a, in.2 a b, matrix head out b"])
def test_a_weighted_sum_is_exact(decomposition, tmp_path):
    model = second(wrapped(decomposition=decomposition, alpha=0.5), decomposition=decomposition)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ranks larger than the modes can fill")
        model.add_weighted_adapter(["default", "other"], [0.7, -1.5], "sum")
    own = model.base_model.lorta_adapters
    for site in own["sum"].sites:
        expected = 0.7 * own["default"].delta(site) - 1.5 * own["other"].delta(site)
        assert close(own["sum"].delta(site), expected)
    model.set_adapter("sum")
    inputs = LLAMA.inputs()
    expected = output(model, inputs)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path / "sum").eval()
    assert same_bits(output(again, inputs), expected)


def test_sums_that_are_refused():
    model = second(wrapped())
    with pytest.raises(ValueError, match="the exact sum; found 'svd'"):
        model.add_weighted_adapter(["default"], [1.0], "new", combination_type="svd")
    with pytest.raises(ValueError, match="the adapters are default, other"):
        model.add_weighted_adapter(["default", "absent"], [1.0, 1.0], "new")
    second(model, "narrow", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="not on the same modules"):
        model.add_weighted_adapter(["default", "narrow"], [1.0, 1.0], "new")
    assert list(model.peft_config) == ["default", "other", "narrow"]


# What other libraries expect


def test_names_survive_those_who_read_them():
    """TRL copies parameters with ".default." in their names, vLLM's weight sync leaves those out
    that contain the prefix, and transformers inserts the adapter's name behind it."""
    model = wrapped(kind="ForCausalLM")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    for name in names:
        assert ".default." in name
        assert model.base_model.prefix in name
        assert re.search(r"\.lorta_\w+\.default\.", name)


def test_a_reference_adapter_made_by_name_is_exact():
    """As TRL makes one of a model that is wrapped already: the first DPO loss is then ln 2."""
    model, inputs = wrapped(kind="ForCausalLM"), LLAMA.inputs()
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
    expected = output(model, inputs)
    model.set_adapter("ref")
    assert same_bits(output(model, inputs), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")
def test_checkpoints_leave_the_gradients_as_they_are(reentrant):
    model, inputs = wrapped(kind="ForCausalLM").train(), LLAMA.inputs()
    model(**inputs)[0].square().mean().backward()
    expected = [p.grad.clone() for p in factors(model).values()]
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs)[0].square().mean().backward()
    assert all(close(p.grad, g) for p, g in zip(factors(model).values(), expected))


def test_status_and_printing():
    model = second(wrapped())
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.peft_types == {"default": "LORTA", "other": "LORTA"}
    assert "lorta.LortaLinear" in repr(model)
    assert all(
        layer.available_adapters == ["default", "other"] for layer in model.get_layer_status()
    )


def test_conversion_and_exact_export(tmp_path):
    model, inputs = wrapped(kind="ForCausalLM"), LLAMA.inputs()
    expected = output(model, inputs)
    model.export_lora(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(LLAMA.model("ForCausalLM"), tmp_path / "lora").eval()
    assert close(output(again, inputs), expected)
    assert model.supports_lora_conversion()
    config, tensors = peft.convert_to_lora(model, rank=2)
    converted = peft.get_peft_model(LLAMA.model("ForCausalLM"), config).eval()
    peft.set_peft_model_state_dict(converted, tensors)
    assert close(output(converted, inputs), expected, 1e-4)
    with pytest.raises(KeyError, match="no adapter 'absent'"):
        model.export_lora(tmp_path / "none", "absent")


def test_modules_to_save_are_exported(tmp_path):
    bert = FAMILIES["Bert"]
    model = wrapped(bert, "ForSequenceClassification", modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in model.classifier.modules_to_save.parameters():
            parameter.normal_()
    expected = output(model, bert.inputs())
    again = reloaded(model, tmp_path / "own", bert, "ForSequenceClassification")
    assert same_bits(output(again, bert.inputs()), expected)
    model.export_lora(tmp_path / "lora")
    base = bert.model("ForSequenceClassification")
    lora = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert close(output(lora, bert.inputs()), expected)


# Registration


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "order",
    [
        "import lortalib, peft",
        pytest.param("import peft, lortalib", marks=pytest.mark.slow),
        # Looking whether PEFT is there is not importing it; transformers looks.
        pytest.param(
            "import lortalib, importlib.util; importlib.util.find_spec('peft'); import peft",
            marks=pytest.mark.slow,
        ),
        "import lortalib; from transformers import Trainer; import peft",
    ],
)
def test_importing_lortalib_is_enough(order, tmp_path):
    wrapped().save_pretrained(tmp_path)
    code = (
        f"import sys; {order}; print(peft.PeftConfig.from_pretrained(sys.argv[1]).peft_type.value)"
    )
    assert run(code, tmp_path) == "LORTA"


def test_a_block_that_is_not_understood_costs_the_others_nothing():
    class StrangeAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.weird = nn.Linear(6, 6)

    def targets(model):
        config = LortaConfig(rank=2, decomposition="cp", target_modules=["query", "value"])
        found = peft.get_peft_model(model, config)
        return {n: p.shape for n, p in found.named_parameters() if p.requires_grad}

    config = BertConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=4,
                        intermediate_size=8, vocab_size=10)  # fmt: skip
    plain, strange = BertModel(config), BertModel(config)
    strange.beside = StrangeAttention()
    with pytest.raises(lortalib.nn.UnsupportedModelError, match="StrangeAttention"):
        lortalib.nn.sites(strange)
    assert targets(strange) == targets(plain)
    assert any(shape[0] == 4 for shape in targets(BertModel(config)).values())


def test_lortalib_alone_does_not_import_peft():
    assert run("import sys, lortalib; print('peft' in sys.modules)") == "False"


def test_the_member_is_one_like_the_others():
    member = PeftType("LORTA")
    assert member is PeftType.LORTA is PeftType["LORTA"]
    assert member in list(PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.dumps({"type": member}) == '{"type": "LORTA"}'
    assert lortalib.peft.LortaConfig is LortaConfig
