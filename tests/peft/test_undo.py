"""A configuration that is refused, or a call that is interrupted, leaves nothing on the model."""

import random
import sys
from pathlib import Path

import peft
import pytest
import torch
from adapted import changes, output, picture, same_bits
from models import FAMILIES
from wrapped_models import LLAMA, factors, second, wrapped

import lortalib
from lortalib.peft import LortaConfig

BERT = FAMILIES["Bert"]
#: Where calls are interrupted: in this library, and in what PEFT and torch change a model with.
WATCHED = (
    str(Path(lortalib.__file__).parent),
    str(Path(peft.__file__).parent),
    str(Path(torch.nn.modules.module.__file__)),
)
BESIDE = [
    {},
    {"modules_to_save": ["classifier"]},
    {"trainable_token_indices": [1, 2]},
    {"modules_to_save": ["pooler"], "trainable_token_indices": {"word_embeddings": [3]}},
]
BAD = [
    ({"decomposition": "in r, out r"}, "mode"),
    ({"decomposition": "nonsense"}, "unknown decomposition"),
    ({"rank": 0}, "rank of bond"),
    ({"target_modules": ["LayerNorm"]}, "is not supported"),
    ({"target_modules": ["absent"]}, "not found in the base model|No modules were targeted"),
    ({"trainable_token_indices": {"absent": [1]}}, "not found"),
    ({"ranks": {"other": {"r": 2}}}, "ranks must give a size of at least 1 for each bond"),
    ({"ranks": {"encoder": {"r": 0}}}, "ranks must give a size of at least 1 for each bond"),
]


class Interrupt:
    """KeyboardInterrupt at the k-th call of a watched function; counts the calls if k is None."""

    def __init__(self, at=None):
        self.at, self.calls = at, 0

    def __call__(self, frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(WATCHED):
            self.calls += 1
            if self.calls - 1 == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def bert():
    return BERT.model("ForSequenceClassification")


def attributes(tuner):
    """All that an adapter changes of a model with adapters: what `picture` sees, and what it does not."""
    layers = [m for m in tuner.modules() if isinstance(m, lortalib.peft.LortaLayer)]
    inner = [(list(layer.lorta_networks), list(layer.lorta_slots)) for layer in layers]
    return picture(tuner), inner, list(tuner.peft_config), list(tuner.targeted_module_names)


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_refused_first_adapter(options, message, beside):
    base = bert()
    keys, before = list(base.state_dict()), picture(base)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(base, LortaConfig(**{**beside, **options}))
    assert list(base.state_dict()) == keys
    assert changes(before, picture(base)) == []


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_refused_second_adapter(options, message, beside):
    model = wrapped(BERT, "ForSequenceClassification", modules_to_save=["classifier"])
    before = attributes(model.base_model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", LortaConfig(**{**beside, **options}))
    after = attributes(model.base_model)
    assert changes(before[0], after[0]) == []
    assert before[1:] == after[1:]


@pytest.mark.parametrize("beside", BESIDE[1:])
def test_an_interrupted_first_adapter(beside):
    config = {"rank": 2, **beside}
    with Interrupt() as count:
        peft.get_peft_model(bert(), LortaConfig(**config))
    for at in random.Random(0).sample(range(1, count.calls), 40):
        base = bert()
        before, keys = picture(base), list(base.state_dict())
        tuner = object.__new__(lortalib.peft.LortaModel)
        asked = LortaConfig(**config)
        try:
            with Interrupt(at):
                tuner.__init__(base, {"default": asked}, "default")
        except KeyboardInterrupt:
            assert list(base.state_dict()) == keys, at
            assert changes(before, picture(base)) == [], at


@pytest.mark.parametrize("beside", BESIDE[1:])
def test_an_interrupted_second_adapter(beside):
    config = {"rank": 3, **beside}
    start = lambda: wrapped(BERT, "ForSequenceClassification", modules_to_save=["classifier"])  # noqa: E731
    model = start()
    with Interrupt() as count:
        model.base_model.peft_config["other"] = LortaConfig(**config)
        model.base_model.inject_adapter(model.base_model.model, "other")
    for at in random.Random(0).sample(range(1, count.calls), 40):
        model = start()
        tuner = model.base_model
        before = attributes(tuner)
        tuner.peft_config["other"] = LortaConfig(**config)
        try:
            with Interrupt(at):
                tuner.inject_adapter(tuner.model, "other")
        except KeyboardInterrupt:
            after = attributes(tuner)
            assert changes(before[0], after[0]) == [], at
            assert before[1:] == after[1:], at


def test_an_interrupted_sum_is_no_adapter(monkeypatch):
    model, inputs = second(wrapped()), LLAMA.inputs()
    expected = output(model, inputs)

    def interrupt(self, other):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == list(model.base_model.lorta_adapters) == ["default", "other"]
    assert same_bits(output(model, inputs), expected)


def test_a_second_adapter_leaves_the_flags_of_the_first():
    model = wrapped()
    model.set_requires_grad("default", False)
    second(model)
    assert not any(parameter.requires_grad for parameter in factors(model).values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", "8"), ("rank", 2.0), ("rank", True), ("rank", None), ("rank", {"r": "2"}), ("rank", [2]),
        ("decomposition", 5), ("decomposition", None), ("decomposition", ["cp"]),
        ("alpha", "1"), ("alpha", None), ("alpha", [1.0]), ("dropout", "0.1"), ("dropout", None),
        ("target_modules", 5), ("target_modules", [5]), ("target_modules", {"q_proj": 1}),
        ("exclude_modules", 5), ("exclude_modules", [None]),
        ("layers_to_transform", "0"), ("layers_to_transform", [0.5]), ("layers_to_transform", {}),
        ("layers_pattern", 5), ("layers_pattern", [5]),
        ("modules_to_save", "classifier"), ("modules_to_save", 5), ("modules_to_save", [5]),
        ("trainable_token_indices", "5"), ("trainable_token_indices", ["5"]),
        ("trainable_token_indices", {"embed_tokens": 5}), ("trainable_token_indices", {5: [5]}),
        ("init_weights", 5), ("init_weights", None), ("init_weights", ["normal"]),
        ("gqa", 5), ("gqa", ["pool"]), ("gqa", None),
        ("ranks", 5), ("ranks", {"encoder": 5}), ("ranks", {"encoder": {"r": "2"}}), ("ranks", {5: {}}),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused_by_name(field, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{field} must be .*; found "):
        LortaConfig(**{field: value})
