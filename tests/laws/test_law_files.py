"""The laws of files: what is loaded computes the very bits of what was saved, and so does its LoRA."""

import pytest
import torch
from adapted import close, same_bits
from doors import DOORS, adapt, base, inputs_of, over, targets_of
from lora_files import complaints, loaded_by_peft
from models import LAW_FAMILIES


@pytest.mark.parametrize("gqa", ["pool", "split"])
@over("save")
def test_loaded_it_gives_the_same_bits(door, decomposition, family, gqa, tmp_path):
    model, inputs = adapt(door, decomposition, family, gqa=gqa), inputs_of(family)
    model.save(tmp_path)
    again = DOORS[door].load(base(family), tmp_path)
    assert again.record.config == model.record.config
    assert again.record.groups == model.record.groups
    assert list(again.factors()) == list(model.factors())
    for one, other in zip(model.factors().values(), again.factors().values()):
        assert same_bits(one, other)
    with torch.no_grad():
        assert same_bits(again.forward(inputs), model.forward(inputs))


@over("export_lora")
def test_exported_as_a_lora_it_computes_the_same(door, decomposition, family, tmp_path):
    inputs = inputs_of(family)
    for targets in targets_of(door, family)[:2]:
        model = adapt(door, decomposition, family, targets=targets)
        model.export_lora(tmp_path / targets)
        assert complaints(tmp_path / targets) == []
        found = loaded_by_peft(LAW_FAMILIES[family], tmp_path / targets).double()
        with torch.no_grad():
            assert close(found(**inputs)[0], model.forward(inputs), 1e-5)
