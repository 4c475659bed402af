"""The command line, on saved models and adapters, and on what users get wrong."""

import json
import math
import random
import re
import shutil
import socket
import subprocess
import sys

import peft
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from saved_files import edit
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lortalib
from lortalib.cli import main

IDS = {"input_ids": torch.arange(5, 19).view(2, 7)}


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=24, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a model and of an adapter on it, and the logits with it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny().save_pretrained(folder / "model")
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    generator = torch.Generator().manual_seed(1)
    adapter = lortalib.nn.apply(model, "cp", 3, init="normal", alpha=0.5, generator=generator)
    adapter.save(folder / "adapter")
    with torch.no_grad():
        return folder / "model", folder / "adapter", model(**IDS)[0]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The same of a model with packed experts."""
    folder = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    MixtralForCausalLM(
        MixtralConfig(
            num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24, vocab_size=64, num_local_experts=3, head_dim=8,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    model = MixtralForCausalLM.from_pretrained(folder / "model").eval()
    generator = torch.Generator().manual_seed(1)
    adapter = lortalib.nn.apply(
        model, "cp", 3, targets="all", init="normal", alpha=0.1, generator=generator
    )
    adapter.save(folder / "adapter")
    with torch.no_grad():
        return folder / "model", folder / "adapter", model(**IDS)[0]


def changed(folder, out, change):
    """A copy of an adapter's folder whose file says something else, and is sealed again."""
    shutil.copytree(folder, out)
    edit(out, change)
    return out


def run(capsys, *arguments, code=0):
    """What the command printed."""
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


def machine(capsys, *arguments, code=0):
    return json.loads(run(capsys, *arguments, "--json", code=code).out)


def test_info(saved, capsys):
    model, folder, _ = saved
    found = machine(capsys, "info", folder)
    assert found["trainable parameters"] == found["tensors"][0]["trainable parameters"]
    assert len(found["sites"]) == 8
    host = LlamaForCausalLM.from_pretrained(model)
    adapter = lortalib.nn.load(host, folder)
    for entry, site in zip(found["sites"], adapter.sites):
        delta = adapter.delta(site).detach()
        assert entry["norm"] == pytest.approx(delta.norm().item(), rel=1e-4)
        side = delta.T if site.writer else delta
        heads = side.reshape(site.heads, -1).norm(dim=1).tolist()
        assert entry["norm by head"] == pytest.approx(heads, rel=1e-4)
    text = run(capsys, "info", folder).out
    assert "in r, out r, head r, layer r, matrix r" in text
    assert text.count("norm of the update") == 3  # by matrix, layer and head
    for number in range(4):
        norms = [norm for entry in found["sites"] for norm in entry["norm by head"][number:][:1]]
        assert re.search(rf"layers {number} +{math.hypot(*norms):.4g}", text)


def test_info_of_several_tasks(saved, tmp_path, capsys):
    model, _, _ = saved
    host = LlamaForCausalLM.from_pretrained(model)
    tasks = ["films", "news"]
    adapter = lortalib.nn.apply(host, "metatt_41d", 2, tasks=tasks, init="normal")
    found = machine(capsys, "info", adapter.save(tmp_path))
    assert found["tasks"] == "films, news"
    assert found["tensors"][0]["legs"] == "in a, layer a b, task b c, matrix c d, head out d"
    assert [entry["task"] for entry in found["sites"]] == ["films"] * 8 + ["news"] * 8
    for entry in found["sites"]:
        norm = adapter.task(entry["task"]).delta(entry["path"]).norm().item()
        assert entry["norm"] == pytest.approx(norm, rel=1e-4)
    assert "news  " in run(capsys, "info", tmp_path).out


