"""Adapters of several tasks: saved, exported, merged, and what is refused."""

import json
import pickle

import peft
import pytest
import torch
from adapted import bits, close, output, put, same_bits, unchanged
from models import LAW_FAMILIES, MIXTRAL
from task_adapters import FAMILIES, LINES, TASKS, adapted, inputs_of, model_of

import lortalib
from lortalib.nn import AdapterFileError, adapters
from lortalib.peft import LortaConfig


@pytest.mark.parametrize("line", ["metatt_41d", "indscal", *LINES])
def test_saved_and_loaded(line, tmp_path):
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model, line)
    adapter.add_task("d", "a")
    names = ["d", "b", None, "c"]
    with adapter.using(names):
        expected = output(model, inputs)
    adapter.save(tmp_path)
    about = lortalib.nn.read_description(tmp_path)
    assert about["tasks"] == ["a", "b", "c", "d"]
    assert about["groups"][0]["modes"]["task"] == 4
    other = model_of()
    loaded = lortalib.nn.load(other, tmp_path)
    assert isinstance(loaded, lortalib.nn.TaskAdapter)
    assert loaded.tasks == adapter.tasks
    assert str(loaded).replace("'again'", "'default'") == str(adapter)
    with loaded.using(names):
        assert same_bits(output(other, inputs), expected)
    read = lortalib.nn.read(tmp_path)
    assert read.tasks == adapter.tasks
    assert read.count() == adapter.count()
    again = read.save(tmp_path / "again", model=other)
    one, two = (f / "adapter.safetensors" for f in (tmp_path, again))
    assert one.read_bytes() == two.read_bytes()


def test_a_state_dict_names_what_tasks_share_once_and_loads():
    model, other, inputs = model_of(), model_of(), inputs_of("encoder")
    adapter, fresh = adapted(model), adapted(other, seed=5)
    state = model.state_dict()
    own = [name for name in state if "networks" in name]
    assert len(own) == 7
    assert sum("b_c" in name for name in own) == 3
    other.load_state_dict(state)
    with adapter.using("b"), fresh.using("b"):
        assert same_bits(output(other, inputs), output(model, inputs))
    adapter.add_task("d")
    assert len([name for name in model.state_dict() if "networks" in name]) == 8


def test_a_checkpoint_is_restored_into_the_same_parameters(tmp_path):
    from lortalib.nn._files import restore

    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model)
    kept = list(adapter.parameters())
    with adapter.using("b"):
        before = output(model, inputs)
    adapter.save(tmp_path)
    with torch.no_grad():
        for parameter in kept:
            parameter.mul_(2)
    restore(adapter, tmp_path)
    assert all(a is b for a, b in zip(adapter.parameters(), kept, strict=True))
    with adapter.using("b"):
        assert same_bits(output(model, inputs), before)
    adapter.add_task("d")
    with pytest.raises(AdapterFileError, match="does not fit adapter"):
        restore(adapter, tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: d.update(tasks=["a", "b"]), "do not fit the modes"),
        (lambda d: d.update(tasks=["a", "b", "b"]), "stands twice"),
        (lambda d: d.update(tasks=["a", "b", "x.y"]), "without dots"),
        (lambda d: d.pop("tasks"), "do not fit the modes"),
        (lambda d: d["config"].update(dropout=0.5), "no dropout"),
        (lambda d: d["groups"][0]["sites"][0].update(experts=2), "tasks and packed experts"),
    ],
)
def test_a_damaged_description_is_refused(change, error, tmp_path):
    from lortalib.nn._files.saved import write_saved
    from lortalib.nn._files.tensors import open_tensors

    adapted(model_of()).save(tmp_path)
    with open_tensors(tmp_path / "adapter.safetensors") as file:
        about, tensors = json.loads(file.metadata["lortalib"]), file.read()
    change(about)
    with open(tmp_path / "adapter.safetensors", "wb") as file:
        write_saved(file, json.dumps(about), tensors)
    with pytest.raises(AdapterFileError, match=error):
        lortalib.nn.read(tmp_path)


@pytest.mark.parametrize("line", ["metatt_41d", "cp"])
def test_one_task_is_an_ordinary_adapter_and_a_lora(line, tmp_path):
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model, line)
    with adapter.using("b"):
        expected = output(model, inputs)
    one = adapter.task("b")
    assert type(one) is lortalib.nn.Adapter
    assert one.name == "b"
    assert not one.is_on_model
    other = model_of()
    lortalib.nn.load(other, one.save(tmp_path / "one", model=model))
    assert close(output(other, inputs), expected, 1e-10)
    other = model_of()
    lortalib.nn.export_lora(one, tmp_path / "lora", model)
    lortalib.nn.load_lora(other, tmp_path / "lora")
    assert close(output(other, inputs), expected, 1e-6)  # a LoRA of PEFT is float32
    other = model_of()
    bank = lortalib.nn.bank(other, str(one.network(one.groups[0]).legs), 2, dtype=torch.float64)
    bank.update({name: adapter.task(name) for name in TASKS})
    with bank.using(["b"] * 4):
        assert close(output(other, inputs), expected, 1e-10)


