"""Adapters compressed into one tensor: what each does to the weights, and the errors, by definition."""

import math
from unittest import mock

import peft
import pytest
import torch
from adapted import FORMATS, close, output, put, unchanged
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from lora_files import edit, loaded_by_peft, random_lora, tensors_of
from models import FAMILIES, GPT2, MIXTRAL, PHI3
from safetensors.torch import load_file, save_file
from strategies import examples
from transformers import AutoModel
from updates import features, updates

import lortalib
from lortalib.decomp import LegsError, get_format
from lortalib.nn import AdapterFileError, compress

#: A line that holds several LoRAs exactly.
EXACT = "adapter layer matrix in r, adapter layer matrix head out r"
LLAMA = FAMILIES["Llama"]
LAYOUTS = {f.name: f for f in (FAMILIES["Mistral"], FAMILIES["T5"], FAMILIES["Bert"], PHI3, GPT2)}
each_layout = pytest.mark.parametrize("family", LAYOUTS.values(), ids=LAYOUTS)
ignore_cut_ranks = pytest.mark.filterwarnings("ignore:ranks larger than the modes can fill")


def changes(adapter, model):
    """The change of each module's weight by definition, as a linear map has it, in float64."""
    found = {}
    for name, change in updates(adapter, model).items():
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        is_linear = isinstance(module, torch.nn.Linear)
        found[path] = (change if is_linear else change.mT).detach().double()
    return found


def relative(one, other):
    """The norm of the difference of two sets of changes over the norm of the second; absent ones are zero."""
    paths = {*one, *other}
    zero = {path: torch.zeros_like(one.get(path, other.get(path))) for path in paths}
    gap = [one.get(p, zero[p]) - other.get(p, zero[p]) for p in paths]
    total = [other.get(p, zero[p]) for p in paths]
    norms = [math.sqrt(sum(t.square().sum().item() for t in each)) for each in (gap, total)]
    return norms[0] / norms[1]


def lines(name, number):
    """The line of a format for so many adapters, with their leg where the format does not have it."""
    shape = {"layer": 2, "head": 2, "matrix": 2, "in": 4, "out": 3}
    legs = get_format(name).legs({"adapter": 2, **shape} if number > 1 else shape)
    if number == 1 or "adapter" in legs.carriers:
        return name
    terms = [("adapter " * (not term.frozen)) + str(term) for term in legs.terms]
    return ", ".join(terms)


# --- laws -----------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("gqa", ["pool", "split"])
def test_a_line_that_can_hold_them_holds_them(family, gqa, tmp_path):
    """Whatever the layout of the weights: grouped queries, fused, stored (in, out), two stacks."""
    truth = {
        "one": random_lora(family, tmp_path / "one", seed=1),
        "other": random_lora(family, tmp_path / "other", seed=2, r=2, use_rslora=True),
    }
    model = family.model()
    found = compress(model, [tmp_path / name for name in truth], EXACT, 3, gqa=gqa, sweeps=20)
    # Of the LoRAs drawn for Phi3 large terms cancel, and parameters are stored in float32.
    assert found.error < (1e-5 if family.name == "Phi3" else 1e-6)
    for name, wanted in truth.items():
        error = relative(changes(found.adapter(name).double(), model), wanted)
        assert error < (2e-5 if family.name == "Phi3" else 1e-6)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "uni_lora"])
