"""Adapters that start at the values of another adapter, alone or on its shared parameters."""

import pytest
import torch
from adapted import FORMATS, bits, output, put, unchanged
from banks import constant, prompts, rows_of, small_llama

import lortalib

SIDES = ("in", "out")


def values(adapter):
    return [
        bits(tensor) for group in adapter.groups for tensor in adapter.network(group).parameters()
    ]


def test_on_shared_sides_it_starts_at_the_update_and_trains_only_its_own():
    model, inputs = small_llama(), prompts()
    donor = put(model, seed=1, shared=SIDES, alpha=0.5, name="donor")
    expected, before = output(model, inputs), values(donor)
    donor.disable()
    own = lortalib.nn.apply(model, "cp", 2, alpha=0.5, shared=donor, init=donor, name="own")
    assert torch.equal(output(model, inputs), expected)
    assert own.config.init == "adapter"
    trained = [tuple(p.shape) for p in own.networks.parameters() if p.requires_grad]
    assert trained == [(4, 2), (2, 2), (4, 2)]
    model(**inputs)[0].square().mean().backward()
    with torch.no_grad():
        for parameter in own.networks.parameters():
            if parameter.grad is not None:
                assert parameter.grad.abs().max() > 0
                parameter -= 0.1 * parameter.grad
    assert not torch.equal(output(model, inputs), expected)
    assert all(map(torch.equal, values(donor), before))
    bank = lortalib.nn.bank(model, "cp", 2, shared=SIDES)
    bank.update({"donor": donor, "own": own})  # refused if the sides differed


def test_on_a_bank_it_starts_at_one_adapter_of_the_bank():
    model, inputs = small_llama(), prompts()
    bank = lortalib.nn.bank(model, "cp", 2, shared=SIDES, alpha=2.0)
    bank.fill(["ann", "bob"], constant(bank, 0.3, 2))
    bank["bob"] = lortalib.nn.apply(model, "cp", 2, shared=bank)  # another one
    lortalib.nn.adapters(model)["default"].remove()
    expected = rows_of(model, bank, ["ann", "ann"], inputs)
    adapter = lortalib.nn.apply(
        model, "cp", 2, alpha=2.0, shared=bank, init=bank.adapter("ann"), name="new"
    )
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-6, rtol=1e-5)
    bank["new"] = adapter
    assert all(map(torch.equal, bank["new"]["layers"], bank["ann"]["layers"]))


@pytest.mark.parametrize("decomposition", [*FORMATS, "indscal"])
def test_any_format_starts_at_another_adapter(decomposition):
    model, inputs = small_llama(), prompts()
    donor = put(model, decomposition, seed=1, name="donor", targets="all", share_residual=True)
    expected = output(model, inputs)
    donor.disable()
    own = put(model, decomposition, init=donor, targets="all", share_residual=True)
    assert torch.equal(output(model, inputs), expected)
    assert own.count() == donor.count()
    theirs = {id(parameter) for parameter in donor.parameters()}
    assert not theirs & {id(parameter) for parameter in own.parameters()}


def test_it_starts_at_a_file(tmp_path):
    model, inputs = small_llama(), prompts()
    donor = put(model, seed=1)
    expected = output(model, inputs)
    donor.save(tmp_path / "one")
    donor.remove()
    own = lortalib.nn.apply(model, "cp", 2, init=lortalib.nn.read(tmp_path / "one"))
    own.save(tmp_path / "two")
    own.remove()
    lortalib.nn.load(model, tmp_path / "two")
    assert torch.equal(output(model, inputs), expected)


REFUSED = {
    "rank": ({"rank": 3}, "use its rank"),
    "alpha": ({"alpha": 3.0}, r"multiplies its tensor by 1, and the new one by 3.*use alpha=1\.0"),
    "line": ({"decomposition": "tt"}, "has the legs"),
    "targets": ({"targets": "qk"}, "use its targets, layers, gqa and acts_on"),
    "layers": ({"layers": [0]}, "use its targets, layers, gqa and acts_on"),
    "stream": ({"acts_on": "stream"}, "use its targets, layers, gqa and acts_on"),
    "tasks": ({"tasks": ["a", "b"]}, "init= is an adapter, and tasks= names tasks"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_another_adapter_is_refused(options, message):
    model = small_llama()
    donor = put(model, seed=1, name="donor")
    options = {"decomposition": "cp", "rank": 2, **options}
    with unchanged(model), pytest.raises(ValueError, match=message):
        lortalib.nn.apply(model, init=donor, **options)


def test_values_that_belong_to_other_shared_parameters_are_refused():
    model = small_llama()
    donor = put(model, seed=1, name="donor")
    bank = lortalib.nn.bank(model, "cp", 2, shared=SIDES)
    with unchanged(model), pytest.raises(ValueError, match="have different shared parameters"):
        lortalib.nn.apply(model, "cp", 2, shared=bank, init=donor)


def test_factors_that_differ_cannot_become_one_residual_factor():
    model = small_llama()
    donor = put(model, seed=1, name="donor", targets="all")
    with unchanged(model), pytest.raises(ValueError, match="Use share_residual=False"):
        put(model, init=donor, targets="all", share_residual=True)


def test_a_bank_is_no_start():
    model = small_llama()
    bank = lortalib.nn.bank(model, "cp", 2, shared=SIDES)
    with unchanged(model), pytest.raises(ValueError, match=r"init=bank\.adapter\(name\)"):
        lortalib.nn.apply(model, "cp", 2, shared=bank, init=bank)


def test_only_apply_takes_an_adapter():
    model = small_llama()
    donor = put(model, seed=1)
    with pytest.raises(ValueError, match="unknown init Adapter"):
        lortalib.nn.plan(model, "cp", 2, init=donor)
