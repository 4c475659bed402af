"""Banks whose networks have one parameter for ``in``."""

import pytest
import torch
from adapted import put
from banks import small_llama

import lortalib

OPTIONS = {"targets": "all", "share_residual": True}


def test_an_adapter_on_the_shared_sides_of_a_bank_has_one_in_and_is_saved(tmp_path):
    model = small_llama()
    bank = lortalib.nn.bank(model, "cp", 2, shared=("in",), **OPTIONS)
    adapter = lortalib.nn.apply(model, "cp", 2, shared=bank, **OPTIONS)
    sides = {id(net.get_parameter("in_r")) for net in adapter.networks.values()}
    assert len(sides) < len(adapter.networks)
    lortalib.nn.load(small_llama(), adapter.save(tmp_path))
    bank["ann"] = adapter


@pytest.mark.parametrize("shared", [("in",), ()])
def test_adapters_with_several_in_are_refused(shared):
    bank = lortalib.nn.bank(small_llama(), "cp", 2, shared=shared, alpha=2.0, **OPTIONS)
    with pytest.raises(ValueError, match=r"'x'.*share_residual=False|fit the bank.*share_residual"):
        bank["x"] = put(small_llama(), targets="all")
    assert len(bank) == 0
    bank["x"] = put(small_llama(), alpha=0.5, **OPTIONS)
    found = bank.adapter("x")
    for group in found.groups:
        own = bank["x"][group.name]
        terms = [term for term in bank.legs[group.name].terms if not term.shared]
        for term, tensor in zip(terms, own):
            name = "_".join(term.legs)
            assert torch.equal(found.networks[group.name].get_parameter(name), tensor)
