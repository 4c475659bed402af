"""Repositories of the hub, against a small server on this machine that answers as the hub does."""

import json

import peft
import pytest
import torch
from adapted import output, same_bits
from fake_hub import fake_hub
from huggingface_hub import ModelCard, constants
from models import FAMILIES
from safetensors.torch import load_file

import lortalib
from lortalib.cli import main
from lortalib.nn.door import compare_updates, lora_config
from lortalib.peft import LortaConfig

LLAMA = FAMILIES["Llama"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with fake_hub(monkeypatch, tmp_path / "cache") as served:
        yield served


def trained(decomposition="cp", **options):
    model = LLAMA.model("ForCausalLM").eval()
    adapter = lortalib.nn.apply(model, decomposition, 2, init="normal", **options)
    return model, adapter


def fresh():
    return LLAMA.model("ForCausalLM").eval()


def push(adapter, hub, name="user/name", **options):
    return adapter.push_to_hub(name, token=hub.token, **options)


def test_what_was_pushed_is_loaded_with_the_same_outputs(hub, inputs):
    model, adapter = trained()
    address = push(adapter, hub)
    assert address.startswith(f"{hub.address}/user/name/commit/")
    assert sorted(hub.repositories["user/name"]["main"]) == ["README.md", "adapter.safetensors"]
    again = fresh()
    loaded = lortalib.nn.load(again, "user/name", name="again")
    assert loaded.name == "again"
    assert same_bits(output(again, inputs), output(model, inputs))
    assert lortalib.nn.read("user/name").count() == adapter.count()
    assert lortalib.nn.read_description("user/name")["name"] == "default"


def test_every_door_that_takes_a_folder_takes_a_repository(hub, inputs, capsys):
    _, adapter = trained()
    push(adapter, hub)
    bank = lortalib.nn.bank(fresh(), "cp", 2)
    bank.add("a", "user/name")
    assert lortalib.nn.convert("user/name", "theirs").exists()
    assert main(["info", "user/name", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable parameters"] == adapter.count()
    assert main(["export-lora", "user/name", "lora"]) == 0
    adapter.push_to_hub("user/lora", token=hub.token, lora=True)
    hub.repositories["user/plain"] = {
        "main": {
            path.removeprefix("lora/"): data
            for path, data in hub.repositories["user/lora"]["main"].items()
            if path.startswith("lora/")
        }
    }
    model = fresh()
    assert len(lortalib.nn.load_lora(model, "user/plain").sites) == len(adapter.sites)
    found = lortalib.nn.compress(fresh(), ["user/plain", "user/name"], "tt", 2, sweeps=1)
    assert found.names == ("plain", "name")
    fresh().save_pretrained("base")
    assert main(["compress", "user/plain", "small", "--sweeps", "1", "--model", "base"]) == 0


def test_several_repositories_have_places_of_their_own(hub, capsys):
    """One adapter is on the branch of one repository, the other in a folder; nothing else is there."""
    _, adapter = trained()
    for name, revision in (("user/one", "first try"), ("user/two", None)):
        push(adapter, hub, name, revision=revision)
    files = hub.repositories["user/two"]["main"]
    hub.repositories["user/two"]["main"] = {f"in/{path}": data for path, data in files.items()}
    hub.repositories["user/one"]["main"] = {}
    both = ["user/one", "user/two"]
    places = {"revision": ["first try", None], "subfolder": [None, "in"], "token": hub.token}
    assert all(each.relative < 1e-6 for each in compare_updates(*both, **places))
    found = lortalib.nn.compress(fresh(), both, "tt", 2, sweeps=1, **places)
    assert found.count() > 0
    fresh().save_pretrained("base")
    options = [
        "--revision",
        "first try",
        "--revision",
        ".",
        "--subfolder",
        ".",
        "--subfolder",
        "in",
    ]
    assert main(["compare", *both, *options, "--token", hub.token]) == 0
    assert main(["compress", *both, "out", "--sweeps=1", "--model=base", *options]) == 0
    adapter.save("here")
    here = ["user/one", "here", "--revision", "first try", "--revision", "."]
    assert main(["compare", *here, "--token", hub.token]) == 0
    for call in (
        lambda: compare_updates(*both, revision="first try", subfolder=[None, "in"]),
        lambda: lortalib.nn.compress(fresh(), both, revision=["first try", "no"], sweeps=1),
    ):
        with pytest.raises(FileNotFoundError, match="no revision"):
            call()
    with pytest.raises(ValueError, match="revision must be one for all folders or one for each"):
        compare_updates(*both, revision=["a", "b", "c"])
    for wrong in (3, [3, 4]):
        with pytest.raises(TypeError, match="revision must be a text, or a list"):
            compare_updates(*both, revision=wrong)


def test_a_token_on_the_command_line_reaches_the_hub(hub, monkeypatch):
    push(trained()[1], hub, private=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "none")
    assert main(["info", "user/name"]) == 1
    assert main(["info", "user/name", "--token", hub.token]) == 0


@pytest.mark.parametrize(
    "command",
    [["plan"], ["sites"], ["merge", "out"], ["check"], ["verify"], ["export-lora", "out"]],
    ids=lambda command: command[0],
)
def test_a_model_is_read_at_its_place(command, hub, tmp_path):
    trained()[1].save("adapter")
    fresh().save_pretrained(tmp_path / "base")
    files = {f"in/{path.name}": path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.repositories["user/base"] = {"main": {}, "second": files}
    name, *out = command
    alone = name in ("plan", "sites")
    if alone:
        arguments = [name, "user/base"]
    elif name == "merge":
        arguments = [name, "user/base", "adapter", *out]
    else:
        arguments = [name, "adapter", *out, "--model", "user/base"]
    prefix = "--" if alone else "--model-"
    assert main(arguments) == 1
    place = [f"{prefix}revision", "second", f"{prefix}subfolder", "in"]
    assert main([*arguments, *place]) == 0


def test_a_revision_of_a_model_on_this_machine_is_refused(hub, capsys):
    fresh().save_pretrained("base")
    assert main(["plan", "base", "--revision", "second"]) == 1
    assert "is a path on this machine; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        ["check"],
        ["check", "--model", "base"],
        ["verify", "--model", "base"],
        ["export-lora"],
        ["export-lora", "--model", "base"],
        ["convert"],
        ["merge"],
    ],
    ids=" ".join,
)
def test_every_command_reads_the_revision_that_it_is_given(command, hub):
    """Nothing else of the repository holds an adapter."""
    push(trained()[1], hub, revision="only here")
    fresh().save_pretrained("base")
    name, *options = command
    places = {"merge": ["base", "user/name", "out"]}
    out = ["out"] if name in ("export-lora", "convert") else []
    arguments = [name, *places.get(name, ["user/name", *out]), *options]
    assert main(arguments) == 1
    assert main([*arguments, "--revision", "only here"]) == 0


def test_a_revision_is_a_state_of_its_own(hub):
    _, one = trained()
    push(one, hub, revision="first try")
    first = hub.commit("user/name", "first try")
    _, two = trained("tucker")
    push(two, hub)
    for revision, adapter in ((None, two), ("first try", one), (first, one)):
        read = lortalib.nn.read("user/name", revision=revision)
        assert read.config.decomposition == adapter.config.decomposition
    push(two, hub, revision="first try")  # the branch is there
    assert lortalib.nn.read("user/name", revision="first try").config.decomposition == "tucker"
    with pytest.raises(FileNotFoundError, match="has no revision 'second'"):
        lortalib.nn.read("user/name", revision="second")


def test_a_token_opens_a_private_repository(hub):
    _, adapter = trained()
    push(adapter, hub, private=True)
    with pytest.raises(
        FileNotFoundError, match=r"shows this token no repository 'user/name'.*token="
    ):
        lortalib.nn.load(fresh(), "user/name")
    assert lortalib.nn.load(fresh(), "user/name", token=hub.token).count() == adapter.count()
    with pytest.raises(ConnectionError, match="nothing was uploaded"):
        adapter.push_to_hub("user/other", token="hf_reader")
    assert "user/other" not in hub.repositories


def test_a_local_folder_goes_before_the_hub(hub):
    _, here = trained("tucker")
    _, there = trained("cp")
    push(there, hub)
    here.save("user/name")
    hub.requests.clear()
    assert lortalib.nn.load(fresh(), "user/name").config.decomposition == "tucker"
    with pytest.raises(ValueError, match="'user/name' is a path on this machine"):
        lortalib.nn.load(fresh(), "user/name", revision="main")
    assert hub.requests == []


def test_only_a_repository_that_the_user_named_is_asked_for(hub, tmp_path):
    """Neither a path, nor a name within a file, makes a request."""
    model, adapter = trained()
    model.config._name_or_path = "stranger/model"
    adapter.save("saved")
    for path in (
        "missing",
        "./missing",
        "a/b/c",
        tmp_path / "a" / "b",
        "a/b.safetensors",
        "../a/b",
    ):
        with pytest.raises(FileNotFoundError, match=r"no adapter\.safetensors in"):
            lortalib.nn.read(path)
    lortalib.nn.load(fresh(), "saved")
    assert main(["check", "saved"]) == 0
    assert hub.requests == []


def test_only_the_files_of_an_adapter_are_downloaded(hub, tmp_path):
    _, adapter = trained()
    push(adapter, hub)
    hub.repositories["user/name"]["main"] |= {"code.py": b"raise SystemExit", "big.bin": b"0" * 9}
    lortalib.nn.read("user/name")
    found = {
        path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink() or path.is_file()
    }
    assert "adapter.safetensors" in found
    assert not found & {"code.py", "big.bin", "README.md"}


def test_a_repository_without_an_adapter_is_named(hub):
    hub.repositories["user/empty"] = {"main": {"README.md": b"nothing"}}
    with pytest.raises(FileNotFoundError, match=r"'user/empty' has none of adapter\.safetensors"):
        lortalib.nn.load(fresh(), "user/empty")


def test_damage_in_a_repository_is_refused(hub):
    _, adapter = trained()
    push(adapter, hub)
    files = hub.repositories["user/name"]["main"]
    data = bytearray(files["adapter.safetensors"])
    data[-1] ^= 1
    files["adapter.safetensors"] = bytes(data)
    model = fresh()
    with pytest.raises(lortalib.nn.AdapterFileError, match="is damaged"):
        lortalib.nn.load(model, "user/name")
    assert lortalib.nn.adapters(model) == {}


def test_offline_a_message_says_so_and_what_was_downloaded_is_found(hub, monkeypatch):
    _, adapter = trained()
    push(adapter, hub)
    lortalib.nn.read("user/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert lortalib.nn.read("user/name").count() == adapter.count()
    model = fresh()
    with pytest.raises(
        ConnectionError, match=r"no folder 'user/other' here.*HF_HUB_OFFLINE is set"
    ):
        lortalib.nn.load(model, "user/other")
    with pytest.raises(ConnectionError, match=r"nothing was uploaded.*HF_HUB_OFFLINE is set"):
        push(adapter, hub)
    assert lortalib.nn.adapters(model) == {}


def test_without_a_network_a_message_says_so(monkeypatch, tmp_path, capsys):
    with fake_hub(monkeypatch, tmp_path):
        pass  # the server is gone, its address stays
    with pytest.raises(ConnectionError, match=r"cannot be asked for.*connection and the token"):
        lortalib.nn.read("user/name")
    assert main(["info", "user/name"]) == 1
    assert "give the path of a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["name", "a/b/c", "user/na me", "", "./name"])
def test_names_that_no_repository_has(name, hub):
    _, adapter = trained()
    with pytest.raises(ValueError, match="is named user/name"):
        push(adapter, hub, name)
    assert hub.requests == []


def test_what_cannot_be_saved_is_not_pushed(hub):
    _, adapter = trained()
    with torch.no_grad():
        next(adapter.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        push(adapter, hub)
    adapter.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        push(adapter, hub)
    assert hub.requests == []


def within(hub, folder, name="user/name"):
    """Move all files of a repository into a folder of it."""
    branch = hub.repositories[name]
    branch["main"] = {f"{folder}/{path}": data for path, data in branch["main"].items()}


@pytest.mark.parametrize("folder", ["one", "runs/one"])
def test_a_folder_of_a_repository(hub, folder, inputs):
    model, adapter = trained()
    push(adapter, hub)
    within(hub, folder)
    again = fresh()
    lortalib.nn.load(again, "user/name", subfolder=folder)
    assert same_bits(output(again, inputs), output(model, inputs))
    assert lortalib.nn.read("user/name", subfolder=folder).count() == adapter.count()
    assert lortalib.nn.read_description("user/name", subfolder=folder)["name"] == "default"
    assert lortalib.nn.convert("user/name", "theirs", subfolder=folder).exists()
    with pytest.raises(FileNotFoundError, match=r"at its top.*subfolder="):
        lortalib.nn.read("user/name")
    with pytest.raises(FileNotFoundError, match="in its folder 'two'"):
        lortalib.nn.read("user/name", subfolder="two")


def test_every_door_takes_a_folder_of_a_repository(hub, capsys):
    _, adapter = trained()
    push(adapter, hub, lora=True)
    within(hub, "runs/one")
    place = {"subfolder": "runs/one"}
    bank = lortalib.nn.bank(fresh(), "cp", 2)
    bank.add("ann", "user/name", **place)
    assert list(bank) == ["ann"]
    with pytest.raises(TypeError, match="go with a folder or repository"):
        bank.add("bob", adapter, **place)
    assert lora_config("user/name", subfolder="runs/one/lora")["r"] > 0
    both = ["runs/one", "runs/one/lora"]
    same = compare_updates("user/name", "user/name", subfolder=both)
    assert max(each.relative for each in same) < 1e-5
    found = lortalib.nn.compress(fresh(), ["user/name"] * 2, "tt", 2, sweeps=1, subfolder=both)
    assert found.names == ("one", "lora")
    found = lortalib.nn.compress(fresh(), {"a": "user/name"}, "tt", 2, sweeps=1, **place)
    assert found.names == ("a",)
    with pytest.raises(ValueError, match="3 for 2 folders"):
        compare_updates("user/name", "user/name", subfolder=[*both, "."])

    fresh().save_pretrained("base")
    inside, model = ["--subfolder", "runs/one"], ["--model", "base"]
    capsys.readouterr()
    assert main(["info", "user/name", "--json", *inside]) == 0
    assert json.loads(capsys.readouterr().out)["trainable parameters"] == adapter.count()
    assert main(["check", "user/name", *inside, *model]) == 0
    assert main(["verify", "user/name", *inside, *model]) == 0
    assert main(["merge", "base", "user/name", "merged", *inside]) == 0
    assert main(["export-lora", "user/name", "lora", *inside]) == 0
    assert main(["export-lora", "user/name", "lora-2", *inside, *model]) == 0
    assert main(["convert", "user/name", "theirs", *inside]) == 0
    each = ["--subfolder", "runs/one", "--subfolder", "runs/one/lora"]
    assert main(["compare", "user/name", "user/name", *each]) == 0
    assert main(["compare", "user/name", "user/name", *inside]) == 0
    assert main(["compare", "lora", "user/name", "--subfolder", ".", *each[2:]]) == 0
    assert main(["compress", "user/name", "small", "--sweeps", "1", *inside, *model]) == 0
    capsys.readouterr()
    assert main(["info", "user/name"]) == 1
    assert "subfolder" in capsys.readouterr().err
    assert main(["compress", "user/name", "other", *each, *model]) == 1
    assert "found 2 for 1 folders" in capsys.readouterr().err


def test_a_bank_is_loaded_from_a_folder_and_a_revision_of_a_repository(hub, tmp_path):
    model, adapter = trained()
    bank = lortalib.nn.bank(model, "cp", 2)
    bank["ann"] = adapter
    folder = bank.save(tmp_path / "bank")
    files = {f"banks/one/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.repositories["user/bank"] = {"main": {}, "old": files}
    again = lortalib.nn.bank(fresh(), "cp", 2)
    again.load("user/bank", revision="old", subfolder="banks/one")
    assert list(again) == ["ann"]
    again.load(tmp_path, subfolder="bank")
    with pytest.raises(FileNotFoundError, match="subfolder="):
        again.load("user/bank", revision="old")
    push(adapter, hub)
    adapter.push_to_hub("user/name", token=hub.token, revision="second")
    again.add("bob", "user/name", revision="second")
    with pytest.raises(FileNotFoundError, match="no revision 'third'"):
        again.add("eve", "user/name", revision="third")
    assert list(again) == ["ann", "bob"]


def test_the_lora_beside_an_adapter(hub):
    _, adapter = trained()
    push(adapter, hub, lora=True)
    loaded = lortalib.nn.load_lora(fresh(), "user/name", subfolder="lora")
    assert len(loaded.sites) == len(adapter.sites)


def test_a_folder_of_a_local_folder(hub):
    _, adapter = trained()
    adapter.save("here/one")
    assert lortalib.nn.read("here", subfolder="one").count() == adapter.count()
    for outside in ("../here/one", "/tmp", "one/../../here"):
        with pytest.raises(ValueError, match="is a path below the folder"):
            lortalib.nn.read("here", subfolder=outside)
    assert hub.requests == []


def test_a_bank_in_a_repository_is_no_adapter(hub, tmp_path):
    model, adapter = trained()
    bank = lortalib.nn.bank(model, "cp", 2)
    bank["ann"] = adapter
    folder = bank.save(tmp_path / "bank")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["user/bank"] = {"main": files}
    with pytest.raises(lortalib.nn.AdapterFileError, match="is the folder of a bank"):
        lortalib.nn.read("user/bank")
    again = lortalib.nn.bank(fresh(), "cp", 2)
    again.load("user/bank")
    assert list(again) == ["ann"]
    for one, other in zip(again["ann"]["layers"], bank["ann"]["layers"]):
        assert same_bits(one, other)


# The card


def card_of(hub, name="user/name"):
    return ModelCard(hub.repositories[name]["main"]["README.md"].decode())


def test_the_card_says_what_the_adapter_is(hub):
    _, adapter = trained()
    push(
        adapter, hub, base_model="org/base", data="reviews | films\nof 2005",
        scores={"accuracy": 0.81234, "note": "one seed"},
    )  # fmt: skip
    card = card_of(hub)
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "lortalib"
    assert "cp" in card.data.tags
    for words in (
        "`org/base` LlamaForCausalLM", "| format | `cp` |", "`in r, out r, head r, layer r, matrix r`",
        "r = 2", f"{adapter.count():,}; a LoRA of rank 2", r"reviews \| films of 2005",
        "| accuracy | 0.8123 |", "| note | one seed |", 'lortalib.nn.load(model, "user/name")',
        "lortalib export-lora user/name OUT`",
    ):  # fmt: skip
        assert words in card.content, words


def test_the_card_of_an_adapter_on_the_stream_says_that_the_export_needs_the_model(hub):
    _, adapter = trained("indscal")
    push(adapter, hub, base_model="org/base")
    text = card_of(hub).content
    assert "the residual stream" in text
    assert "export-lora user/name OUT --model org/base" in text


def test_a_base_that_is_a_local_folder_is_no_metadata(hub, tmp_path):
    """The hub would look for a model of this name."""
    (tmp_path / "my" / "model").mkdir(parents=True)
    _, adapter = trained()
    push(adapter, hub, base_model="my/model")
    assert card_of(hub).data.base_model is None
    push(adapter, hub, "user/two", base_model="/somewhere/else")
    assert card_of(hub, "user/two").data.base_model is None


def test_a_card_that_is_there_stays_unless_asked(hub):
    _, adapter = trained()
    push(adapter, hub)
    hub.repositories["user/name"]["main"]["README.md"] = b"my own words"
    push(adapter, hub)
    assert hub.repositories["user/name"]["main"]["README.md"] == b"my own words"
    push(adapter, hub, replace_card=True)
    assert "a tensor network" in card_of(hub).content


# Without lortalib, and with PEFT


def test_the_lora_beside_it_gives_peft_the_same_outputs(hub, inputs):
    model, adapter = trained()
    push(adapter, hub, lora=True)
    assert 'PeftModel.from_pretrained(model, "user/name", subfolder="lora")' in card_of(hub).content
    theirs = peft.PeftModel.from_pretrained(fresh(), "user/name", subfolder="lora")
    assert torch.allclose(output(theirs, inputs), output(model, inputs), atol=1e-5)


def test_a_model_of_peft_is_pushed_and_loaded_by_either(hub, inputs, tmp_path):
    config = LortaConfig(rank=2, decomposition="cp", init_weights=False)
    wrapped = peft.get_peft_model(fresh(), config).eval()
    wrapped.push_to_hub("user/peft", token=hub.token)
    expected = output(wrapped, inputs)
    theirs = peft.PeftModel.from_pretrained(fresh(), "user/peft").eval()
    assert same_bits(output(theirs, inputs), expected)
    model = fresh()
    lortalib.nn.load(model, "user/peft")
    assert torch.allclose(output(model, inputs), expected, atol=1e-5)


def test_a_model_with_an_adapter_is_pushed_without_its_base(hub):
    model, adapter = trained()
    model.push_to_hub("user/model", token=hub.token)
    files = hub.repositories["user/model"]["main"]
    assert "adapter.safetensors" in files
    assert "model.safetensors" not in files
    assert lortalib.nn.read("user/model").count() == adapter.count()


def test_the_exported_lora_is_the_one_of_a_folder(hub, tmp_path):
    _, adapter = trained()
    push(adapter, hub, lora=True)
    adapter.export_lora(tmp_path / "here")
    there = tmp_path / "there.safetensors"
    there.write_bytes(hub.repositories["user/name"]["main"]["lora/adapter_model.safetensors"])
    here = load_file(tmp_path / "here" / "adapter_model.safetensors")
    for name, tensor in load_file(there).items():
        assert same_bits(tensor, here[name])
