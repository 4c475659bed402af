"""Names of the base stay names of the base's parameters, also where a weight is read directly."""

import pytest
import torch
from adapted import put
from models import FAMILIES
from torch import nn
from transformers import MixtralConfig, MixtralModel, SiglipVisionConfig, SiglipVisionModel

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}


def mixtral():
    config = MixtralConfig(
        vocab_size=64, num_hidden_layers=1, num_key_value_heads=2, num_local_experts=2, **SIZES
    )
    return MixtralModel(config)


def siglip():
    config = SiglipVisionConfig(num_hidden_layers=1, image_size=8, patch_size=4, **SIZES)
    return SiglipVisionModel(config)


def llama():
    return FAMILIES["Llama"].model("ForCausalLM")


@pytest.mark.parametrize("make", [mixtral, siglip, llama])
def test_a_parameter_is_found_by_its_name(make):
    model = make()
    own = dict(model.named_parameters())
    modules = dict(model.named_modules())
    for name in ("a", "b"):
        adapter = put(model, targets="all", name=name)
    for state in ("active", "merged", "disabled"):
        for name, parameter in own.items():
            assert model.get_parameter(name) is parameter, (state, name)
        for name, module in modules.items():
            assert model.get_submodule(name) is module
        (adapter.merge if state == "active" else adapter.disable)()
    adapter.enable()
    site = next((s for s in adapter.sites if s.weight_read_directly), None)
    if site is not None:  # all other code reads the weight with the update
        module = model.get_submodule(site.path)
        read = getattr(module, site.parameter)
        assert not isinstance(read, nn.Parameter)
        assert not torch.equal(read, model.get_parameter(f"{site.path}.{site.parameter}"))
