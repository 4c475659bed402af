"""The mode of an adapter, and what of it trains, whichever of PEFT's calls set them."""

import pytest
from adapted import output, same_bits
from wrapped_models import LLAMA, reloaded, second, wrapped


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_gets_the_mode_of_its_model(training):
    model = wrapped().train(training)
    second(model, dropout=0.5)
    model.set_adapter("other")
    one, two = (output(model, LLAMA.inputs()) for _ in range(2))
    assert same_bits(one, two) != training


def switched(model, tmp_path):
    second(model, decomposition="vera")
    model.set_adapter("other")
    model.set_adapter("default")
    return model


def flagged(model, tmp_path):
    model.set_requires_grad("default", True)
    return model


def enabled(model, tmp_path):
    with model.disable_adapter():
        pass
    return model


def loaded(model, tmp_path):
    return reloaded(model, tmp_path, is_trainable=True)


@pytest.mark.parametrize("verb", [switched, flagged, enabled, loaded])
def test_what_is_frozen_stays_frozen(verb, tmp_path):
    model = verb(wrapped(decomposition="vera"), tmp_path)
    for network in model.base_model.lorta_adapters["default"].networks.values():
        terms = network.legs.terms
        assert {term.frozen for term in terms} == {True, False}
        for term, parameter in zip(terms, network.stored, strict=True):
            assert parameter.requires_grad != term.frozen
    other = model.get_base_model().layers[0].mlp.up_proj.weight
    assert not other.requires_grad