@ignore_cut_ranks
@examples(2)
@given(data=st.data())
def test_the_errors_are_those_of_the_weights(name, data, tmp_path_factory):
    family = data.draw(st.sampled_from([FAMILIES["Mistral"], PHI3, GPT2]), "family")
    model, truth, folder = family.model(), {}, tmp_path_factory.mktemp("loras")
    paths = sorted({site.path for site in lortalib.nn.sites(model)})
    number = data.draw(st.integers(1, 2), "number of LoRAs")
    for k in range(number):
        targets = data.draw(st.lists(st.sampled_from(paths), min_size=1, unique=True), "targets")
        options = {"r": data.draw(st.integers(1, 4)), "use_rslora": data.draw(st.booleans())}
        options["alpha_pattern"] = {targets[0]: 7}
        truth[f"no{k}"] = random_lora(
            family,
            folder / f"no{k}",
            seed=data.draw(st.integers(0, 99)),
            targets=targets,
            **options,
        )
    found = compress(
        model,
        [folder / own for own in truth],
        lines(name, number),
        data.draw(st.integers(1, 2), "rank"),
        gqa=data.draw(st.sampled_from(["pool", "split"])),
        sweeps=2,
    )
    made = {own: changes(found.adapter(own).double(), model) for own in truth}
    whole = [{(n, p): t for n, each in d.items() for p, t in each.items()} for d in (made, truth)]
    assert found.error == pytest.approx(relative(*whole), abs=1e-6)
    for each in found.errors:
        site, zero = each.site, torch.zeros_like(made[each.adapter][each.site.path])
        wanted = truth[each.adapter].get(site.path, zero)
        gap = made[each.adapter][site.path] - wanted
        for tensor, norms in ((wanted, each.norms), (gap, each.errors)):
            heads = tensor.mT if site.writer else tensor
            heads = heads[features(site)].reshape(site.heads, -1)
            assert list(norms) == pytest.approx(heads.norm(dim=1).tolist(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "line", ["cp", "tucker", "tt", "ring", "in p, adapter layer matrix p q, head out q"]
)
@ignore_cut_ranks
def test_an_adapter_is_its_slice_of_the_tensor_in_the_same_line(line, tmp_path):
    names = ["ann", "bob", "cy"]
    for k, name in enumerate(names):
        random_lora(LLAMA, tmp_path / name, seed=k)
    found = compress(LLAMA.model(), [tmp_path / name for name in names], line, 3, sweeps=5)
    joint = found.networks["layers"]
    assert joint.shape["adapter"] == 3
    for bond in joint.ranks:  # balanced, so that further training takes steps of one size
        at = [
            (term.legs.index(bond), t)
            for term, t in zip(joint.legs.terms, joint.tensors)
            if bond in term.legs
        ]
        means = [t.movedim(axis, 0).flatten(1).square().mean().sqrt().item() for axis, t in at]
        assert max(means) < 4 * min(means)
    for k, name in enumerate(names):
        own = found.adapter(name).networks["layers"]
        assert torch.allclose(own.dense(), joint.select(adapter=k).dense(), atol=1e-5)
        named = get_format(line).legs(own.shape)
        if "adapter" not in line:
            assert str(own.legs) == str(named)
            assert found.adapter(name).config.decomposition == line
    # Two adapters differ in the parameter that carries the leg or absorbed it, and share the others.
    one, other = (found.adapter(name).networks["layers"].tensors for name in names[:2])
    assert sum(not torch.equal(a, b) for a, b in zip(one, other)) == 1


def test_a_layer_and_matrix_that_no_lora_adapts_is_free(tmp_path):
    """One term of CP, on q of layer 0 and k of layer 1: the tensor is not asked to be zero elsewhere."""
    family = FAMILIES["Bert"]
    attention = "encoder.layer.{}.attention.self.{}"
    paths = [attention.format(0, "query"), attention.format(1, "key")]
    random_lora(family, tmp_path, targets=paths, r=1)
    file = tmp_path / "adapter_model.safetensors"
    held = tensors_of(tmp_path)  # the two modules get equal pairs
    for side in "AB":
        first, second = (key for key in sorted(held) if f"lora_{side}" in key)
        held[second] = held[first].clone()
    for key in held:
        if "lora_B" in key:  # one head alone, as a term of CP has
            held[key][4:] = 0
    save_file(held, file)
    found = compress(family.model(), tmp_path, "cp", 1, sweeps=30)
    assert found.error < 1e-5


def test_a_key_value_head_counts_once(tmp_path):
    """The error of a fit is that of the weights where the copies of a head stay equal."""
    random_lora(LLAMA, tmp_path, seed=3)
    rank_one = "layer matrix in r, layer matrix head out r"
    found = compress(LLAMA.model(), tmp_path, rank_one, 1, sweeps=50)
    assert found.fits["layers"].error == pytest.approx(found.error, rel=1e-4)


def test_least_squares_reach_the_best_pairs(tmp_path):
    """In the line of LoRA each weight's best pair is its truncated SVD (Eckart and Young 1936)."""
    family = FAMILIES["Bert"]
    truth = random_lora(family, tmp_path, seed=5, r=4)
    found = compress(family.model(), tmp_path, "lora", 2, sweeps=300, tolerance=1e-12)
    tails = [torch.linalg.svdvals(change)[2:].square().sum() for change in truth.values()]
    total = sum(change.square().sum() for change in truth.values())
    assert found.error == pytest.approx(math.sqrt(sum(tails) / total), rel=1e-3)


def test_no_update_is_formed(tmp_path):
    config = {**LLAMA.sizes, "hidden_size": 128, "intermediate_size": 64, "head_dim": 32}
    family = type(LLAMA)("Llama", config, {})
    random_lora(family, tmp_path)
    config = family.model().config  # without weights, which would be counted too
    with LargestTensor() as made:
        found = compress(config, tmp_path, "cp", 8, sweeps=3)
    assert 0 < found.error < 1
    # The largest has a factor of the target's legs and the rank of CP: one update has 128 * 128 entries.
    assert made.entries <= 2 * 4 * 128 * 8


def test_tables_sum_the_errors_up(tmp_path):
    for k, name in enumerate(("ann", "bob")):
        random_lora(LLAMA, tmp_path / name, seed=k)
    found = compress(LLAMA.model(), [tmp_path / "ann", tmp_path / "bob"], "cp", 4, sweeps=5)
    sizes = {"adapter": 2, "layer": 2, "matrix": 4, "head": 4 + 2 * 2}
    for kind, number in sizes.items():
        rows = found.table(kind)
        assert len(rows) == len({row[kind] for row in rows}) == number
        norm, error = (math.hypot(*(row[key] for row in rows)) for key in ("norm", "error"))
        assert error / norm == pytest.approx(found.error)
        assert rows[0]["relative"] == pytest.approx(rows[0]["error"] / rows[0]["norm"])
    with pytest.raises(
        ValueError, match="summed up by adapter, layer, matrix, head; found 'stack'"
    ):
        found.table("stack")
    text = str(found)
    assert "Compression of ann, bob to cp" in text
    assert "layers v" in text


def test_modules_that_an_adapter_leaves_alone_stay_as_they_are(tmp_path):
    family = FAMILIES["Bert"]
    random_lora(family, tmp_path / "q", targets=["query"], seed=1)
    random_lora(family, tmp_path / "v", targets=["value"], seed=2)
    model = family.model()
    found = compress(model, [tmp_path / "q", tmp_path / "v"], EXACT, 3, sweeps=20)
    assert found.error < 1e-5
    rows = {(e.adapter, e.site.role): e for e in found.errors if e.site.layer == 0}
    assert sum(rows["q", "v"].norms) == 0
    assert max(rows["q", "v"].errors) < 1e-6
    assert changes(found.adapter("q"), model).keys() == changes(found.adapter("v"), model).keys()


# --- doors ----------------------------------------------------------------------------------------


def test_what_is_saved_does_what_the_loras_did(inputs, tmp_path):
    for k, name in enumerate(("ann", "b.o.b")):
        random_lora(LLAMA, tmp_path / name, "ForCausalLM", seed=k)
    model = LLAMA.model("ForCausalLM")
    with unchanged(model):
        found = compress(model, [tmp_path / "ann", tmp_path / "b.o.b"], EXACT, 3, sweeps=20)
        out = found.save(tmp_path / "deep" / "out")
    assert sorted(path.name for path in out.iterdir()) == ["ann", "b_o_b"]
    for name, own in (("ann", "ann"), ("b_o_b", "b.o.b")):
        fresh = LLAMA.model("ForCausalLM")
        lortalib.nn.load(fresh, out / name)
        expected = output(loaded_by_peft(LLAMA, tmp_path / own, "ForCausalLM"), inputs)
        assert close(output(fresh, inputs), expected, 1e-3)


def test_a_bank_takes_them(inputs, tmp_path):
    for k, name in enumerate(("ann", "bob")):
        random_lora(LLAMA, tmp_path / name, "ForCausalLM", seed=k)
    model = LLAMA.model("ForCausalLM")
    found = compress(model, [tmp_path / "ann", tmp_path / "bob"], "cp", 4, sweeps=5)
    out = found.save(tmp_path / "out")
    bank = lortalib.nn.bank(model, "cp", 4)
    bank["ann"] = found.adapter("ann")
    bank["bob"] = out / "bob"
    with bank.using(["bob", "ann"]):
        rows = output(model, inputs)
    bank.remove()
    for name, row in (("bob", rows[:1]), ("ann", rows[1:])):
        adapter = lortalib.nn.load(model, out / name)
        own = {key: value[:1] if name == "bob" else value[1:] for key, value in inputs.items()}
        assert close(output(model, own), row)
        adapter.remove()


@pytest.mark.parametrize(
    ("line", "one"),
    [
        ("jd", "jd"),
        ("jd_diag", "jd_diag"),
        ("in p, adapter layer matrix p q, head out q", "in p, layer matrix p q, head out q"),
        ("cp", "in r, out r, head r, layer r, matrix r, r"),
    ],
)
@pytest.mark.parametrize("shared", [(), ("in", "out")])
def test_one_folder_holds_all_with_what_they_share_once(line, one, shared, inputs, tmp_path):
    for k, name in enumerate("abc"):
        random_lora(LLAMA, tmp_path / name, "ForCausalLM", seed=k)
    model = LLAMA.model("ForCausalLM")
    folders = [tmp_path / name for name in "abc"]
    found = compress(model, folders, line, 2, sweeps=2, joint=True)
    out = found.save(tmp_path / "together")
    assert [file.name for file in out.iterdir()] == ["adapter.safetensors"]
    numbers = load_file(out / "adapter.safetensors").values()
    assert sum(tensor.numel() for tensor in numbers) == found.count()

    adapter = lortalib.nn.load(model, out)
    assert adapter.tasks == found.names == ("a", "b", "c")
    with adapter.using(["c", "a"]):
        wanted = output(model, inputs)
    adapter.remove()
    bank = lortalib.nn.bank(model, one, 2, shared=shared)
    for fill in (lambda: bank.load(out), lambda: bank.update(found.task_adapter())):
        fill()
        assert list(bank) == ["a", "b", "c"]
        with bank.using(["c", "a"]):
            assert close(output(model, inputs), wanted)
        for name in found.names:
            assert (
                relative(changes(bank.adapter(name), model), changes(found.adapter(name), model))
                < 1e-5
            )
            del bank[name]
    bank.remove()
    for name in found.names:
        task = lortalib.nn.read(out, task=name)
        assert relative(changes(task, model), changes(found.adapter(name), model)) < 1e-5


def test_what_cannot_be_a_task_is_refused_before_the_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("lortalib.decomp.fit", None)
    family, kind = FAMILIES["Bert"], "ForSequenceClassification"
    random_lora(family, tmp_path / "lora", kind, modules_to_save=["classifier"])
    random_lora(family, tmp_path / "plain", kind)
    model = family.model(kind)
    whole, plain = {"one": tmp_path / "lora"}, {"one": tmp_path / "plain"}
    with pytest.raises(ValueError, match="'one' has its own classifier, trained as a whole"):
        compress(model, whole, "cp", 2, joint=True)
    with pytest.raises(ValueError, match="name of a task"):
        compress(model, {"mean": tmp_path / "plain"}, "cp", 2, joint=True)
    with pytest.raises(ValueError, match="no dropout"):
        compress(model, plain, "cp", 2, joint=True, dropout=0.5)
    with pytest.raises(LegsError, match="'task' alone"):
        compress(model, plain, "in r, out r, head r, layer r, matrix r, adapter", 2, joint=True)
    with pytest.raises(TypeError, match="joint must be True or False"):
        compress(model, plain, "cp", 2, joint="together")


def test_a_single_adapter_is_a_task_if_asked_for(folder, llama, tmp_path):
    alone = compress(llama, folder, "cp", 2, sweeps=1)
    with pytest.raises(ValueError, match="holds 'lora' alone; take adapter"):
        alone.task_adapter()
    found = compress(llama, folder, "cp", 2, sweeps=1, joint=True)
    assert lortalib.nn.read(found.save(tmp_path / "out")).tasks == ("lora",)


def test_one_adapter_is_saved_to_the_folder_itself_with_its_head(tmp_path):
    family, kind = FAMILIES["Bert"], "ForSequenceClassification"
    random_lora(family, tmp_path / "lora", kind, modules_to_save=["classifier"])
    loaded = family.model(kind)
    wanted = lortalib.nn.load_lora(loaded, tmp_path / "lora")
    with torch.no_grad():
        for parameter in loaded.classifier.parameters():
            parameter.normal_()
    wanted.save(tmp_path / "own")
    found = compress(family.model(kind), tmp_path / "own", "lora", 3, dropout=0.25)
    assert found.names == ("own",)
    out = found.save(tmp_path / "out")
    model = family.model(kind)
    adapter = lortalib.nn.load(model, out)
    assert adapter.dropout == 0.25
    assert close(output(model, family.inputs()), output(loaded, family.inputs()), 1e-4)
    assert found.adapter().trained_modules is not found.adapter().trained_modules


@pytest.mark.parametrize("decomposition", ["cp", "lotr", "indscal"])
def test_adapters_of_lortalib_are_compressed_too(decomposition, inputs, tmp_path):
    model = LLAMA.model("ForCausalLM")
    adapter = put(model, decomposition, 2, alpha=0.3)
    expected = output(model, inputs)
    adapter.save(tmp_path / "own")
    lortalib.nn.convert(tmp_path / "own", tmp_path / "as_peft")
    adapter.remove()
    # A module of a tensor on the stream has a pair of rank 16 at most here, the width.
    found = compress(model, [tmp_path / "own", tmp_path / "as_peft"], EXACT, 4, sweeps=30)
    assert found.error < 1e-5
    out = found.save(tmp_path / "out")
    lortalib.nn.load(model, out / "as_peft")
    assert close(output(model, inputs), expected, 1e-3)


def test_a_configuration_is_enough(tmp_path):
    random_lora(LLAMA, tmp_path / "lora", "ForCausalLM")
    model = LLAMA.model("ForCausalLM")
    model.config.architectures = ["LlamaForCausalLM"]
    found = compress(model.config, tmp_path / "lora", "tt", 2, sweeps=3)
    lortalib.nn.load(model, found.save(tmp_path / "out"))
    with pytest.raises(TypeError, match="expected a model"):
        compress("folder", tmp_path / "lora")


def test_a_line_that_names_its_mode_has_it_for_one_adapter(tmp_path):
    random_lora(LLAMA, tmp_path)
    for line, mode in (
        ("metatt_41d", "task"),
        ("in p, adapter layer matrix p q, head out q", "adapter"),
    ):
        found = compress(LLAMA.model(), tmp_path, line, 2, sweeps=3)
        assert found.mode == mode
        assert found.networks["layers"].shape[mode] == 1
        assert found.adapter().networks["layers"].modes == ("layer", "head", "matrix", "in", "out")


def test_progress_is_reported_and_the_first_fit_can_be_stopped(tmp_path):
    random_lora(LLAMA, tmp_path / "lora")
    seen = []

    def stop(group, number, error):
        seen.append((group, number))
        if number == 2:
            raise KeyboardInterrupt

    model = LLAMA.model()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "lora", "cp", 2, progress=stop)
    assert seen == [("layers", 1), ("layers", 2)]