def test_plan(saved, capsys):
    found = machine(capsys, "plan", saved[0], "--rank", 2, 4, "--decomposition", "cp", "lora")
    counts = {(p["decomposition"], p["rank"]): p["trainable parameters"] for p in found["plans"]}
    for (name, rank), count in counts.items():
        assert lortalib.nn.apply(tiny(), name, rank).count() == count
    text = run(capsys, "plan", saved[0]).out
    assert "LoRA of this rank / it" in text
    assert "why not" not in text


def test_plan_counts_the_lora_that_peft_makes(saved, capsys):
    found = machine(capsys, "plan", saved[0], "--rank", 2, "--decomposition", "cp", "lora")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    theirs, _ = peft.get_peft_model(tiny(), config).get_nb_trainable_parameters()
    for row in found["plans"]:
        ratio = row["LoRA of this rank / it"]
        assert ratio * row["trainable parameters"] == pytest.approx(theirs)


# Packed experts


def test_plan_of_packed_experts_lists_what_cannot_be_had(packed, capsys):
    found = machine(capsys, "plan", packed[0], "--targets", "mlp")
    assert found["projections"] == 6
    by_name = {}
    for row in found["plans"]:
        by_name.setdefault(row["decomposition"], []).append(row)
    assert {name: len(rows) for name, rows in by_name.items()} == {
        "indscal": 5, "cp": 5, "tucker": 5, "tt": 5, "lotr": 1, "lora": 1,
    }  # fmt: skip
    for name, rows in by_name.items():
        for row in rows:
            if name in ("lotr", "lora"):
                assert row["trainable parameters"] is row["rank"] is None
                assert "carries the mode 'expert'" in row["why not"]
                assert not row["why not"].endswith("in")
            else:
                assert row["trainable parameters"] > 0
                assert row["why not"] is None
    text = run(capsys, "plan", packed[0], "--targets", "mlp").out
    assert "why not" in text
    none = machine(capsys, "plan", packed[0], "--targets", "mlp", "--decomposition", "lora", code=1)
    assert none["projections"] == 6


def test_info_on_packed_experts(packed, capsys):
    model, folder, _ = packed
    found = machine(capsys, "info", folder)
    adapter = lortalib.nn.load(MixtralForCausalLM.from_pretrained(model), folder)
    assert len(found["sites"]) == len(adapter.sites) == 14
    for entry, site in zip(found["sites"], adapter.sites):
        delta = adapter.delta(site).detach()
        assert entry["norm"] == pytest.approx(delta.norm().item(), rel=1e-4)
        assert len(entry["norm by head"]) == site.heads
        squares = torch.tensor(entry["norm by head"]).square().sum().item()
        assert entry["norm"] ** 2 == pytest.approx(squares, rel=1e-4)
    assert "layers down" in run(capsys, "info", folder).out


def test_every_other_command_on_packed_experts(packed, capsys, tmp_path):
    model, folder, logits = packed
    checked = machine(capsys, "check", folder)
    assert (checked["sound"], checked["fits"]) == (True, True)
    sites = machine(capsys, "sites", model, "--targets", "all")["sites"]
    assert sum("3 experts in one parameter" in site["why"] for site in sites) == 6
    refused = run(capsys, "export-lora", folder, tmp_path / "lora", code=1)
    assert "packs experts; a LoRA file has no pair for it" in refused.err
    assert not (tmp_path / "lora").exists()
    assert machine(capsys, "merge", model, folder, tmp_path / "out")["projections changed"] == 14
    merged = MixtralForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(merged(**IDS)[0], logits, atol=1e-5)


def test_sites(saved, capsys):
    found = machine(capsys, "sites", saved[0], "--targets", "all")
    assert len(found["sites"]) == 14
    assert "2 query heads share one of its heads" in found["sites"][1]["why"]
    assert "model.layers.1.self_attn.o_proj" in run(capsys, "sites", saved[0], "--all").out