@pytest.mark.parametrize("shared", [(), ("in", "out")])
@pytest.mark.parametrize("line", ["metatt_41d", "indscal", *LINES])
def test_a_bank_takes_every_task(line, shared, tmp_path):
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model, line)
    names = ["b", None, "c", "a"]
    with adapter.using(names):
        expected = output(model, inputs)
    folder = adapter.save(tmp_path)
    one, acts_on = adapter.task("a").config.decomposition, adapter.config.acts_on
    adapter.remove()
    try:
        bank = lortalib.nn.bank(
            model, one, 2, shared=shared, acts_on=acts_on, alpha=2.0, dtype=torch.float64
        )
    except ValueError:  # nothing is left that an adapter has of its own
        assert shared
        return
    with bank.using([None]):
        assert close(output(model, inputs), output(model_of(), inputs))
    read = lortalib.nn.read(folder)
    for fill in (lambda: bank.load(folder), lambda: bank.update(read)):
        if shared and any(s.startswith("task") for s in line.split(", ") if "in" in s.split()):
            with pytest.raises(ValueError, match="each of its tasks has a"):
                fill()
            assert len(bank) == 0
            continue
        fill()
        assert tuple(bank) == TASKS
        with bank.using(names):
            assert close(output(model, inputs), expected, 1e-8)
        for name in TASKS:
            del bank[name]
    bank.remove()


def test_a_bank_refuses_tasks_of_another_shape(tmp_path):
    model = model_of()
    adapter = adapted(model)
    folder = adapter.save(tmp_path)
    adapter.remove()
    bank = lortalib.nn.bank(model, "cp", 2)
    with pytest.raises(ValueError, match=r"does not fit the bank: its group .* has the legs"):
        bank.load(folder)
    with pytest.raises(TypeError, match="an adapter with tasks, or a bank"):
        bank.update(lortalib.nn.read(folder, task="a"))
    assert len(bank) == 0
    bank.remove()


@pytest.mark.parametrize("line", ["metatt_41d", "cp", LINES[0]])
def test_one_task_of_a_folder(line, tmp_path):
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model, line)
    with adapter.using("b"):
        expected = output(model, inputs)
    folder = adapter.save(tmp_path / "all")
    other = model_of()
    loaded = lortalib.nn.load(other, folder, task="b")
    assert type(loaded) is lortalib.nn.Adapter
    assert loaded.name == "b"
    assert close(output(other, inputs), expected, 1e-10)
    assert lortalib.nn.load(other, folder, task="a", name="mine", active=False).name == "mine"
    read = lortalib.nn.read(folder, task="b")
    for k, write in enumerate(
        [
            lambda out: lortalib.nn.export_lora(read, out),
            lambda out: lortalib.nn.export_lora(adapter, out, task="b"),
            lambda out: adapter.export_lora(out, task="b"),
        ]
    ):
        other = model_of()
        lortalib.nn.load_lora(other, write(tmp_path / f"lora{k}"))
        assert close(output(other, inputs), expected, 1e-6)


