"""Adapters of hashed parameters: Uni-LoRA as PEFT has it, files without an index, banks of vectors."""

import copy
import json
import shutil

import peft
import pytest
import torch
from adapted import close, output, put, same_bits, unchanged
from models import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification
from wrapped_models import reloaded, wrapped

import lortalib
from lortalib.decomp import _hashed
from lortalib.nn._files.tensors import digest

LINE = "layer matrix in r (of n, seed 7), layer matrix head out r (of n, zero)"
RANK = {"r": 2, "n": 24}
LINE_OF_A_SUM = "layer matrix in r, layer matrix head out r (zero)"
FAMILY = FAMILIES["Llama"]


def hashed(model=None, line=LINE, **options):
    return put(FAMILY.model().eval() if model is None else model, line, RANK, **options)


def only(adapter):
    """The network of an adapter that has one."""
    (network,) = adapter.networks.values()
    return network


# --- PEFT's own Uni-LoRA --------------------------------------------------------------------------


def classifier():
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=2,
    )
    return BertForSequenceClassification(config).eval()


def indexed_as(theirs, network, roles):
    """Let every entry of the network be the number of the vector that it is in PEFT's layers, and no sign
    minus, as there."""
    layers = [
        [getattr(block.attention.self, role) for role in roles]
        for block in theirs.base_model.model.bert.encoder.layer
    ]
    near = torch.stack(
        [torch.stack([m.unilora_indices_A["default"].mT for m in own]) for own in layers]
    )
    far = torch.stack(
        [torch.stack([m.unilora_indices_B["default"] for m in own]) for own in layers]
    )
    index = torch.cat([near.reshape(-1), far.reshape(-1)])
    network.get_buffer("index_of_n").copy_(index)
    network.get_buffer("counts_of_n").copy_(torch.bincount(index))


def test_peft_s_vector_and_index_give_peft_s_output():
    """Published counts of Uni-LoRA are n and the head; PEFT and this library count the same."""
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    config = peft.UniLoraConfig(
        r=4,
        theta_d_length=64,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        init_theta_d_bound=5.0,
    )
    theirs = peft.get_peft_model(classifier(), config).eval()
    ours = classifier()
    adapter = lortalib.nn.apply(
        ours, "uni_lora", {"r": 4, "n": 64}, targets="qv", train_also=["classifier"], init="normal"
    )
    network = only(adapter)
    with torch.no_grad():
        network.theta_n.copy_(theirs.base_model.unilora_theta_d["default"])
        indexed_as(theirs, network, ["query", "value"])
    expected, found = output(theirs, ids), output(ours, ids)
    base = output(classifier(), ids)
    assert close(found, expected, 1e-5)
    assert not close(found, base, 1e-3)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (theirs, ours)]
    assert trained[0] == trained[1] == 64 + 32 * 2 + 2
    assert adapter.count() == 64


