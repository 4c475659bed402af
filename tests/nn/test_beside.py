"""train_also: modules that train whole beside an adapter, and belong to it."""

import copy

import pytest
import torch
from adapted import bits, changes, output, picture, put, same_bits, unchanged
from models import FAMILIES

from lortalib.nn import AdapterFileError, load, load_lora, set_active

FAMILY = FAMILIES["Bert"]


@pytest.fixture
def model():
    return FAMILY.model("ForSequenceClassification")


def values(module):
    return {name: bits(tensor) for name, tensor in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def shift(module, by=1.0):
    """As if the module were trained."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


def test_it_trains_and_all_else_is_frozen(model):
    adapter = put(model, train_also=["classifier"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {f"lortalib.default.{name}" for name, _ in adapter.named_parameters()}
    assert trainable == own | {"classifier.weight", "classifier.bias"}
    assert adapter.count() == sum(p.numel() for p in adapter.parameters())
    assert "trained as a whole: classifier" in repr(adapter)


def test_a_name_is_a_path_or_the_end_of_one(model):
    adapter = put(model, train_also=["LayerNorm", "pooler", "classifier"], targets="q")
    norms = [path for path, _ in model.named_modules() if path.endswith("LayerNorm")]
    assert set(adapter.trained_modules.paths) == {*norms, "bert.pooler", "classifier"}
    assert len(norms) == 5
    assert all(model.get_submodule(path).weight.requires_grad for path in norms)


def test_a_module_inside_another_is_named_once(model):
    adapter = put(model, train_also=["bert.pooler", "bert.pooler.dense", "pooler"])
    assert adapter.trained_modules.paths == ("bert.pooler",)


def test_it_is_a_string_too(model):
    assert put(model, train_also="classifier").trained_modules.paths == ("classifier",)


@pytest.mark.parametrize("leave", ["disable", "remove", "activate", "disabled"])
def test_the_base_comes_back(model, leave):
    before, look = values(model.classifier), picture(model)
    expected = output(model, FAMILY.inputs())
    adapter = put(model, train_also=["classifier"])
    assert same(values(model.classifier), before)
    shift(model.classifier)
    trained = output(model, FAMILY.inputs())
    if leave == "disabled":
        with adapter.disabled():
            assert same_bits(output(model, FAMILY.inputs()), expected)
        assert same_bits(output(model, FAMILY.inputs()), trained)
        adapter.disable()
    elif leave == "activate":
        set_active(model, [])
    else:
        getattr(adapter, leave)()
    assert same(values(model.classifier), before)
    assert same_bits(output(model, FAMILY.inputs()), expected)
    if leave != "remove":
        adapter.enable()
        assert same_bits(output(model, FAMILY.inputs()), trained)
        adapter.remove()
    assert changes(look, picture(model)) == []


def test_a_name_given_twice_to_activate_counts_once(model):
    adapter = put(model, train_also=["classifier"])
    set_active(model, ["default", "default"])
    assert adapter.active


def test_merging_keeps_it_and_removing_merged_leaves_it(model):
    before = values(model.classifier)
    adapter = put(model, train_also=["classifier"])
    shift(model.classifier)
    trained = values(model.classifier)
    adapter.merge()
    assert same(values(model.classifier), trained)
    adapter.unmerge()
    assert same(values(model.classifier), trained)
    adapter.disable()
    assert same(values(model.classifier), before)
    adapter.remove(merged=True)
    assert same(values(model.classifier), trained)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "lortalib")


def test_buffers_and_integers_come_back_too(model):
    model.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(16), model.classifier).eval()
    look = picture(model)
    adapter = put(model, train_also=["classifier"])
    model.train()
    output(model, FAMILY.inputs())
    model.eval()
    assert model.classifier[0].num_batches_tracked == 1
    adapter.remove()
    assert model.classifier[0].num_batches_tracked == 0
    assert changes(look, picture(model)) == []


def test_two_with_one_head_take_turns(model):
    """Each has values of its own; the module holds those of the active one."""
    base = values(model.classifier)
    first = put(model, name="a", train_also=["classifier"])
    shift(model.classifier, 1)
    of_first = values(model.classifier)
    with unchanged(model), pytest.raises(ValueError, match="'classifier' is trained by another"):
        put(model, name="b", train_also=["classifier"])
    first.disable()
    second = put(model, name="b", train_also=["classifier"])
    assert same(values(model.classifier), base)
    shift(model.classifier, -1)
    of_second = values(model.classifier)

    with unchanged(model), pytest.raises(ValueError, match="disable that adapter first"):
        first.enable()
    with unchanged(model), pytest.raises(ValueError, match="cannot be active together"):
        set_active(model, ["a", "b"])
    with unchanged(model), pytest.raises(ValueError, match="disable that adapter first"):
        first.merge()

    for name, expected in (("a", of_first), ("b", of_second), ("a", of_first)):
        set_active(model, name)
        assert same(values(model.classifier), expected)
    set_active(model, [])
    assert same(values(model.classifier), base)
    assert all(p.requires_grad for p in model.classifier.parameters())

    set_active(model, "a")
    second.remove()
    assert same(values(model.classifier), of_first)
    assert model.classifier.weight.requires_grad
    first.remove()
    assert same(values(model.classifier), base)


def test_another_adapter_without_a_head_does_not_freeze_it(model):
    first = put(model, name="a", train_also=["classifier"])
    second = put(model, name="b")
    assert model.classifier.weight.requires_grad
    second.remove()
    assert model.classifier.weight.requires_grad
    assert not model.bert.pooler.dense.weight.requires_grad
    first.remove()
    assert model.bert.pooler.dense.weight.requires_grad


def test_it_is_saved_and_loaded(model, tmp_path):
    base = values(model.classifier)
    adapter = put(model, train_also=["classifier", "pooler"])
    shift(model.classifier, 1)
    shift(model.bert.pooler, -1)
    trained, expected = values(model.classifier), output(model, FAMILY.inputs())
    adapter.save(tmp_path / "active")
    adapter.disable()
    adapter.save(tmp_path / "disabled")
    for folder in ("active", "disabled"):
        other = FAMILY.model("ForSequenceClassification")
        look = picture(other)
        loaded = load(other, tmp_path / folder)
        assert same(values(other.classifier), trained)
        assert same_bits(output(other, FAMILY.inputs()), expected)
        assert other.classifier.weight.requires_grad
        assert not other.bert.embeddings.LayerNorm.weight.requires_grad
        loaded.remove()
        assert changes(look, picture(other)) == []

        loaded = load(other, tmp_path / folder, active=False)
        assert same(values(other.classifier), base)
        loaded.enable()
        assert same_bits(output(other, FAMILY.inputs()), expected)


def test_values_beyond_the_models_dtype_are_refused(model, tmp_path):
    model.classifier.double()
    adapter = put(model, train_also=["classifier"])
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e39
    adapter.save(tmp_path / "own")
    adapter.export_lora(tmp_path / "lora")
    other = FAMILY.model("ForSequenceClassification")
    message = r"classifier\.weight, .* holds 1e\+39, which is beyond torch.float32"
    for read, folder in ((load, "own"), (load_lora, "lora")):
        with unchanged(other), pytest.raises(AdapterFileError, match=message):
            read(other, tmp_path / folder)


def test_loading_it_beside_an_active_one_needs_active_false(model, tmp_path):
    adapter = put(model, train_also=["classifier"])
    adapter.save(tmp_path)
    with unchanged(model), pytest.raises(ValueError, match="or pass active=False"):
        load(model, tmp_path, name="b")
    load(model, tmp_path, name="b", active=False)
    assert not adapter.trained_modules.conflict([])
    set_active(model, "b")


def test_a_copied_model_keeps_its_own_head(model):
    put(model, train_also=["classifier"])
    shift(model.classifier)
    trained = values(model.classifier)
    twin = copy.deepcopy(model)
    set_active(model, [])
    assert same(values(twin.classifier), trained)
    set_active(twin, [])
    assert same(values(twin.classifier), values(model.classifier))