@pytest.mark.parametrize("line", ["metatt_41d", "cp", LINES[0]])
def test_one_task_becomes_a_folder_of_peft(line, tmp_path):
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model, line)
    with adapter.using("b"):
        expected = output(model, inputs)
    folder = adapter.save(tmp_path / "all")
    with pytest.raises(ValueError, match=r"tasks 'a', 'b', 'c', and PEFT chooses.*task='a'"):
        lortalib.nn.convert(folder, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    one = lortalib.nn.convert(folder, tmp_path / "peft", task="b")
    found = peft.PeftModel.from_pretrained(model_of(), str(one), autocast_adapter_dtype=False)
    assert close(output(found.base_model.model.double(), inputs), expected, 1e-10)
    back = lortalib.nn.convert(one, tmp_path / "back")
    other = model_of()
    lortalib.nn.load(other, back)
    assert close(output(other, inputs), expected, 1e-10)


def test_a_task_that_is_not_there_is_refused(tmp_path):
    model = model_of()
    several = adapted(model).save(tmp_path / "several")
    with pytest.raises(KeyError, match=r"no task 'x'; its tasks are 'a', 'b', 'c'"):
        lortalib.nn.read(several, task="x")
    with pytest.raises(ValueError, match=r"one is wanted: write it alone.*task='a'"):
        lortalib.nn.compress(model_of(), [several], "cp", 2)
    plain = lortalib.nn.apply(model_of(), "cp", 2)
    for refused in [
        lambda: lortalib.nn.read(plain.save(tmp_path / "plain"), task="a"),
        lambda: lortalib.nn.load(model_of(), plain.save(tmp_path / "plain"), task="a"),
        lambda: plain.export_lora(tmp_path / "lora", task="a"),
    ]:
        with pytest.raises(ValueError, match="has no tasks; leave out the task 'a'"):
            refused()


@pytest.mark.parametrize("line", ["metatt_41d", *LINES])
def test_the_line_of_one_task_is_the_user_s(line):
    adapter = adapted(model_of(), line)
    written = str(adapter.tensor(adapter.groups[0]).legs)
    marks = written.count("(shared)")
    adapter.default = "b"
    for shown in [adapter.task("b"), adapter.snapshot(), adapter.network(adapter.groups[0])]:
        assert str(shown).count("(shared)") == marks == 0
    one = adapter.task("b")
    legs = str(one.network(one.groups[0]).legs)
    assert one.config.decomposition == legs
    assert legs == written.replace("task ", "")


def test_one_task_keeps_the_modules_that_train_with_all(tmp_path):
    model, inputs = LAW_FAMILIES["encoder"].model(), inputs_of("encoder")
    adapter = put(model, "metatt_41d", tasks=list(TASKS), train_also=["pooler"])
    with torch.no_grad():
        model.pooler.dense.weight.add_(1)
    with adapter.using("b"), torch.no_grad():
        expected = model(**inputs).pooler_output
    one = adapter.task("b")
    with torch.no_grad():
        model.pooler.dense.weight.zero_()
    folder = one.save(tmp_path / "one", model=model)
    with torch.no_grad():
        model.pooler.dense.weight.copy_(one.trained_modules.values(None)["pooler"]["dense.weight"])
    converted = lortalib.nn.convert(adapter.save(tmp_path / "all"), tmp_path / "peft", task="b")
    for place in (folder, converted):
        other = LAW_FAMILIES["encoder"].model()
        lortalib.nn.load(other, place)
        with torch.no_grad():
            assert close(other(**inputs).pooler_output, expected)


@pytest.mark.parametrize("line", ["metatt_41d", "indscal"])
def test_the_chosen_task_is_merged_and_taken_out_again(line):
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model, line)
    weights = {k: bits(p) for k, p in model.named_parameters()}
    with adapter.using("b"):
        expected = output(model, inputs)
        adapter.merge()
        assert close(output(model, inputs), expected, 1e-10)
    assert close(output(model, inputs), expected, 1e-10)  # no choice is needed
    with pytest.raises(ValueError, match=r"is merged.*unmerge"), adapter.using("b"):
        pass
    merged = output(model, inputs)
    with adapter.disabled():
        assert all(torch.equal(weights[k], bits(p)) for k, p in model.named_parameters())
    assert adapter.merged
    assert same_bits(output(model, inputs), merged)
    adapter.unmerge()
    assert all(torch.equal(weights[k], bits(p)) for k, p in model.named_parameters())
    with adapter.using("b"):
        assert same_bits(output(model, inputs), expected)
    adapter.default = "c"
    adapter.merge()
    adapter.unmerge()
    assert all(torch.equal(weights[k], bits(p)) for k, p in model.named_parameters())


@pytest.mark.parametrize(
    "line", ["metatt_41d", "task in r, out r, head r, layer matrix r"], ids=["common", "own"]
)
def test_share_residual_with_tasks(line, tmp_path):
    model, inputs = model_of("decoder"), inputs_of("decoder")
    options = {"targets": "all", "share_residual": True}
    adapter = adapted(model, line, **options)
    count = lortalib.nn.plan(
        model_of("decoder"), line, 2, tasks=list(TASKS), device="meta", **options
    ).count()
    assert adapter.count() == count
    adapter.add_task("d", "a")
    with adapter.using(["d", "b", "a", "c"]):
        expected = output(model, inputs)
    other = model_of("decoder")
    loaded = lortalib.nn.load(other, adapter.save(tmp_path))
    with loaded.using(["d", "b", "a", "c"]):
        assert same_bits(output(other, inputs), expected)
    other = model_of("decoder")
    lortalib.nn.load(other, adapter.task("a").save(tmp_path / "one", model=model))
    assert close(output(other, inputs)[2], expected[2], 1e-10)


def test_verified_on_the_way():
    model = LAW_FAMILIES["encoder"].model()
    adapter = lortalib.nn.apply(
        model, "indscal", 2, tasks=["a", "b"], verify_with=LAW_FAMILIES["encoder"].inputs()
    )
    assert adapter.active
    assert adapter.default is None


# Refused


