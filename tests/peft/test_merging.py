"""Merging where a weight is more than one module's own: tied, or divided over processes."""

import copy
import gc
import os
import subprocess
import sys
import weakref

import peft
import pytest
from adapted import close, output, same_bits
from wrapped_models import LLAMA, factors, second, wrapped

from lortalib.peft import LortaConfig, LortaLayer


class Tied:
    """A Llama whose head is its embedding."""

    model = staticmethod(lambda kind: LLAMA.model(kind, tie_word_embeddings=True))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], "all-linear"])
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_tied_head_is_not_merged(verb, targets):
    model, inputs = wrapped(Tied, "ForCausalLM", target_modules=targets), LLAMA.inputs()
    expected, before = output(model, inputs), copy.deepcopy(model.state_dict())
    if targets == "all-linear":  # which leaves the head out
        getattr(model, verb)()
        return
    with pytest.raises(ValueError, match=r"weight of lm_head is also that of model\.embed_tokens"):
        getattr(model, verb)()
    assert same_bits(output(model, inputs), expected)
    assert all(same_bits(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_an_adapter_beside_one_on_a_tied_head_is_merged():
    model = wrapped(Tied, "ForCausalLM", target_modules=["lm_head"])
    second(model, target_modules=["q_proj"])
    inputs = LLAMA.inputs()
    model.set_adapter("other")
    expected = output(model, inputs)
    model.merge_adapter()
    assert close(output(model, inputs), expected)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="merging would change both"):
        model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert close(output(model, inputs), expected)


@pytest.mark.parametrize("together", [True, False])
def test_adapters_that_differ_on_modules_of_one_weight_are_not_merged(together):
    base = LLAMA.model()
    one, two = (layer.self_attn.q_proj for layer in base.layers)
    two.weight = one.weight
    model = peft.get_peft_model(
        base, LortaConfig(rank=2, target_modules=[r"layers.0.self_attn.q_proj"])
    )
    second(model, target_modules=["layers.1.self_attn.q_proj"])
    model.base_model.set_adapter(["default", "other"])
    before = one.weight.clone()
    with pytest.raises(ValueError, match=r"weight of layers\.0\..* is also that of layers\.1\."):
        model.merge_adapter(None if together else ["default"])
    assert same_bits(one.weight, before)


def test_adapters_on_the_stream_are_merged_together():
    """What each adds is a product with the weight of the base, without what was merged into it."""
    options = {"decomposition": "indscal", "acts_on": "stream"}
    model, inputs = second(wrapped(**options), **options), LLAMA.inputs()
    model.base_model.set_adapter(["default", "other"])
    expected = output(model, inputs)
    layer = next(m for m in model.modules() if isinstance(m, LortaLayer))
    alone = layer.get_delta_weight("other")
    model.merge_adapter(["default"])
    assert same_bits(layer.get_delta_weight("other"), alone)
    model.merge_adapter(["other"])
    assert close(output(model, inputs), expected)


ENGINE = """
import sys, tempfile, warnings
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
warnings.simplefilter("ignore")
from wrapped_models import LLAMA, wrapped

dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/s", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
inputs = LLAMA.inputs()
for forward_first in (False, True):
    model = wrapped(kind="ForCausalLM", target_modules=["q_proj", "v_proj", "down_proj"])
    with torch.no_grad():
        adapted = model(**inputs).logits
        with model.disable_adapter():
            plain = model(**inputs).logits
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if forward_first:
            model(**inputs)
        model.merge_adapter(safe_merge=True)
        assert torch.allclose(model(**inputs).logits, adapted, atol=1e-5)
        try:
            with model.disable_adapter():  # which would unmerge within the forward
                model(**inputs)
            raise AssertionError("the weights that FSDP2 gathered were changed")
        except RuntimeError as error:
            assert "FSDP2 has gathered this weight" in str(error), error
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, plain)
        assert torch.allclose(model(**inputs).logits, adapted, atol=1e-6)
dist.destroy_process_group()
print("right")
"""


def test_a_model_that_fsdp2_divides_is_merged():
    done = subprocess.run(
        [sys.executable, "-c", ENGINE], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.stdout.split()[-1:] == ["right"], done.stderr


def alive(references):
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("duplicate", [None, copy.deepcopy])
@pytest.mark.filterwarnings("ignore:Adapter other was active which is now deleted")
def test_a_deleted_adapter_is_freed_with_its_hooks(duplicate):
    model = second(wrapped(kind="ForCausalLM"))
    model = duplicate(model) if duplicate else model
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    model.set_adapter("other")
    model.train()(**LLAMA.inputs(), labels=LLAMA.inputs()["input_ids"]).loss.backward()
    references = [weakref.ref(parameter) for parameter in factors(model, "other").values()]
    assert alive(references) == len(references)
    model.delete_adapter("other")
    assert alive(references) == 0
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == before / 2


@pytest.mark.parametrize("verb", ["unload", "merge_and_unload"])
def test_an_unloaded_model_keeps_nothing_of_the_adapter(verb):
    model = wrapped(kind="ForCausalLM")
    model.train()(**LLAMA.inputs(), labels=LLAMA.inputs()["input_ids"]).loss.backward()
    references = [weakref.ref(parameter) for parameter in factors(model).values()]
    base = getattr(model, verb)()
    del model
    assert alive(references) == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