def test_merge(saved, capsys, tmp_path):
    model, folder, logits = saved
    found = machine(capsys, "merge", model, folder, tmp_path / "out")
    assert found["projections changed"] == 8
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(merged(**IDS)[0], logits, atol=1e-5)
    refused = run(capsys, "merge", model, folder, tmp_path / "out", code=1)
    assert "exists and is not empty" in refused.err


def test_a_model_that_lacks_weights_is_not_merged(saved, capsys, tmp_path):
    """transformers draws them at random, with a report."""
    model, folder, *_ = saved
    base = tmp_path / "base"
    shutil.copytree(model, base)
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for command in (
        ["merge", base, folder, tmp_path / "out"],
        ["export-lora", folder, tmp_path / "out", "--model", base],
    ):
        said = run(capsys, *command, code=1).err
        assert "has no model.norm.weight, for which transformers draws random numbers" in said
    assert not (tmp_path / "out").exists()


def test_export_lora(saved, capsys, tmp_path):
    model, folder, logits = saved
    found = machine(capsys, "export-lora", folder, tmp_path / "lora")
    assert (found["rank"], found["modules"]) == (3, 8)
    base = LlamaForCausalLM.from_pretrained(model)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    with torch.no_grad():
        assert torch.allclose(adapted(**IDS)[0], logits, atol=1e-5)


@pytest.fixture(scope="module")
def loras(saved, tmp_path_factory):
    """Two LoRAs of PEFT that name the saved model."""
    folder = tmp_path_factory.mktemp("loras")
    for k, name in enumerate(("ann", "bob")):
        model = LlamaForCausalLM.from_pretrained(saved[0])
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(k)
        peft.get_peft_model(model, config).save_pretrained(folder / name)
    return folder / "ann", folder / "bob"


def test_compress(saved, loras, capsys, tmp_path):
    out = tmp_path / "deep" / "out"
    found = machine(capsys, "compress", *loras, out, "--to", "tt", "--rank", 3, "--sweeps", 4)
    assert sorted(path.name for path in out.iterdir()) == ["ann", "bob"]
    joint = lortalib.nn.compress(tiny(), loras, "tt", 3, sweeps=4)
    assert found["relative error"] == pytest.approx(joint.error)
    assert found["parameters"] == joint.count()
    assert found["errors"]["layer"] == joint.table("layer")
    assert len(found["sites"]) == len(joint.errors) == 8
    model = LlamaForCausalLM.from_pretrained(saved[0])
    assert lortalib.nn.load(model, out / "bob").config.decomposition == "tt"
    # One LoRA and one adapter of lortalib, options first; tables for people.
    text = run(capsys, "compress", "--to", "cp", "--rank", 2, loras[0], tmp_path / "one").out
    assert (tmp_path / "one" / "adapter.safetensors").is_file()
    assert "relative" in text
    assert "layers v" in text
    options = ["--model", saved[0], "--gqa", "split", "--sweeps", 2]
    run(capsys, "compress", loras[0], saved[1], *options, tmp_path / "both")  # OUT behind all
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["adapter", "ann"]


def test_compress_writes_one_folder_that_every_command_reads(saved, loras, capsys, tmp_path):
    out = tmp_path / "out"
    options = ["--to", "jd", "--rank", 3, "--sweeps", 4, "--joint"]
    machine(capsys, "compress", *loras, out, *options)
    assert [path.name for path in out.iterdir()] == ["adapter.safetensors"]
    assert machine(capsys, "info", out)["tasks"] == "ann, bob"
    assert machine(capsys, "check", out)["fits"] is True
    run(capsys, "export-lora", out, tmp_path / "lora", "--task", "bob")
    found = machine(capsys, "compare", out, tmp_path / "lora", "--task-a", "bob")
    assert found["relative distance"] < 1e-5
    bank = lortalib.nn.bank(
        LlamaForCausalLM.from_pretrained(saved[0]), "jd", 3, targets="qv", shared=("in", "out")
    )
    bank.load(out)
    assert list(bank) == ["ann", "bob"]
    bank.save(tmp_path / "bank")
    for command in ("info", "check"):
        found = run(capsys, command, tmp_path / "bank", code=1)
        assert "is the folder of a bank" in (found.out + found.err)