def test_a_save_that_fails_leaves_nothing(tmp_path):
    for k, name in enumerate(("ann", "bob")):
        random_lora(LLAMA, tmp_path / name, seed=k)
    found = compress(LLAMA.model(), [tmp_path / "ann", tmp_path / "bob"], "cp", 2, sweeps=2)
    before = sorted(tmp_path.iterdir())
    place = "lortalib.nn._compress.compression.save"
    write = lortalib.nn._files.save
    for error in (OSError("full"), KeyboardInterrupt()):

        def fail(adapter, folder, model, error=error):
            if adapter.name == "bob":
                raise error
            return write(adapter, folder, model=model)

        with mock.patch(place, fail), pytest.raises(type(error)):
            found.save(tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    found.save(tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        found.save(tmp_path / "out")


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    random_lora(LLAMA, tmp_path / "lora", "ForCausalLM")
    return tmp_path / "lora"


@pytest.mark.parametrize("line", ["indscal", "rescal", "in r, out r (tied), layer matrix r"])
def test_tensors_on_the_stream_are_refused(line, folder, llama):
    with unchanged(llama), pytest.raises(ValueError, match="Choose 'cp', 'tucker', 'cp_matrix'"):
        compress(llama, folder, line, 4)


@pytest.mark.parametrize("made", [LLAMA, FAMILIES["Bert"]], ids=["Llama", "Bert"])
def test_a_configuration_that_names_no_head_is_told_from_the_model_with_it(made, tmp_path):
    model = made.model("ForSequenceClassification")
    put(model).export_lora(tmp_path / "lora")
    config = type(model.config)(**model.config.to_dict() | {"architectures": None})
    with pytest.raises(
        AdapterFileError, match=r"so the head differs.*config.architectures"
    ) as caught:
        compress(config, tmp_path / "lora", "cp", 2)
    assert f"adapts {model.base_model_prefix}." in str(caught.value)
    config.architectures = [type(model).__name__]
    assert compress(config, tmp_path / "lora", "cp", 2).names == ("lora",)


def test_impossible_arguments_are_refused(folder, llama, tmp_path):
    with unchanged(llama):
        for line in (max, lambda shape: None):
            with pytest.raises(ValueError, match="name of a format or a line of legs"):
                compress(llama, folder, line)
        with pytest.raises(ValueError, match="nothing to compress"):
            compress(llama, [])
        with pytest.raises(ValueError, match="both called 'lora'; give names"):
            compress(llama, [folder, folder / "adapter_model.safetensors"])
        for name in ("a.b", "a/b", "", 3):
            with pytest.raises(ValueError, match="without dots and slashes"):
                compress(llama, {name: folder})
        with pytest.raises(ValueError, match="gqa must be"):
            compress(llama, folder, gqa="mean")
        with pytest.raises(ValueError, match="dropout must be"):
            compress(llama, folder, dropout=1.5)
        with pytest.raises(FileNotFoundError):
            compress(llama, tmp_path / "absent")
        with pytest.raises(ValueError, match="hashed parameters share numbers"):
            compress(llama, folder, "uni_lora")
    found = compress(llama, folder, "cp", 2, sweeps=1)
    with pytest.raises(KeyError, match="no adapter 'ann'; this holds 'lora'"):
        found.adapter("ann")


def test_a_line_without_a_leg_for_the_adapters_is_told_where_to_have_it(folder, llama):
    with pytest.raises(LegsError, match="'in p, adapter layer matrix p q, head out q'"):
        compress(llama, {"one": folder, "other": folder}, "lotr", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "trains biases"),
        ({"peft_type": "IA3"}, "describes no LoRA but 'IA3'"),
    ],
)
def test_what_is_no_low_rank_pair_is_refused(changes, message, folder, llama):
    edit(folder, **changes)
    with unchanged(llama), pytest.raises(AdapterFileError, match=message):
        compress(llama, folder)


