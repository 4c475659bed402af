"""What PEFT trains beside an adapter: through every verb of its life, as with LoraConfig."""

import peft
import pytest
import torch
from adapted import close, output, same_bits
from models import FAMILIES
from wrapped_models import LLAMA, factors, second, wrapped

from lortalib.peft import LortaLayer

BERT = FAMILIES["Bert"]
OPTIONS = {
    "classifier": (BERT, "ForSequenceClassification", {}, {"modules_to_save": ["classifier"]}),
    "head": (LLAMA, "ForCausalLM", {}, {"modules_to_save": ["lm_head"]}),
    "tied head": (
        LLAMA, "ForCausalLM", {"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]},
    ),
    "tokens": (LLAMA, "ForCausalLM", {}, {"trainable_token_indices": [1, 2, 3]}),
    "tokens of a tied embedding": (
        LLAMA, "ForCausalLM", {"tie_word_embeddings": True}, {"trainable_token_indices": [1, 5]},
    ),
    "tokens by name": (
        LLAMA, "ForCausalLM", {}, {"trainable_token_indices": {"embed_tokens": [6], "lm_head": [7]}},
    ),
    "both": (
        LLAMA, "ForCausalLM", {},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 6]},
    ),
}  # fmt: skip
each_option = pytest.mark.parametrize("name", OPTIONS)


def base(name):
    family, kind, sizes, _ = OPTIONS[name]
    return family.model(kind, **sizes)


def made(name):
    """A model with an adapter, where all that trains has random numbers."""
    family, kind, sizes, options = OPTIONS[name]

    class Sized:
        """The family with sizes of its own."""

        model = staticmethod(lambda kind: family.model(kind, **sizes))

    model = wrapped(Sized, kind, **options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for path, parameter in model.named_parameters():
            if parameter.requires_grad and "lorta_" not in path:
                parameter.normal_(std=0.1)
    return model, family.inputs()


def keys(model):
    return sorted(model.state_dict())


@each_option
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_saved_and_loaded(name, tmp_path):
    model, inputs = made(name)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert same_bits(output(again, inputs), expected)


@each_option
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_merged_and_unloaded(name):
    model, inputs = made(name)
    expected = output(model, inputs)
    assert not close(output(base(name), inputs), expected, 1e-3)
    merged = model.merge_and_unload()
    assert close(output(merged, inputs), expected)
    assert not any(isinstance(module, LortaLayer) for module in merged.modules())
    if name != "tied head":  # which PEFT gives a weight of its own
        assert keys(merged) == keys(base(name))


@each_option
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_unloaded(name):
    model, _ = made(name)
    assert keys(model.unload()) == keys(base(name))


@each_option
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_deleted_and_disabled(name):
    model, inputs = made(name)
    plain = output(base(name), inputs)
    with model.disable_adapter():
        assert same_bits(output(model, inputs), plain)
    second(model, rank=3, target_modules=model.peft_config["default"].target_modules)
    model.delete_adapter("default")
    assert factors(model, "other")
    with torch.no_grad():
        for parameter in factors(model, "other").values():
            parameter.zero_()
    assert close(output(model, inputs), plain, 1e-6)


@each_option
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_exported_exactly_or_refused(name, tmp_path):
    model, inputs = made(name)
    if "trainable_token_indices" in OPTIONS[name][3]:
        with pytest.raises(ValueError, match=r"trains rows of .*\(trainable_token_indices\)"):
            model.export_lora(tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
        return
    expected = output(model, inputs)
    model.export_lora(tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(base(name), tmp_path / "lora").eval()
    assert close(output(lora, inputs), expected)
