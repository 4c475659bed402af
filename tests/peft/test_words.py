"""The words of `LortaConfig`: targets as `lortalib.nn.apply` takes them, and what a LoRA's are called."""

import subprocess
import sys
import warnings

import peft
import pytest
from adapted import put
from models import FAMILIES
from wrapped_models import wrapped

from lortalib.peft import LortaConfig

LLAMA = FAMILIES["Llama"]


def paths_of(model):
    return sorted(site.path for site in model.base_model.lorta_adapters["default"].sites)


BOTH = ["qv", "qkvo", "o", "mlp", "all", ["q", "up"]]
OF_LLAMA = [["q", "gate"], ["up", "v_proj"], r".*\.(k|up)_proj"]
CASES = [(LLAMA, targets) for targets in BOTH + OF_LLAMA]
CASES += [(FAMILIES["T5"], targets) for targets in BOTH]


@pytest.mark.parametrize(
    ("family", "targets"), CASES, ids=lambda value: getattr(value, "name", str(value))
)
def test_targets_mean_the_same_behind_both_doors(family, targets):
    expected = sorted(site.path for site in put(family.model(), targets=targets).sites)
    assert paths_of(wrapped(family, target_modules=targets)) == expected


def test_what_was_resolved_is_saved(tmp_path):
    model = wrapped(LLAMA, target_modules="qv")
    model.save_pretrained(tmp_path)
    found = peft.PeftConfig.from_pretrained(tmp_path).target_modules
    assert sorted(found) == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("r", "called rank"),
        ("lora_alpha", r"alpha=lora_alpha / r"),
        ("lora_dropout", "called dropout"),
        ("use_dora", "DoRA"),
        ("use_rslora", "nothing is divided"),
        ("init_lora_weights", "called init_weights"),
    ],
)
def test_words_of_a_lora_are_explained(word, message):
    with pytest.raises(ValueError, match=rf"^{word} is not supported: .*{message}"):
        LortaConfig(**{word: 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LortaConfig(**{word: None})


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": {"r": "8"}},
        {"rank": {1: 8}},
        {"rank": True},
        {"ranks": {"layers": {"r": 2.5}}},
        {"ranks": {"layers": 2}},
        {"trainable_token_indices": {"embed_tokens": "12"}},
        {"layers_to_transform": ["1"]},
        {"modules_to_save": "lm_head"},
    ],
    ids=str,
)
def test_fields_of_another_kind_are_refused_also_within_a_mapping(fields):
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(fields))} "):
        LortaConfig(**fields)


@pytest.mark.parametrize(
    "line", ["import lortalib.peft", "import lortalib; lortalib.peft.LortaConfig"]
)
def test_without_peft_the_extra_is_named(line):
    block = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'peft': raise ModuleNotFoundError('No module named peft', name='peft')\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", block + line],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert 'pip install "lortalib[peft]"' in done.stderr.splitlines()[-1]


def test_the_mlp_of_a_model_whose_mlp_is_not_known_is_refused():
    """Not its attention instead."""
    with pytest.raises(ValueError, match="target_modules='mlp' fits no projection"):
        wrapped(FAMILIES["Albert"], target_modules="mlp")
