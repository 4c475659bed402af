"""Models with adapters are saved as people save models: `save_pretrained` and Trainer."""

import copy
import pickle
import warnings

import pytest
import torch
from adapted import changes, close, output, picture, put, same_bits, unchanged
from models import FAMILIES
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import lortalib
from lortalib.nn._files import restore

FAMILY = FAMILIES["Llama"]
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
INPUTS = {"input_ids": IDS}
OPTIONS = {
    "attention": {},
    "one factor for in": {"targets": "all", "share_residual": True},
    "a head": {"train_also": ["lm_head"]},
}


class AdapterTrainer(lortalib.nn.AdapterTrainerMixin, Trainer):
    """A Trainer as users make one."""


@pytest.fixture
def model():
    return FAMILY.model("ForCausalLM")


def trainer(model, folder, kind=AdapterTrainer, **options):
    rows = [{"input_ids": row, "labels": row} for row in IDS for _ in range(8)]
    options = {
        "max_steps": 4, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0,
        "per_device_eval_batch_size": 4, "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **options)
    return kind(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def files(folder):
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(found)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_adapter_is_saved_without_its_base(model, options, tmp_path):
    put(model, **options)
    found = output(model, INPUTS)
    with unchanged(model):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == ["README.md", "adapter.safetensors"]
    again = FAMILY.model("ForCausalLM")
    lortalib.nn.load(again, tmp_path)
    assert same_bits(output(again, INPUTS), found)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_merged_model_is_saved_as_an_ordinary_one(model, options, tmp_path):
    base = FAMILY.model("ForCausalLM")
    adapter = put(model, **options)
    adapter.merge()
    weights = {k: v.clone() for k, v in model.state_dict().items() if "lortalib" not in k}
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter.safetensors").exists()
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() <= set(base.state_dict())
    assert all(same_bits(tensor, weights[name]) for name, tensor in stored.items())
    again, told = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert same_bits(output(again, INPUTS), output(model, INPUTS))
    adapter.unmerge()
    assert close(output(model, INPUTS), output(again, INPUTS))


def test_several_adapters_have_folders_of_their_own(model, tmp_path):
    put(model, name="one")
    put(model, "tt", name="two", seed=1)
    found = output(model, INPUTS)
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == ["README.md", "one/adapter.safetensors", "two/adapter.safetensors"]
    again = FAMILY.model("ForCausalLM")
    for name in ("one", "two"):
        lortalib.nn.load(again, tmp_path / name)
    assert same_bits(output(again, INPUTS), found)


@pytest.mark.parametrize("name", ["a/b", "{}/elsewhere", "a%2Fb"])
def test_no_name_of_an_adapter_leads_out_of_the_folder(name, model, tmp_path):
    inside = tmp_path / "inside"
    one = put(model, name=name.format(tmp_path))
    other = put(model, name="b", seed=2)
    found = output(model, INPUTS)
    model.save_pretrained(inside)
    assert [each.name for each in tmp_path.iterdir()] == ["inside"]
    again = FAMILY.model("ForCausalLM")
    for adapter in (one, other):
        (folder,) = (
            file.parent
            for file in inside.glob("*/adapter.safetensors")
            if lortalib.nn.read(file).name == adapter.name
        )
        lortalib.nn.load(again, folder)
    assert close(output(again, INPUTS), found)


def test_what_trains_beside_the_adapter_is_saved_too(model, tmp_path):
    put(model, freeze=False)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    lortalib.nn.load(again, tmp_path)
    assert same_bits(output(again, INPUTS), output(model, INPUTS))
    assert not any("lortalib" in name for name in load_file(tmp_path / "model.safetensors"))


def test_the_page_of_a_folder_with_a_base_says_that_from_pretrained_is_not_all(model, tmp_path):
    put(model, freeze=False)
    model.save_pretrained(tmp_path / "both")
    text = (tmp_path / "both" / "README.md").read_text(encoding="utf-8")
    assert "The weights of the model are here too" in text
    assert 'LlamaForCausalLM.from_pretrained("FOLDER")' in text
    assert 'lortalib.nn.load(model, "FOLDER")' in text
    alone = FAMILY.model("ForCausalLM")
    put(alone)
    alone.save_pretrained(tmp_path / "alone")
    text = (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")
    assert "are not here, only what was trained" in text


def test_one_merged_and_one_beside(model, tmp_path):
    put(model, name="one").merge()
    put(model, name="two", seed=1)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert lortalib.nn.load(again, tmp_path).name == "two"
    assert same_bits(output(again, INPUTS), output(model, INPUTS))


def test_an_adapter_that_is_no_part_of_it_is_not_left_beside(model, tmp_path):
    adapter = put(model)
    model.save_pretrained(tmp_path)
    adapter.merge()
    with unchanged(model), pytest.raises(ValueError, match=r"holds an adapter\.safetensors"):
        model.save_pretrained(tmp_path)


def test_it_ends_with_the_last_adapter_and_follows_copies(model, tmp_path):
    before = picture(model)
    adapter = put(model)
    for number, twin in enumerate([copy.deepcopy(model), pickle.loads(pickle.dumps(model))]):
        with torch.no_grad():
            next(iter(lortalib.nn.adapters(twin)["default"].networks.parameters())).neg_()
        twin.save_pretrained(tmp_path / str(number))
        again = FAMILY.model("ForCausalLM")
        lortalib.nn.load(again, tmp_path / str(number))
        assert same_bits(output(again, INPUTS), output(twin, INPUTS))
        assert not close(output(again, INPUTS), output(model, INPUTS))
    adapter.remove()
    assert not changes(before, picture(model))
    model.save_pretrained(tmp_path / "plain")
    assert "model.safetensors" in files(tmp_path / "plain")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_trainer_goes_on_from_a_checkpoint_to_the_bit(options, tmp_path):
    def run(**more):
        torch.manual_seed(0)
        model = FAMILY.model("ForCausalLM")
        put(model, init="invariant", **options)
        done = trainer(model, tmp_path)
        done.train(**more)
        return model.eval()

    whole = run()
    held = files(tmp_path / "checkpoint-2")
    assert "adapter.safetensors" in held
    assert not any(name.startswith(("model", "pytorch_model", "config")) for name in held)
    again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_bits(output(again, INPUTS), output(whole, INPUTS))


def test_a_trainer_goes_on_with_several_adapters_and_a_base_that_trains(tmp_path):
    def run(**more):
        torch.manual_seed(0)
        model = FAMILY.model("ForCausalLM")
        put(model, name="one", init="invariant", freeze=False)
        put(model, name="two", init="invariant", freeze=False, seed=1)
        done = trainer(model, tmp_path)
        done.train(**more)
        return model.eval()

    whole = run()
    again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_bits(output(again, INPUTS), output(whole, INPUTS))


def test_the_best_checkpoint_is_loaded(model, tmp_path):
    put(model, init="invariant")
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 6}
    done = trainer(model, tmp_path, load_best_model_at_end=True, learning_rate=1.0, **options)
    done.train()
    assert done.state.log_history[-2]["eval_loss"] > done.state.best_metric
    assert done.evaluate()["eval_loss"] == pytest.approx(done.state.best_metric, rel=1e-6)


def test_a_checkpoint_of_another_adapter_is_refused(model, tmp_path):
    put(model)
    model.save_pretrained(tmp_path)
    for options in ({"rank": 3}, {"decomposition": "tt"}, {"train_also": ["lm_head"]}):
        other = FAMILY.model("ForCausalLM")
        put(other, **options)
        with unchanged(other), pytest.raises(ValueError, match="does not fit adapter 'default'"):
            trainer(other, tmp_path / "x").train(resume_from_checkpoint=str(tmp_path))


def test_a_plain_trainer_says_that_it_cannot_read_the_checkpoint(model, tmp_path):
    put(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer(model, tmp_path / "x", kind=Trainer).train(resume_from_checkpoint=str(tmp_path))


@pytest.mark.parametrize("options", [{}, {"freeze": False}])
def test_a_plain_trainer_is_told_at_its_first_checkpoint(model, options, tmp_path):
    put(model, **options)
    with pytest.warns(UserWarning, match=r"cannot resume.*AdapterTrainerMixin"):
        trainer(model, tmp_path / "plain", kind=Trainer).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this Trainer cannot resume")
        trainer(model, tmp_path / "mixin").train()
        trainer(model, tmp_path / "mixin").save_model(str(tmp_path / "model"))
        model.save_pretrained(tmp_path / "by hand")


def test_an_adapter_that_is_not_active_is_named(model, tmp_path):
    adapter = put(model, train_also=["lm_head"])
    adapter.disable()
    for parameter in model.lm_head.parameters():
        parameter.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"no adapter of the model is active \('default'\).*enable\(\)"
    ):
        trainer(model, tmp_path, max_steps=1, save_strategy="no").train()


def test_what_cannot_train_is_said_early(model, tmp_path):
    adapter = put(model, train_also=["lm_head"])
    adapter.merge()
    with pytest.warns(UserWarning, match=r"'default' is merged.*unmerge\(\)"):
        trainer(model, tmp_path, max_steps=1, save_strategy="no").train()
    adapter.unmerge()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(model, tmp_path, max_steps=1, save_strategy="no").train()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match="the loss of step 1 is nan") as told:
        trainer(model, tmp_path, max_steps=3, save_strategy="no").train()
    assert sum("loss of step" in str(each.message) for each in told) == 1


@pytest.mark.parametrize("count", range(4))
def test_an_interrupted_restoring_changes_nothing(model, count, tmp_path, monkeypatch):
    adapter = put(model, train_also=["lm_head"])
    adapter.save(tmp_path)
    with torch.no_grad():
        for parameter in [*adapter.networks.parameters(), model.lm_head.weight]:
            parameter.neg_()
    calls = []

    def interrupted(value, like):
        calls.append(value)
        if len(calls) > count:
            raise KeyboardInterrupt
        return value

    with monkeypatch.context() as patched, unchanged(model):
        patched.setitem(restore.__globals__, "divided_like", interrupted)
        with pytest.raises(KeyboardInterrupt):
            restore(adapter, tmp_path)
    restore(adapter, tmp_path)
    again = FAMILY.model("ForCausalLM")
    lortalib.nn.load(again, tmp_path)
    assert same_bits(output(again, INPUTS), output(model, INPUTS))


def test_an_interrupted_save_leaves_the_model_and_the_old_file(model, tmp_path, monkeypatch):
    put(model, freeze=False)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    with torch.no_grad():
        next(iter(lortalib.nn.adapters(model)["default"].networks.parameters())).neg_()

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, unchanged(model):
        patched.setattr(type(model), "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter.safetensors").read_bytes() == before
