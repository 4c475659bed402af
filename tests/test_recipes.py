"""Every recipe in short: it trains, reports, and goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import nlu
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ["--steps", "2", "--save-every", "1", "--batch", "2", "--length", "32"]
RECIPES = {
    "nlu.py": (["minilm", "film_reviews"], ["--held-out", "16"], "accuracy"),
    "protein.py": (["antiberty", "peptides"], ["--held-out", "16"], "MCC"),
    "protein.py --task fold": (["chains"], ["--held-out", "2"], "lDDT"),
    "instruct.py": (
        ["smollm2", "conversations"],
        ["--held-out", "4", "--samples", "1", "--length", "96"],
        "loss",
    ),
    "dpo.py": (["smollm2", "rated_sentences"], ["--held-out", "4"], "reward accuracy"),
    "vision.py": (["digits"], ["--held-out", "16", "--pretrain-steps", "2"], "accuracy"),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_reports_and_resumes(recipe, asset, tmp_path):
    needed, arguments, score = RECIPES[recipe]
    for name in needed:
        asset(name)
    script, *task = recipe.split()
    command = [sys.executable, str(EXAMPLES / script), *task, *SHORT, *arguments]
    command += ["--out", str(tmp_path)]
    for more, last in (([], 2), (["--steps", "3"], 3)):
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        assert score in found["rows"][-1]
        assert (tmp_path / f"checkpoint-{last}" / "adapter_model.safetensors").exists()
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text("utf-8"))
    assert state["global_step"] == 3
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_is_enough(recipe):
    script, *task = recipe.split()
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *task, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"python examples/{recipe}" in done.stdout
    assert "--decomposition" in done.stdout
    if not task:
        assert "default: None" not in done.stdout


#: GLUE as the hub gives it, in little: columns and labels of a task of each shape.
GLUE = {
    "mrpc": {"sentence1": "a good film", "sentence2": "a bad film", "label": 1, "idx": 0},
    "cola": {"sentence": "film a good", "label": 0, "idx": 0},
    "stsb": {"sentence1": "a good film", "sentence2": "film", "label": 2.4, "idx": 0},
}


@pytest.fixture
def roberta(tmp_path):
    """A folder with a tiny RoBERTa and its tokenizer."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "good", "bad", "film"]
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(tmp_path / "roberta")
    config = RobertaConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=16, max_position_embeddings=40, type_vocab_size=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    return str(tmp_path / "roberta")


class Agreement:
    """Stands for a metric of the evaluate library."""

    def compute(self, predictions, references):
        return {"agreement": float((abs(predictions - references) < 0.5).mean())}


@pytest.mark.parametrize("task", GLUE)
def test_a_preset_runs_on_glue_and_what_is_given_goes_before_it(
    task, roberta, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        nlu,
        "load_dataset",
        lambda *name: {"train": [GLUE[task]] * 130, "validation": [GLUE[task]] * 4},
    )
    monkeypatch.setattr("evaluate.load", lambda *name: Agreement())
    given = ["--rank", "2", "--length", "16", "--model", roberta, "--steps", "2", "--lr", "0.004"]
    told = ["--preset", "roberta-base", "--task", task, "--out", str(tmp_path / "out"), *given]
    monkeypatch.setattr(sys, "argv", ["nlu.py", *told])
    nlu.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert "agreement" in found["rows"][-1]
    own = found["arguments"]
    assert (own["rank"], own["lr"], own["steps"], own["batch"]) == (2, 0.004, 2, 64)
    assert own["head_lr"] == nlu.PRESETS["roberta-base"][task][1]


def test_epochs_of_a_preset_become_steps():
    found = nlu.published("roberta-large", "rte")
    assert found == {
        "model": "FacebookAI/roberta-large", "rank": 8, "length": 128, "batch": 64, "steps": None,
        "epochs": 40, "head_lr": 2e-3, "lr": 2e-2,
    }  # fmt: skip
