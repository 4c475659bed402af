"""Whatever is chosen of a block, its shares are the dense updates: kinds of projections made together."""

import pytest
import torch
from harness import close, each_format, output, put
from models import FAMILIES

from lortalib.nn import sites


@pytest.mark.parametrize("targets", ["qk", "kv", "q", "k", "ko", "qvo"])
@pytest.mark.parametrize("family", ["Llama", "Conv1D", "Bert", "T5"])
@each_format
def test_any_choice_of_projections_adds_its_dense_updates(family, targets, decomposition):
    model, inputs = FAMILIES[family].model().eval(), FAMILIES[family].inputs()
    if not {site.role for site in sites(model)} & set(targets):
        pytest.skip("the model has none of these")
    adapter = put(model, decomposition, targets=targets, seed=3)
    found = output(model, inputs)
    adapter.merge()
    assert close(found, output(model, inputs), 2e-4)
    adapter.unmerge()
    with torch.inference_mode():
        again = model(**inputs)[0].clone()
    assert close(found, again, 1e-6)
    model(**inputs)[0][
        ..., :3
    ].sum().backward()  # what was made in inference mode is of no use here
    assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())


@each_format
def test_made_first_in_inference_mode_then_trained(decomposition):
    model, inputs = FAMILIES["Llama"].model(), FAMILIES["Llama"].inputs()
    adapter = put(model, decomposition)
    with torch.inference_mode():
        model(**inputs)
    model(**inputs)[0].square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters() if p.requires_grad)
