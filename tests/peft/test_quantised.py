"""A quantised base, by PEFT's own helper: int8 weights of torchao on the CPU."""

import peft
import pytest
import torch
from adapted import close, output
from models import FAMILIES
from test_method import factors

import lortalib
from lortalib.peft import LortaConfig

LLAMA = FAMILIES["Llama"]
SIZES = {"hidden_size": 64, "intermediate_size": 64}


@pytest.fixture
def quantised(tmp_path):
    """A function that makes the model with int8 weights, the same every time."""
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import LlamaForCausalLM, TorchAoConfig

    LLAMA.model("ForCausalLM", **SIZES).save_pretrained(tmp_path / "base")

    def made():
        config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32
        ).eval()

    return made


def test_a_quantised_base_trains_saves_and_merges(quantised, tmp_path):
    inputs = LLAMA.inputs()
    base = output(quantised(), inputs)
    model = peft.get_peft_model(quantised(), LortaConfig(rank=2))
    assert close(output(model, inputs), base, 1e-6)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.abs().sum() > 0 for p in factors(model).values())
    expected = output(model.eval(), inputs)
    assert not close(expected, base, 1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantised(), tmp_path / "adapter").eval()
    assert close(output(again, inputs), expected, 1e-6)
    # int8 has 256 steps, so a merged weight is near, not equal.
    again.merge_adapter()
    assert close(output(again, inputs), expected, 0.1)
    again.unmerge_adapter()
    assert close(output(again, inputs), expected, 0.02)


def test_merging_without_peft_is_refused_and_leaves_the_model(quantised):
    model, inputs = quantised(), LLAMA.inputs()
    adapter = lortalib.nn.apply(model, "cp", 2, init="normal")
    expected = output(model, inputs)
    with pytest.raises(ValueError, match="is quantised"):
        adapter.merge()
    assert not adapter.merged
    assert torch.equal(output(model, inputs), expected)