def test_compress_refuses_options_that_it_does_not_have(loras, tmp_path):
    for extra in (["--rnak", "3"], [tmp_path / "out", "--what"]):
        with pytest.raises(SystemExit) as left:
            main([str(each) for each in ("compress", *loras, "--to", "cp", *extra)])
        assert left.value.code == 2
    assert not (tmp_path / "out").exists()


def test_compress_takes_the_weights_where_an_adapter_needs_them(saved, loras, capsys, tmp_path):
    model = LlamaForCausalLM.from_pretrained(saved[0])
    lortalib.nn.apply(model, "indscal", 2, init="normal").save(tmp_path / "stream")
    options = ["--to", "lora", "--rank", 2, "--model", saved[0], "--sweeps", 40]
    found = machine(capsys, "compress", tmp_path / "stream", tmp_path / "out", *options)
    assert found["relative error"] < 1e-3


def test_compress_says_what_is_wrong_before_it_fits(saved, loras, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("lortalib.decomp.fit", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out = tmp_path / "out"
    for arguments, message in (
        ([*loras, tmp_path / "full"], "exists and is not empty"),
        ([tmp_path / "absent", out], "no adapter_config.json"),
        ([*loras, out, "--to", "indscal"], "tensor on the residual stream"),
        ([*loras, out, "--to", "lotr"], "need the leg 'adapter'"),
        ([*loras, out, "--to", "cpp"], "unknown decomposition"),
        ([*loras, out, "--model", tmp_path / "absent"], "absent"),
    ):
        assert message in run(capsys, "compress", *arguments, code=1).err
        assert not out.exists()
    stranger = tmp_path / "stranger"
    shutil.copytree(loras[0], stranger)
    config = json.loads((stranger / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "some/where"
    (stranger / "adapter_config.json").write_text(json.dumps(config))
    assert "no folder here; give --model" in run(capsys, "compress", stranger, out, code=1).err


def test_check(saved, capsys, tmp_path):
    folder = saved[1]
    assert machine(capsys, "check", folder)["fits"] is True
    config = tiny().config
    config.hidden_size = 32
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    found = machine(capsys, "check", folder, "--model", tmp_path / "wide", code=1)
    assert found["sound"] is True
    assert found["fits"] is False
    assert "does not fit" in found["why"]
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    file = broken / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    found = machine(capsys, "check", broken, code=1)
    assert found["sound"] is False
    assert "damaged" in found["why"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "no adapter.safetensors in nowhere"),
        (["plan", "{adapter}"], "holds no config.json"),
        (["plan", "{model}", "--decomposition", "nonsense"], "unknown decomposition 'nonsense'"),
        (["sites", "{model}", "--targets", "z"], "fits no projection"),
        (["merge", "{model}", "nowhere", "out"], "no adapter.safetensors"),
        (
            ["merge", "{model}", "{adapter}", "{out}", "--dtype", "float99"],
            "unknown dtype 'float99'",
        ),
        (
            ["merge", "{model}", "{adapter}", "{out}", "--dtype", "float8_e4m3fn"],
            "unknown dtype 'float8_e4m3fn'; choose auto, float16, bfloat16, float32, float64",
        ),
        (["merge", "{model}", "{adapter}", "{out}", "--dtype", "__name__"], "unknown dtype"),
        (["merge", "{model}", "{adapter}", "{out}", "--dtype", "int8"], "unknown dtype"),
        (["export-lora", "nowhere", "out"], "no adapter.safetensors"),
        (["check", "{adapter}", "--trust-remote-code"], "goes with --model only"),
        (["info", "[/x]"], "no adapter.safetensors in [/x]"),
        (["info", "{adapter}r"], "There is no such folder; did you mean {adapter}?"),
        (["info", "nowhere"], "There is no such folder"),
        (["merge", "{adapter}", "{model}", "out"], "It holds a model: it has a config.json"),
        (["plan", "{adapter}"], "holds no config.json, but an adapter"),
        (["plan", "smollm"], "there is no folder 'smollm' here, and the hub gave no such model"),
        (["convert", "{lora}", "out"], "`lortalib from-lora`"),
    ],
)
def test_errors_of_users_are_one_line_and_no_traceback(saved, arguments, message, capsys, tmp_path):
    lora = lortalib.nn.export_lora(lortalib.nn.read(saved[1]), tmp_path / "lora")
    known = {"model": saved[0], "adapter": saved[1], "out": tmp_path / "out", "lora": lora}
    filled = [argument.format(**known) for argument in arguments]
    message = message.format(**known)
    shown = run(capsys, *filled, code=1)
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert message in json.loads(run(capsys, *filled, "--json", code=1).out)["error"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_merge_in_a_dtype(saved, dtype, capsys, tmp_path):
    run(capsys, "merge", *saved[:2], tmp_path / "out", "--dtype", dtype)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == getattr(torch, dtype)


# Files and models of strangers


@pytest.fixture
def offline(monkeypatch):
    """Fails where anything is looked up in a network."""

    def refuse(*arguments, **options):
        raise AssertionError(f"a network was asked for {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_check_looks_up_no_name_of_a_file(saved, capsys, tmp_path, offline, monkeypatch):
    asked = []
    monkeypatch.setattr("lortalib.cli._check.shape_of", lambda *name: asked.append(name))
    folder = changed(saved[1], tmp_path / "a", lambda v: v["base_model"].update(name="evil/model"))
    found = machine(capsys, "check", folder)
    assert (found["sound"], found["fits"]) == (True, None)
    assert found["why"] == "the model 'evil/model' was not looked up; give it as --model to do so"
    assert asked == []
    none = changed(saved[1], tmp_path / "b", lambda v: v["base_model"].update(name=None))
    assert "names no model" in machine(capsys, "check", none)["why"]
    odd = changed(saved[1], tmp_path / "c", lambda v: v["base_model"].update(name="x" * 300))
    assert "was not looked up" in machine(capsys, "check", odd)["why"]


def test_check_runs_no_code_that_a_file_names(saved, capsys, tmp_path):
    """Neither that of the folder that an adapter names, nor a kernel that its configuration names."""
    bad = tmp_path / "bad"
    shutil.copytree(saved[0], bad)
    ran = tmp_path / "ran"
    (bad / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    config = json.loads((bad / "config.json").read_text())
    config.update(
        model_type="strange", auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"},
    )  # fmt: skip
    (bad / "config.json").write_text(json.dumps(config))
    folder = changed(saved[1], tmp_path / "a", lambda v: v["base_model"].update(name=str(bad)))
    found = machine(capsys, "check", folder)
    assert (found["sound"], found["fits"]) == (True, None)
    refused = machine(capsys, "check", folder, "--trust-remote-code", code=1)
    assert "goes with --model only" in refused["error"]
    assert not ran.exists()


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"attn_implementation": "evil/kernel"}, True),
        ({"_attn_implementation": "flash_attention_2"}, True),
        ({"architectures": ["pipeline"]}, True),
        ({"architectures": [5]}, True),
        ({"architectures": 5}, True),
        ({"architectures": ["AutoModel"]}, True),
        ({"architectures": ["PreTrainedModel"]}, True),
        ({"architectures": ["BertModel"]}, False),
        ({"hidden_size": "x"}, False),
        ({"num_attention_heads": 0}, False),
        ({"hidden_act": "nope"}, False),
        ({"rope_parameters": 5}, False),
        ({"dtype": "__name__"}, False),
        ({"model_type": 5}, False),
    ],
)
def test_configurations_of_models_that_say_something_odd(
    saved, changes, fits, capsys, tmp_path, offline
):
    if fits and "architectures" in changes:
        try:
            LlamaConfig(**changes)
        except StrictDataclassFieldValidationError:
            pytest.skip("this version of transformers itself refuses the value")
    odd = tmp_path / "odd"
    shutil.copytree(saved[0], odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, **changes}))
    found = machine(capsys, "check", saved[1], "--model", odd, code=0 if fits else 1)
    assert found["fits"] is fits
    for command in ("plan", "sites"):
        shown = run(capsys, command, odd, code=0 if fits else 1)
        assert fits or shown.err.startswith("lortalib: ")


