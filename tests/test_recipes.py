"""Every recipe in short: it trains, reports, and goes on where it stopped."""

import argparse
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import dpo
import instruct
import nlu
import pytest
from hub_folders import tiny_llama, tiny_roberta
from recipe import begin, chat_tokenizer, parser

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


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--decomposition", "cpp"], "did you mean 'cp'?"),
        (["--decomposition", "in r r, out r"], "leg 'r' stands twice"),
        (["--rank", "0"], "an integer of at least 1"),
        (["--batch", "two"], "an integer of at least 1"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_written(
    words, why, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["a recipe", *words])
    with pytest.raises(SystemExit) as left:
        begin(parser("A recipe.", out="runs/one"))
    assert left.value.code == 2
    assert why in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_reports_and_resumes(recipe, asset, tmp_path):
    needed, arguments, score = RECIPES[recipe]
    for name in needed:
        asset(name)
    script, *task = recipe.split()
    command = [sys.executable, str(EXAMPLES / script), *task, *SHORT, *arguments]
    command += ["--out", str(tmp_path)]
    for last in (2, 1):  # the second run is killed after its first step, as it were
        if last == 1:
            (tmp_path / "results.json").unlink()
            shutil.rmtree(tmp_path / "checkpoint-2")
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        assert score in found["rows"][-1]
        assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text("utf-8"))
    assert state["global_step"] == 2
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_is_enough(recipe, monkeypatch, capsys):
    script, *task = recipe.split()
    monkeypatch.setattr("sys.argv", [str(EXAMPLES / script), *task, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"python examples/{recipe}" in shown
    assert "--decomposition" in shown
    if not task:
        assert "default: None" not in shown


#: GLUE as the hub gives it, in little: columns and labels of a task of each shape.
GLUE = {
    "mrpc": {"sentence1": "a good film", "sentence2": "a bad film", "label": 1, "idx": 0},
    "cola": {"sentence": "film a good", "label": 0, "idx": 0},
    "stsb": {"sentence1": "a good film", "sentence2": "film", "label": 2.4, "idx": 0},
}


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny Llama of the base kind."""
    return tiny_llama(tmp_path / "llama")


@pytest.fixture
def roberta(tmp_path):
    """A folder with a tiny RoBERTa."""
    return tiny_roberta(tmp_path / "roberta")


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


def test_epochs_of_a_preset_become_steps(roberta, tmp_path, monkeypatch):
    rows = {"train": [GLUE["cola"]] * 130, "validation": [GLUE["cola"]] * 4}
    monkeypatch.setattr(nlu, "load_dataset", lambda *name: rows)
    monkeypatch.setattr("evaluate.load", lambda *name: Agreement())
    monkeypatch.setitem(nlu.PRESETS["roberta-base"], "cola", (3, 1e-3, 1e-2))
    told = ["--preset", "roberta-base", "--task", "cola", "--model", roberta, "--length", "16"]
    monkeypatch.setattr(sys, "argv", ["nlu.py", *told, "--out", str(tmp_path / "out")])
    nlu.main()
    own = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["arguments"]
    assert (own["steps"], own["batch"], own["rank"], own["lr"]) == (3 * 2, 64, 4, 1e-2)


ALPACA_ROWS = [
    {"instruction": "Name a film", "input": text, "output": "a good film"} for text in ("", "bad .")
]
ORCA_ROWS = [
    {"system": "a", "input": "Name a film", "chosen": "a good film", "rejected": "bad", "status": "chosen",
     "chosen_score": 9.0},
    {"system": "", "input": "a bad film", "chosen": "bad", "rejected": "good"},
    {"system": "", "input": "a", "chosen": "a", "rejected": "bad", "status": "tie", "chosen_score": 9.0},
    {"system": "", "input": "a", "chosen": "a", "rejected": "bad", "chosen_score": 7.0},
    {"system": "", "input": "a", "chosen": "a", "rejected": ""},
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "rows", "score"),
    [(instruct, ALPACA_ROWS, "loss"), (dpo, ORCA_ROWS, "reward accuracy")],
)
def test_a_base_model_learns_from_a_set_of_the_hub(
    recipe, rows, score, llama, tmp_path, monkeypatch
):
    # Rows that differ, lest a held-out question be one that is trained on.
    key = "instruction" if recipe is instruct else "input"
    found = [row | {key: row[key] + " a" * n} for n in range(6) for row in rows]
    monkeypatch.setattr(recipe, "load_dataset", lambda name, split: found)
    told = [
        "--model",
        llama,
        "--data",
        "any/name",
        "--held-out",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", *told, *SHORT])
    recipe.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert found["rows"][-1][score] >= 0
    assert found["rows"][-1]["trainable parameters"] > 0


def test_pairs_are_conversations_without_ties_and_low_scores(monkeypatch):
    monkeypatch.setattr(dpo, "load_dataset", lambda name, split: ORCA_ROWS)
    found = dpo.pairs(argparse.Namespace(seed=0, data="any/name"))
    assert sorted(len(row["prompt"]) for row in found) == [1, 2]  # one has a system's message
    long = max(found, key=lambda row: len(row["prompt"]))
    assert [turn["role"] for turn in long["prompt"]] == ["system", "user"]
    assert long["rejected"] == [{"role": "assistant", "content": "bad"}]


def test_a_prompt_in_alpacas_form_is_the_beginning_of_prompt_and_answer(llama):
    tokenizer = chat_tokenizer(llama)
    turns = dpo.said(system="a film", user="Name a film")
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(
        [*turns, *dpo.said(assistant="a good film")], tokenize=False
    )
    assert prompt == "<s>a film\n\n### Instruction:\nName a film\n\n### Response:\n"
    assert whole == prompt + "a good film</s>"


def test_a_models_own_chat_template_stays(llama):
    tokenizer = chat_tokenizer(llama)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(llama)
    assert chat_tokenizer(llama).chat_template == "{{ messages[0].content }}"
