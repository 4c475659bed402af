"""The folder of a recipe's run: the same arguments go on in it, others get their own or are refused."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import nlu
import pytest
import recipe
import run_folder
from hub_folders import tiny_roberta
from safetensors.torch import load_file
from torch import equal
from transformers import Trainer

ROOT = Path(__file__).parents[1]
ROWS = [("a good film", 1), ("a bad film", 0), ("film a good", 1), ("bad .", 0)] * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    return tiny_roberta(tmp_path_factory.mktemp("model") / "roberta")


def runner(model, folder, monkeypatch):
    """A function that runs nlu.py on the model in a folder: three steps with a checkpoint behind each."""
    monkeypatch.setattr(nlu, "film_reviews", lambda: list(ROWS))
    monkeypatch.chdir(folder)
    own = ["--model", model, "--length", "8", "--held-out", "4", "--batch", "4", "--rank", "2"]
    own += ["--steps", "3", "--save-every", "1"]

    def start(*more):
        monkeypatch.setattr("sys.argv", ["nlu.py", *own, *more])
        nlu.main()
        return [path for path in Path("runs").iterdir() if path.is_dir()]

    return start


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """The runner in an empty folder."""
    return runner(model, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def given(model, tmp_path_factory):
    """The folder of a finished run that was told its folder."""
    folder = tmp_path_factory.mktemp("given")
    with pytest.MonkeyPatch.context() as monkeypatch:
        (found,) = runner(model, folder, monkeypatch)("--out", "runs/given")
    return folder / found


@pytest.fixture
def steps(monkeypatch):
    """The steps that Trainers take from now on."""
    taken, step = [], Trainer.training_step

    def counted(self, *args, **kwargs):
        taken.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counted)
    return taken


def state(folder):
    """Every file of a folder with its bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_finished_run_prints_its_result_and_trains_nothing(run, steps, capsys):
    (folder,) = run()
    assert len(steps) == 6  # three for the head alone
    before = state(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 0
    assert len(steps) == 6
    assert state(folder) == before
    assert "film reviews: 4 held out" in capsys.readouterr().out


@pytest.mark.parametrize("whole", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_weights_and_no_further(run, steps, whole):
    (folder,) = run()
    first = load_file(folder / "adapter_model.safetensors")
    (folder / "results.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    for step in range(whole + 1, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    del steps[:]
    if whole == 1:  # only two checkpoints are kept, so there is none to go on from
        assert run() == [folder]
        assert steps == [0, 1, 2]
        return
    assert run() == [folder]
    assert steps == list(range(whole, 3))
    again = load_file(folder / "adapter_model.safetensors")
    assert all(equal(first[name], again[name]) for name in first)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(run, steps):
    (folder,) = run()
    (folder / "results.json").unlink()
    (folder / "checkpoint-3" / "trainer_state.json").write_text('{"global_st', encoding="utf-8")
    (folder / "checkpoint-3" / "adapter_model.safetensors").write_bytes(b"torn")
    del steps[:]
    run()
    assert steps == [2]


@pytest.mark.parametrize(
    "other",
    [["--lr", "1e-5"], ["--seed", "7"], ["--alpha", "3"], ["--decomposition", "tt"], ["--rank", "3"],
     ["--steps", "4"], ["--decomposition", "in r, out r, head r, layer matrix r"]],
)  # fmt: skip
def test_other_arguments_get_a_folder_of_their_own_or_are_refused(run, given, other):
    first = Path(shutil.copytree(given, "runs/given"))
    before = state(first)
    with pytest.raises(SystemExit, match=r"other arguments: --[a-z]+ was .* and is .*--out"):
        run("--out", "runs/given", *other)
    assert state(first) == before
    both = run(*other)
    assert len(both) == 2
    assert state(first) == before


def test_a_folder_of_an_unknown_run_is_refused(run):
    (folder,) = run()
    (folder / "arguments.json").unlink()
    with pytest.raises(SystemExit, match=r"no arguments\.json"):
        run()


def lines():
    """Every line of docs and recipes that starts a recipe."""
    texts = [ROOT / "docs" / "recipes.md", *(ROOT / "examples").glob("*.py")]
    pattern = r"python (examples/(?:nlu|instruct|dpo|protein|vision)\.py(?:\\\n|[^`\n\\])*)"
    found = (re.findall(pattern, text.read_text(encoding="utf-8")) for text in texts)
    return [line.replace("\\\n", " ") for each in found for line in each if "{" not in line]


def test_the_lines_of_the_docs_can_be_typed_in_order(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe.transformers, "set_seed", lambda seed: None)
    folders = {}
    assert len(lines()) > 12
    for line in lines():
        script, *told = shlex.split(line)
        module = __import__(Path(script).stem)
        seen = []

        def begin(arguments, seen=seen):
            seen.append(recipe.begin(arguments).out)
            raise InterruptedError

        monkeypatch.setattr(module, "begin", begin)
        monkeypatch.setattr("sys.argv", [script, *told])
        with pytest.raises(InterruptedError):
            module.main()
        assert folders.setdefault(seen[0], (script, told)) == (script, told)
    assert {"runs/vision", "runs/vision-decomposition-tt", "runs/fold"} <= folders.keys()


def test_names_of_folders_are_short_and_differ(tmp_path):
    arguments = recipe.parser(None, out="runs/x")

    def named(*told):
        return run_folder.folder_of(arguments, arguments.parse_args(told)).name

    lines = ["in r, out r", "in_r, out_r", "a" * 300, "a" * 301]
    names = [named("--model", line) for line in lines]
    assert len(set(names)) == len(lines)
    assert max(map(len, names)) < 120
    assert not re.search(r"[^A-Za-z0-9_.+-]", "".join(names))


@pytest.mark.parametrize("place", ["os.fsync", "pathlib.Path.replace"])
def test_an_interrupted_record_loses_no_run(place, tmp_path, monkeypatch):
    args = recipe.parser(None, out=str(tmp_path)).parse_args([])
    file = tmp_path / "run" / "arguments.json"

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_folder.claim(file.parent, args)
    assert os.listdir(file.parent) == []
    run_folder.claim(file.parent, args)
    before = file.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(place, interrupted)
        run_folder.claim(file.parent, args)  # it is there: nothing is written
        with pytest.raises(KeyboardInterrupt):
            run_folder.write_json(file, {"other": 1})
    assert file.read_bytes() == before
    assert json.loads(before)["rank"] == args.rank
