"""acts(): every network of an adapter changes what the model computes, and is noticed if not."""

import math

import pytest
import torch
import transformers
from adapted import output, put, unchanged
from models import BERT, CLIP, FAMILIES, image, image_and_words, words

from lortalib.nn import apply, check_effect
from lortalib.nn._adapters import host_of

SIGLIP = CLIP | {"text_config": {**BERT, "projection_size": 16}}


def siglip():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.SiglipModel(transformers.SiglipConfig(**SIGLIP))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("init", ["invariant", "normal"])
def test_every_network_acts(name, init):
    family = FAMILIES[name]
    adapter = put(family.model(), init=init)
    with unchanged(adapter.model):
        found = check_effect(adapter, family.inputs())
    assert found == dict.fromkeys((group.name for group in adapter.groups), True)


def test_networks_on_weights_that_are_read_directly_act():
    adapter = put(siglip())
    assert set(check_effect(adapter, image_and_words()).values()) == {True}


@pytest.mark.parametrize("decomposition", ["cp", "tucker", "tt", "lora"])
def test_any_format(decomposition):
    family = FAMILIES["T5"]
    adapter = apply(family.model(), decomposition, 2)
    assert set(check_effect(adapter, family.inputs()).values()) == {True}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision(dtype):
    model = FAMILIES["Bert"].model().to(dtype)
    assert check_effect(put(model, init="invariant"), words()) == {"encoder": True}


def test_shares_that_are_lost_are_noticed():
    adapter = put(FAMILIES["Bert"].model())
    host_of(adapter.model)._detach(adapter)
    with unchanged(adapter.model):
        assert check_effect(adapter, words()) == {"encoder": False}


def test_networks_that_the_inputs_do_not_reach_are_named():
    class Sight(transformers.CLIPModel):
        def forward(self, pixel_values):
            return self.get_image_features(pixel_values=pixel_values)

    model = Sight(transformers.CLIPConfig(**CLIP))
    adapter = apply(model, "cp", 2)
    assert check_effect(adapter, image()) == {
        group.name: group.name.startswith("vision") for group in adapter.groups
    }


def test_the_tolerance_is_what_an_entry_has_to_change():
    adapter = put(FAMILIES["Bert"].model())
    assert check_effect(adapter, words(), tolerance=0.1) == {"encoder": True}
    assert check_effect(adapter, words(), tolerance=math.inf) == {"encoder": False}


def test_inputs_can_be_positional():
    adapter = put(FAMILIES["Conv1D"].model())
    x = torch.randn(2, 5, 10)
    assert (
        check_effect(adapter, x)
        == check_effect(adapter, (x,))
        == check_effect(adapter, [x])
        == {"layers": True}
    )


def test_inputs_with_labels_whose_loss_is_a_single_number():
    family = FAMILIES["Llama"]
    model = family.model("ForCausalLM").eval()
    ids = torch.tensor([[3, 14, 15, 9]])
    inputs = {"input_ids": ids, "labels": ids}
    assert check_effect(apply(model, "cp", 2), inputs) == {"layers": True}


def test_random_models_are_compared_under_the_same_random_numbers():
    model = FAMILIES["Bert"].model()
    model.embeddings.register_forward_hook(lambda _, args, out: out + torch.randn_like(out))
    adapter = put(model)
    host_of(model)._detach(adapter)
    state = torch.get_rng_state()
    assert check_effect(adapter, words()) == {"encoder": False}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_in_training_is_given_back_as_it_was():
    model = FAMILIES["Bert"].model().train()
    adapter = put(model)
    with unchanged(model):
        check_effect(adapter, words())
    model.encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        check_effect(adapter, words())


def test_an_error_while_perturbed_restores_every_bit():
    model = FAMILIES["Bert"].model()
    adapter = put(model)
    calls = iter([None, ZeroDivisionError])

    def fail_the_second_time(*_):
        error = next(calls)
        if error:
            raise error

    model.register_forward_pre_hook(fail_the_second_time)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        check_effect(adapter, words())


def test_merged_and_inactive_adapters_are_refused():
    adapter = put(FAMILIES["Bert"].model())
    before = output(adapter.model, words())
    adapter.merge()
    with pytest.raises(ValueError, match=r"is merged.*call adapter\.unmerge\(\) first"):
        check_effect(adapter, words())
    adapter.disable()
    with pytest.raises(ValueError, match=r"is not active.*call adapter\.enable\(\) first"):
        check_effect(adapter, words())
    adapter.enable()
    assert check_effect(adapter, words()) == {"encoder": True}
    assert torch.equal(output(adapter.model, words()), before)
