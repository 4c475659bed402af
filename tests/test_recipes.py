"""Every recipe in short: it trains, reports, and goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