@pytest.mark.parametrize(
    ("layers", "heads", "width"), [(12, 12, 768), (24, 16, 1024)], ids=["base", "large"]
)
def test_the_published_count_is_that_of_the_vector(layers, heads, width):
    """RoBERTa, q and v, rank 4: the paper gives 0.023 M for both models, without the head."""
    shape = (layers, heads, 2, width, width // heads)
    net = lortalib.decomp.uni_lora(shape, {"r": 4, "n": 23_040}, device="meta")
    assert net.count() == 23_040
    assert sum(t.numel() for t in net.tensors) == layers * 2 * 4 * 2 * width


# --- training and forwards ------------------------------------------------------------------------


def test_a_step_of_the_vector_is_seen_by_the_next_forward():
    model = FAMILY.model().train()
    adapter, inputs = hashed(model, init="invariant"), FAMILY.inputs()
    theta = only(adapter).theta_n
    assert [p for p in adapter.parameters() if p.requires_grad] == [theta]
    optimizer = torch.optim.SGD([theta], 1.0)
    losses = []
    for _ in range(4):
        loss = model(**inputs)[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = 0.01 / theta.grad.norm().item()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    before = output(model.eval(), inputs)
    theta.data.mul_(2)  # leaves no trace in the version
    assert not close(output(model, inputs), before, 1e-6)


def test_a_forward_computes_the_factors_once(monkeypatch):
    model, calls = FAMILY.model().eval(), []
    hashed(model)
    entries = _hashed._entries

    def counted(*args):
        calls.append(args)
        return entries(*args)

    monkeypatch.setattr(_hashed, "_entries", counted)
    model(**FAMILY.inputs())[0].sum().backward()
    assert len(calls) == 2  # in the forward, and again in the backward, which saved no tensor
    output(model, FAMILY.inputs())
    output(model, FAMILY.inputs())
    assert len(calls) == 3  # the second finds the numbers of the first unchanged


def test_a_compiled_model_computes_the_same():
    model, inputs = FAMILY.model().eval(), FAMILY.inputs()
    adapter = hashed(model)
    expected = output(model, inputs)
    fast = torch.compile(model, backend="aot_eager")
    assert close(output(fast, inputs), expected, 1e-5)
    with torch.no_grad():
        only(adapter).theta_n.mul_(0.5)
    assert close(output(fast, inputs), output(model, inputs), 1e-5)


def test_two_vectors_and_marks_of_all_kinds_adapt_a_model():
    line = "in r (of n, frozen), head out r (of m), layer matrix r (zero)"
    adapter = put(FAMILY.model().eval(), line, {"r": 2, "n": 9, "m": 7}, init="normal")
    frozen = {name: p.requires_grad for name, p in only(adapter).named_parameters()}
    assert frozen == {"theta_n": False, "theta_m": True, "layer_matrix_r": True}
    assert adapter.count() == 7 + only(adapter).layer_matrix_r.numel()
    assert adapter.count(trainable_only=False) == adapter.count() + 9


def test_a_copy_of_the_model_has_an_index_of_its_own():
    model, inputs = FAMILY.model().eval(), FAMILY.inputs()
    hashed(model)
    twin = copy.deepcopy(model)
    assert same_bits(output(twin, inputs), output(model, inputs))
    low = model.to(torch.bfloat16)
    assert output(low, inputs).dtype == torch.bfloat16
    assert close(output(low, inputs).float(), output(twin, inputs), 0.1)


# --- files ----------------------------------------------------------------------------------------


def test_a_file_has_the_vector_and_the_seed_and_no_index(tmp_path):
    model, inputs = FAMILY.model().eval(), FAMILY.inputs()
    adapter = hashed(model)
    expected = output(model, inputs)
    folder = adapter.save(tmp_path)
    with safe_open(folder / "adapter.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"networks.layers.theta_n"}
        (group,) = json.loads(file.metadata()["lortalib"])["groups"]
    assert group["legs"] == str(lortalib.decomp.Legs.parse(LINE))
    assert group["legs"].count("(of n, seed 7)") == 2
    assert group["ranks"] == RANK
    assert (folder / "adapter.safetensors").stat().st_size < 24 * 4 + 8_000
    again = FAMILY.model().eval()
    loaded = lortalib.nn.load(again, folder)
    assert same_bits(output(again, inputs), expected)
    assert torch.equal(
        only(loaded).get_buffer("index_of_n"), only(adapter).get_buffer("index_of_n")
    )
    assert str(only(lortalib.nn.read(folder)).legs) == group["legs"]


def edited(folder, change):
    """Rewrite the description of a saved adapter, with a digest that fits it."""
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        value = json.loads(file.metadata()["lortalib"])
    change(value["groups"][0])
    text = json.dumps(value)
    save_file(tensors, path, {"format": "pt", "lortalib": text, "sha256": digest(text, tensors)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ranks": {"r": 2**24, "n": 24}}, r"hashes [\d,]+ entries; 134,217,728 are read"),
        ({"ranks": {"r": 2}}, "are not of its bonds"),
        ({"ranks": {"r": 2, "n": 25}}, "has the shape"),
        ({"parameters": ["theta_n", "theta_m"]}, "parameters of group .* are called"),
        ({"legs": LINE.replace("seed 7", "seed x")}, "unknown mark"),
        ({"legs": LINE.replace("of n, seed 7", "of in")}, "'in' is a mode"),
    ],
)
def test_a_damaged_description_is_refused(change, says, tmp_path):
    hashed().save(tmp_path)
    edited(tmp_path, lambda group: group.update(change))
    model = FAMILY.model()
    with unchanged(model), pytest.raises(lortalib.nn.AdapterFileError, match=says):
        lortalib.nn.load(model, tmp_path)


def test_another_seed_in_a_file_is_another_adapter(tmp_path):
    model, inputs = FAMILY.model().eval(), FAMILY.inputs()
    hashed(model).save(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    edited(
        tmp_path / "two",
        lambda group: group.update(legs=group["legs"].replace("seed 7", "seed 8")),
    )
    again = FAMILY.model().eval()
    lortalib.nn.load(again, tmp_path / "two")
    assert not close(output(again, inputs), output(model, inputs), 1e-3)


# --- other doors ----------------------------------------------------------------------------------


def test_a_bank_stores_vectors():
    model, inputs = FAMILY.model().eval(), FAMILY.inputs()
    bank = lortalib.nn.bank(model, LINE, RANK)
    rows = {}
    for seed, name in enumerate(("ann", "bob")):
        adapter = hashed(model, seed=seed)
        rows[name] = output(model, inputs)
        bank[name] = adapter
        adapter.remove()
    assert bank.count() == 24
    assert bank.nbytes == 2 * 24 * 4  # for each of two adapters one vector, which both terms have
    rows[None] = output(model, inputs)
    number = len(rows[None])
    names = [["bob", None, "ann"][k % 3] for k in range(number)]
    with bank.using(names):
        found = output(model, inputs)
    for k, name in enumerate(names):
        assert close(found[k], rows[name][k], 1e-5), name
    one, two = torch.ones(24), torch.zeros(24)
    with pytest.raises(ValueError, match="hashed from 'n' have one vector; found different ones"):
        bank["unlike"] = {"layers": [one, two]}
    bank["alike"] = {"layers": [one, one.clone()]}
    other = hashed(FAMILY.model(), LINE.replace("seed 7", "seed 8"))
    with pytest.raises(ValueError, match="has the legs"):
        bank["other"] = other


def test_peft_s_method_loads_it_and_adds_it_up(tmp_path):
    inputs = FAMILY.inputs()
    model = wrapped(decomposition="uni_lora", rank={"r": 2, "n": 40})
    expected = output(model, inputs)
    again = reloaded(model, tmp_path)
    assert same_bits(output(again, inputs), expected)
    assert again.get_nb_trainable_parameters()[0] in (0, 40)
    model.add_weighted_adapter(["default"], [1.0], "sum")
    model.set_adapter("sum")
    assert close(output(model, inputs), expected, 1e-5)
    assert model.peft_config["sum"].decomposition == LINE_OF_A_SUM
    assert not only(model.base_model.lorta_adapters["sum"]).vectors


def test_an_adapter_shares_no_hashed_input_factor():
    model = FAMILY.model()
    adapter = put(
        model, LINE.replace("layer matrix in", "in"), RANK, targets="all", share_residual=True
    )
    assert adapter.count() == 24 * len(adapter.networks)