@pytest.mark.parametrize(
    ("line", "options", "error"),
    [
        ("metatt_41d", {"tasks": "sst2"}, "tasks must list names"),
        ("metatt_41d", {"tasks": ["a", "a"]}, "'a' stands twice"),
        ("metatt_41d", {"tasks": ["a", ""]}, "non-empty text without dots"),
        ("metatt_41d", {"tasks": ["a", 1]}, "non-empty text without dots"),
        ("metatt_41d", {"tasks": ["mean"]}, "not 'mean'"),
        ("metatt_41d", {"dropout": 0.1}, "no dropout"),
        ("metatt_41d", {"shared": ("in",)}, "Leave out shared="),
        ("lotr", {}, "no parameter carries the mode 'task'"),
        ("in r, head out r, layer matrix r, task r (of n)", {}, "is hashed"),
        ("in r, head out r, layer matrix r, task", {}, "one number for each task"),
        ("in r, head out r, layer matrix r, task.1 r, task.2 r", {"tasks": list("abcd")}, "is split"),
        ("task in r, layer out r (tied), matrix r", {"tasks": ["a", "b"]}, "only one carries 'task'"),
        ("metatt_41d", {"tasks": []}, r"apply\(model, ..., tasks="),
    ],
)  # fmt: skip
def test_bad_arguments_leave_the_model_as_it_was(line, options, error):
    model = LAW_FAMILIES["encoder"].model()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=error):
        lortalib.nn.apply(model, line, 2, **{"tasks": ["a", "b", "c"], **options})
    assert not adapters(model)
    assert list(model.state_dict()) == before


def test_an_adapter_as_start_of_tasks_is_refused():
    first = adapted(model_of())
    first.default = "b"
    model = model_of()
    for start in (first, first.task("a")):
        with pytest.raises(ValueError, match="init= is an adapter, and tasks= names tasks"):
            lortalib.nn.apply(model, "metatt_41d", 2, tasks=["a", "b", "c"], init=start)
    assert not adapters(model)


def test_what_other_doors_say():
    with pytest.raises(ValueError, match="PEFT have no such mode"):
        lortalib.nn.bank(LAW_FAMILIES["encoder"].model(), "metatt_41d", 2)
    config, model = LortaConfig(decomposition="metatt_41d", rank=2), LAW_FAMILIES["encoder"].model()
    with pytest.raises(ValueError, match="PEFT have no such mode"):
        peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="tasks"):
        lortalib.nn.plan(LAW_FAMILIES["encoder"].model(), numbers=1000, tasks=["a"])


@pytest.mark.parametrize("default", [None, "a"])
def test_one_task_cannot_be_changed_under_the_others(default):
    model = model_of(FAMILIES[0])
    adapter = lortalib.nn.apply(model, "metatt_41d", 2, tasks=["a", "b"])
    adapter.default = default
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with unchanged(model), pytest.raises(ValueError, match=r"another rank would change one task"):
        lortalib.nn.change_rank(adapter, optimizer, 3)
    with unchanged(model), pytest.raises(ValueError, match=r"aligning it would change one task"):
        lortalib.nn.align_to_gradient(model, [inputs_of(FAMILIES[0])])


@pytest.mark.parametrize(
    "take",
    [
        lambda bank, folder: bank.add("a", folder),
        lambda bank, folder: lortalib.nn.compress(model_of(), folder, "cp", 2),
        lambda bank, folder: lortalib.nn.export_lora(lortalib.nn.read(folder), folder, model_of()),
    ],
    ids=["bank", "compress", "export"],
)
def test_a_folder_of_tasks_where_one_is_needed_says_how_to_take_it(take, tmp_path):
    line = "in a, layer a b, b c, matrix c d, head out d"
    bank = lortalib.nn.bank(model_of(), line, 2)
    folder = adapted(model_of()).save(tmp_path)
    with pytest.raises(ValueError, match=r"has the tasks .*(one is wanted|nn\.read).*task='a'\)"):
        take(bank, folder)
    bank["a"] = lortalib.nn.read(folder).task("a")


def test_projections_whose_rows_cannot_differ_are_refused_and_nothing_stays():
    model = MIXTRAL.model()
    line = "in r, out r, head r, layer matrix expert r, task r"
    with pytest.raises(ValueError, match="packs experts"):
        lortalib.nn.apply(model, line, 2, tasks=["a", "b"], targets=["experts.gate_up_proj"])
    assert not adapters(model)


def test_the_description_names_the_tasks():
    model = model_of()
    adapter = adapted(model)
    assert "tasks: a, b, c" in str(adapter)
    plan = lortalib.nn.plan(model_of(), "metatt_41d", 2, tasks=["a", "b"], device="meta")
    assert plan.tasks == ("a", "b")
    assert "tasks a, b" in str(plan)
    assert pickle.loads(pickle.dumps(adapter.task("a"))).name == "a"