def test_other_models_are_refused(folder):
    for family, message in ((FAMILIES["Bert"], "does not have"), (FAMILIES["Mistral"], "x 16")):
        model = family.model("ForMaskedLM" if family.name == "Bert" else "ForCausalLM")
        with pytest.raises(AdapterFileError, match=message):
            compress(model, folder)


def test_an_adapter_on_the_stream_needs_the_weights(llama, tmp_path):
    put(llama, "indscal", 2).save(tmp_path)
    llama.config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(ValueError, match="Give the model with its weights"):
        compress(llama.config, tmp_path)


def test_packed_experts_are_refused(tmp_path):
    model = MIXTRAL.model("ForCausalLM")
    put(model, "cp", 2, targets="mlp").save(tmp_path)
    with pytest.raises(ValueError, match="packs experts"):
        compress(MIXTRAL.model("ForCausalLM"), tmp_path)


# --- a real model ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_loras_of_minilm(asset, tmp_path):
    """Two LoRAs of the shape that people train: a larger rank is nearer, and the largest is exact."""
    folders = []
    for k in range(2):
        torch.manual_seed(k)
        model = AutoModel.from_pretrained(asset("minilm"))
        config = peft.LoraConfig(
            r=8,
            target_modules="all-linear",
            exclude_modules=["pooler.dense"],
            init_lora_weights=False,
        )
        peft.get_peft_model(model, config).save_pretrained(tmp_path / f"no{k}")
        folders.append(tmp_path / f"no{k}")
    model = AutoModel.from_pretrained(asset("minilm"))
    errors = [compress(model, folders, EXACT, rank, sweeps=30).error for rank in (1, 4, 8)]
    assert 1 > errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    found = compress(model, folders, "in p, adapter layer matrix p q, head out q", 32, sweeps=10)
    assert {site.role for site in found.adapter("no0").sites} >= {"q", "k", "v", "o", "up", "down"}
    lortalib.nn.load(model, found.save(tmp_path / "out") / "no1")