NAMES = ["[/x]", "[red]x[/red]", ":smile:", "\x1b[2J", "two\nlines", "x" * 3000, "日本"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_strangers_are_shown_as_text(saved, name, capsys, tmp_path):
    def change(value):
        value["name"] = name
        value["base_model"].update({"class": name, "name": name})

    folder = changed(saved[1], tmp_path / "a", change)
    for command in ("info", "check"):
        text = run(capsys, command, folder).out
        text.encode("utf-8")
        assert "\x1b[2J" not in text
        if command == "info" and len(name) < 20 and name.isprintable():
            assert name in text
        assert json.loads(run(capsys, command, folder, "--json").out)["adapter"]
    run(capsys, "export-lora", folder, tmp_path / "lora")


def test_a_path_that_is_no_text_is_shown_escaped(capsys):
    """As Python reads bytes of an argument that are no UTF-8."""
    assert r"no adapter.safetensors in \udcff" in run(capsys, "info", "\udcff", code=1).err


WRONG = [None, True, 5, -1, 10**12, 1.5, "", "x", "[/x]", [], [5], {}, {"a": 5}, "\ud800"]


def places(value, path=()):
    """Every place of a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(min(len(value), 2)):
            yield from places(value[key], (*path, key))


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def test_any_value_of_a_wrong_type_is_one_message(saved, packed, capsys, tmp_path):
    choose = random.Random(0)
    for model, folder, _ in (saved, packed):
        found = []
        edit(shutil.copytree(folder, tmp_path / model.parent.name), found.append)
        cases = [(path, new) for path in places(found[0]) if path for new in WRONG]
        for number, (path, new) in enumerate(choose.sample(cases, 60)):
            here = tmp_path / f"{model.parent.name}{number}"
            changed(folder, here, lambda value, path=path, new=new: put(value, path, new))
            for command in (["info"], ["check"], ["export-lora"]):
                out = [here / "lora"] if command == ["export-lora"] else []
                code = main([*command, str(here), *map(str, out)])
                shown = capsys.readouterr()
                assert code in (0, 1), (command, path, new)
                assert "Traceback" not in shown.err


def test_wrong_usage_leaves_with_2(capsys):
    with pytest.raises(SystemExit) as left:
        main(["nonsense"])
    assert left.value.code == 2


def test_python_m_lortalib(saved):
    done = subprocess.run(
        [sys.executable, "-m", "lortalib", "info", str(saved[1]), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert json.loads(done.stdout)["decomposition"] == "cp"


def test_alone_it_prints_its_help(capsys):
    assert main([]) == 0
    assert "convert" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("targets", "roles"),
    [
        ("q_proj,down_proj", {"q", "down"}),
        (r".*\.(q|v)_proj", {"q", "v"}),
        ("all-linear", None),
        ("qv", {"q", "v"}),
    ],
)
def test_targets_are_those_of_apply(targets, roles, tmp_path, capsys):
    LlamaConfig(num_hidden_layers=1, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert main(["sites", str(tmp_path), "--targets", targets, "--json"]) == 0
    found = {site["role"] for site in json.loads(capsys.readouterr().out)["sites"]}
    assert found == (roles or {*"qkvo", "gate", "up", "down"})
