"""Modules that other code replaces after an adapter or a bank was put on the model."""

import copy
import pickle

import pytest
import torch
from adapted import output, put, same_bits
from banks import alone, filled, prompts, rows_of, small_llama
from torch import nn

import lortalib

PATH = "model.layers.0.self_attn.q_proj"


def replace(model, path):
    """Put a copy without hooks at a path; return the module that was there."""
    known = model.get_submodule(path)
    fresh = copy.deepcopy(known)
    for module in fresh.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    model.set_submodule(path, fresh)
    return known


DOORS = {
    "beside": lambda model: put(model),
    "stream": lambda model: put(model, acts_on="stream"),
    "tasks": lambda model: put(model, "metatt_41d", tasks=["news", "code"]),
}


def forward(model, adapter):
    if hasattr(adapter, "using"):
        with adapter.using("news"):
            return output(model, prompts())
    return output(model, prompts())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("path", [PATH, "model.layers.0.self_attn", "model.layers.1"])
def test_a_forward_that_would_miss_updates_is_refused(door, path):
    model = small_llama()
    adapter = DOORS[door](model)
    expected = forward(model, adapter)
    known = replace(model, path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=path.replace(".", r"\.") + r".* is another module"):
            forward(model, adapter)
    with adapter.disabled():
        assert same_bits(output(model, prompts()), output(small_llama(), prompts()))
    model.set_submodule(path, known)
    assert same_bits(forward(model, adapter), expected)
    replace(model, path)
    adapter.remove()
    assert same_bits(output(model, prompts()), output(small_llama(), prompts()))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
}
each_copy = pytest.mark.parametrize("way", COPIES)


@each_copy
@pytest.mark.parametrize("door", DOORS)
def test_a_copy_of_the_model_notices_it_too(door, way):
    model = small_llama()
    adapter = DOORS[door](model)
    expected = forward(model, adapter)
    copied = COPIES[way](model)
    own = lortalib.nn.adapters(copied)["default"]
    known = replace(copied, PATH)
    with pytest.raises(RuntimeError, match=f"{PATH} is another module"):
        forward(copied, own)
    assert same_bits(forward(model, adapter), expected)
    copied.set_submodule(PATH, known)
    assert same_bits(forward(copied, own), expected)
    own.remove()
    assert same_bits(output(copied, prompts()), output(small_llama(), prompts()))


@each_copy
def test_a_copy_of_a_model_with_a_bank_notices_it_too(way):
    model = small_llama()
    bank = filled(model, number=1)
    copied, own = COPIES[way]((model, bank))
    replace(copied, PATH)
    with pytest.raises(RuntimeError, match=f"{PATH} is another module"):
        rows_of(copied, own, [0, None], prompts())
    assert rows_of(model, bank, [0, None], prompts()).isfinite().all()


def test_rows_of_a_bank_that_would_miss_updates_are_refused():
    model = small_llama()
    bank = filled(model, number=1)
    replace(model, "model.layers.1.self_attn")
    with pytest.raises(RuntimeError, match=r"and so are 3 more.*save the adapter or the bank"):
        rows_of(model, bank, [0, None], prompts())
    assert same_bits(output(model, prompts()), alone(small_llama(), None, prompts()))
    bank.remove()
    assert rows_of(model, filled(model, number=1), [0, None], prompts()).isfinite().all()


def test_it_is_put_on_what_is_there_by_loading_it_again(tmp_path):
    model = small_llama()
    adapter = put(model)
    expected = output(model, prompts())
    replace(model, PATH)
    with pytest.warns(UserWarning, match="has changed since"):
        adapter.save(tmp_path)
    adapter.remove()
    lortalib.nn.load(model, tmp_path)
    assert same_bits(output(model, prompts()), expected)


def test_a_merged_adapter_is_in_the_weights_that_are_there():
    model = small_llama()
    adapter = put(model)
    expected = output(model, prompts())
    replace(model, PATH)
    adapter.merge()
    merged = output(model, prompts())
    torch.testing.assert_close(merged, expected)
    adapter.unmerge()
    assert same_bits(output(model, prompts()), expected)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("path", [PATH, "model.layers.1"])
def test_a_wrapper_around_a_module_replaces_nothing(path):
    model = small_llama()
    put(model)
    expected = output(model, prompts())
    model.set_submodule(path, Around(model.get_submodule(path)))
    for _ in range(2):
        assert same_bits(output(model, prompts()), expected)
    inner = model.get_submodule(path).inner
    model.set_submodule(path, inner)
    assert same_bits(output(model, prompts()), expected)


def test_a_module_that_takes_the_hooks_over_replaces_nothing():
    model = small_llama()
    put(model)
    expected = output(model, prompts())
    known = replace(model, PATH)
    model.get_submodule(PATH)._forward_hooks.update(known._forward_hooks)
    assert same_bits(output(model, prompts()), expected)


@pytest.mark.parametrize("left", [slice(0, 1), slice(1, 2)])
def test_layers_that_are_left_keep_their_updates(left):
    model = small_llama()
    adapter = put(model)
    layers = list(model.model.layers)
    model.model.layers = model.model.layers[left]
    found = output(model, prompts())
    model.model.layers = nn.ModuleList(layers)
    adapter.merge()
    adapter.remove(merged=True)
    model.model.layers = model.model.layers[left]
    torch.testing.assert_close(found, output(model, prompts()))


def test_layers_can_change_places():
    model = small_llama()
    put(model)
    expected = output(model, prompts())
    model.model.layers = nn.ModuleList(list(model.model.layers)[::-1])
    assert not same_bits(output(model, prompts()), expected)
    model.model.layers = nn.ModuleList(list(model.model.layers)[::-1])
    assert same_bits(output(model, prompts()), expected)
