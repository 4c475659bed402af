"""Adapters of several tasks: T[task, layer, ...], of which every row of a batch uses its slice."""

import copy
import json
import pickle
import threading
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from adapted import bits, close, output, put, same_bits, unchanged
from banks import prompts, small_llama
from dense_forward import by_deepcopy, by_pickle
from hypothesis import given, reject
from hypothesis import strategies as st
from models import LAW_FAMILIES, MIXTRAL
from strategies import examples, generator, mode_sets
from updates import dense_output, dense_tensor, updates

import lortalib
from lortalib import decomp
from lortalib.nn import AdapterFileError, adapters
from lortalib.peft import LortaConfig

TASKS = ("a", "b", "c")
FAMILIES = ["decoder", "encoder", "encoder-decoder", "fused", "fused, stored (in, out)"]
MODES = {"task", "layer", "head", "matrix", "in", "out"}
#: Every registered format that takes the mode task, on the weights or on the stream.
FORMATS = [
    name
    for name in decomp.formats
    if any({*modes} in (MODES, MODES - {"head"}) for modes in mode_sets(name))
]
LINES = [
    "task layer matrix in r, task layer matrix head out r",
    "in r (of n), head out r (of n, zero), layer matrix task r",
    "in p (frozen), task layer matrix p q, head out q (frozen)",
    "task in r, out r, head r, layer matrix r, task r",
]


def model_of(family="encoder"):
    return LAW_FAMILIES[family].model().double()


def inputs_of(family, rows=4):
    inputs = LAW_FAMILIES[family].inputs()
    draw = generator(5)
    return {
        k: torch.randint(5, 60, (rows, v.shape[1]), generator=draw) if "ids" in k
        else v[:1].expand(rows, *v.shape[1:])
        for k, v in inputs.items()
    }  # fmt: skip


def adapted(model, line="metatt_41d", rank=2, tasks=TASKS, **options):
    options = {"dtype": torch.float64, "alpha": 0.7, **options}
    return put(model, line, rank, tasks=list(tasks), **options)


def record(adapter, task):
    """What `updates` reads: the slices of the tensor at a task."""
    k = adapter.tasks.index(task)

    def network(group):
        return adapter.tensor(group).select(task=k)

    return SimpleNamespace(groups=adapter.groups, scaling=adapter.scaling, network=network)


def rows_by_definition(adapter, plain, inputs, names):
    """The outputs, each row of a model with the dense update of its task in the weights."""
    found = []
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        added = {} if name is None else updates(record(adapter, name), plain)
        found.append(dense_output(plain, added, own))
    return torch.cat(found)


def gradients(value, adapter):
    trained = [p for p in adapter.parameters() if p.requires_grad]
    noise = torch.randn(value.shape, generator=generator(1), dtype=value.dtype)
    return torch.autograd.grad((value * noise).sum(), trained, materialize_grads=True)


@st.composite
def task_lines(draw):
    """A line of legs over the modes of a model and ``task``: most modes on one or two parameters."""
    number = draw(st.integers(2, 4))
    terms = [["r"] for _ in range(number)]

    def place(leg, most):
        at = st.lists(st.integers(0, number - 1), min_size=1, max_size=most, unique=True)
        for position in draw(at):
            terms[position].append(leg)

    place("in", 1)
    for mode in MODES - {"in"}:
        place(mode, 2)
    if draw(st.booleans()):
        for position in draw(st.lists(st.integers(0, number - 1), min_size=2, unique=True)):
            terms[position].append("q")
    frozen = draw(st.sets(st.integers(0, number - 1), max_size=number - 1))
    texts = [" ".join(draw(st.permutations(term))) for term in terms]
    return ", ".join(t + " (frozen)" * (k in frozen) for k, t in enumerate(texts))


def check_rows(line, family, names, alone, **options):
    model, inputs = model_of(family), inputs_of(family)
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adapter = adapted(model, line, **options)
    source = generator(2)
    with torch.no_grad():  # a start can be constant over `in`, which a layer norm makes invisible
        for parameter in adapter.parameters():
            parameter.normal_(std=0.6, generator=source)
    expected = rows_by_definition(adapter, plain, inputs, names)
    with adapter.using(names):
        value = model(**inputs)[0]
    assert close(value.detach(), expected.detach(), 1e-8)
    wanted, found = gradients(expected, adapter), gradients(value, adapter)
    largest = max(gradient.abs().max().item() for gradient in wanted)
    assert largest > 1e-4
    for one, other in zip(found, wanted, strict=True):
        assert close(one / largest, other / largest, 1e-8)
    with adapter.using(alone):
        value = model(**inputs)[0]
    expected = rows_by_definition(adapter, plain, inputs, [alone] * 4)
    assert close(value.detach(), expected.detach(), 1e-8)
    for one, other in zip(gradients(value, adapter), gradients(expected, adapter), strict=True):
        assert close(one / largest, other / largest, 1e-8)


NAMES = st.lists(st.sampled_from([*TASKS, None]), min_size=4, max_size=4).filter(any)


@pytest.mark.parametrize("line", [*FORMATS, *LINES])
@given(names=NAMES, alone=st.sampled_from(TASKS), family=st.sampled_from(FAMILIES[:2]))
@examples(2)
def test_rows_and_gradients_are_those_of_dense_slices(line, names, alone, family):
    check_rows(line, family, names, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_layout_of_weights(family):
    for line in ("metatt_41d", "indscal"):
        if (line, family) != ("indscal", "fused"):
            check_rows(line, family, ["b", None, "a", "b"], "c")


@given(line=task_lines(), names=NAMES, alone=st.sampled_from(TASKS))
@examples(12)
def test_of_any_line(line, names, alone):
    shape = {"task": 3, "layer": 2, "head": 4, "matrix": 4, "in": 16, "out": 4}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            decomp.network(line, shape, 2, device="meta")
    except decomp.LegsError:
        reject()
    check_rows(line, "encoder", names, alone)


def test_all_formats_are_tested():
    assert {"metatt_41d", "cp", "tucker", "tt", "ring", "cara", "indscal", "rescal"} <= {*FORMATS}
    assert "lora" not in FORMATS


@pytest.mark.parametrize("line", [*FORMATS, *LINES])
def test_the_tensor_of_all_tasks_is_that_of_the_plan(line):
    model = model_of()
    options = {"tasks": list(TASKS), "init": "normal", "dtype": torch.float64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plan = lortalib.nn.plan(model, line, 2, generator=generator(), **options)
    adapter = adapted(model, line)
    assert adapter.count() == plan.count()
    assert adapter.count(False) == plan.count(False)
    (group,) = adapter.groups
    whole = adapter.tensor(group)
    assert (str(whole.legs), whole.shape) == (
        str(plan.networks[group.name].legs),
        plan.networks[group.name].shape,
    )
    expected = dense_tensor(plan.networks[group.name])
    assert close(whole.dense().detach(), expected.detach(), 1e-12)
    axis = whole.modes.index("task")
    for k, task in enumerate(TASKS):
        one = adapter.task(task).network(group)
        assert close(one.dense().detach(), expected.select(axis, k).detach(), 1e-12)
    storages = {p.untyped_storage().data_ptr() for p in adapter.parameters()}
    assert len(storages) == len(list(adapter.parameters()))  # no parameter is a part of another
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert trained == adapter.count()


def test_a_task_for_each_token():
    model = small_llama().double()
    adapter = adapted(model)
    ids = prompts(2, 5)["input_ids"]
    owner = torch.tensor([0, 0, 0, 1, 1])
    mask = ((owner[:, None] == owner) & torch.ones(5, 5).tril().bool())[None, None].expand(
        2, 1, 5, 5
    )
    places = torch.tensor([[0, 1, 2, 0, 1]]).expand(2, 5)
    with adapter.using([["a"] * 3 + ["b"] * 2, ["c"] * 3 + ["a"] * 2]):
        found = model(ids, attention_mask=mask, position_ids=places)[0].detach()
    for row, names in enumerate((("a", "b"), ("c", "a"))):
        for name, part in zip(names, (slice(0, 3), slice(3, 5))):
            with adapter.using(name):
                alone = output(model, {"input_ids": ids[row : row + 1, part]})[0]
            assert close(found[row, part], alone, 1e-10)


def test_beams_and_decoding_use_the_task_of_their_row():
    model = small_llama()
    adapter = put(model, "metatt_41d", tasks=list(TASKS), alpha=0.5)
    ids = prompts(3, 6)["input_ids"]
    options = {
        "attention_mask": torch.ones_like(ids), "num_beams": 3, "max_new_tokens": 4,
        "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    with adapter.using(["c", "a", "b"]):
        together = model.generate(ids, **options)
    for row, name in enumerate("cab"):
        own = {**options, "attention_mask": options["attention_mask"][:1]}
        with adapter.using(name):
            alone = model.generate(ids[row : row + 1], **own)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


# Choosing


def test_a_fresh_adapter_changes_no_bit_and_a_removed_one_leaves_nothing():
    model, inputs = model_of(), inputs_of("encoder")
    before = output(model, inputs)
    adapter = adapted(model, init="invariant")
    with adapter.using(["a", "b", None, "c"]):
        assert same_bits(output(model, inputs), before)
    adapter.disable()
    assert same_bits(output(model, inputs), before)  # no task need be chosen
    adapter.enable()
    adapter.remove()
    assert same_bits(output(model, inputs), before)
    with pytest.raises(RuntimeError, match="was removed"), adapter.using("a"):
        pass


def test_without_a_choice_the_forward_says_what_to_do():
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model)
    for call in (
        lambda: model(**inputs),
        lambda: adapter.network(adapter.groups[0]),
        adapter.merge,
    ):
        with pytest.raises(
            ValueError, match=r"not one is chosen: stay within `with adapter.using\('a'"
        ):
            call()
    with adapter.using(["a", "b", "c", "a"]), pytest.raises(ValueError, match="not one is chosen"):
        adapter.delta(adapter.sites[0])
    adapter.default = "b"
    found = output(model, inputs)
    with adapter.using("b"):
        assert same_bits(output(model, inputs), found)
    with adapter.using("c"):
        assert not close(output(model, inputs), found, 1e-6)
        with adapter.using(["b"]):  # one row, whatever the batch
            assert same_bits(output(model, inputs), found)
    adapter.default = "c"
    assert not close(output(model, inputs), found, 1e-6)
    adapter.default = None
    with pytest.raises(ValueError, match="not one is chosen"):
        model(**inputs)
    with pytest.raises(KeyError, match="no task 'z'; its tasks are 'a', 'b', 'c'"):
        adapter.default = "z"
    with pytest.raises(KeyError, match="no task 'z'"), adapter.using(["a", "z"]):
        pass
    with adapter.using(["a", "b", "c"]), pytest.raises(ValueError, match="named 3 rows"):
        model(**inputs)
    one = adapted(model, tasks=["only"], name="one")
    adapter.disable()
    assert one.default == "only"
    assert torch.isfinite(output(model, inputs)).all()


def test_one_task_takes_inputs_without_an_axis_of_the_batch():
    model = model_of()
    adapter = adapted(model)
    site = adapter.sites[0]
    module, x = model.get_submodule(site.path), torch.randn(5, 16, generator=generator()).double()
    with torch.no_grad():
        with adapter.using("b"):
            expected = x @ (module.weight + adapter.delta(site)).mT + module.bias
            assert close(module(x), expected, 1e-10)
        with adapter.using(["a", "b"]), pytest.raises(ValueError, match="begin with the batch"):
            module(x)


def test_each_thread_has_a_choice_of_its_own():
    model, inputs = model_of(), inputs_of("encoder")
    adapter, wanted, wrong = adapted(model), {}, []
    for name in TASKS:
        with adapter.using(name):
            wanted[name] = output(model, inputs)

    def work(name):
        for _ in range(5):
            with adapter.using(name):
                if not torch.equal(output(model, inputs), wanted[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_adapters_add_up():
    model, inputs = model_of(), inputs_of("encoder")
    plain = copy.deepcopy(model)
    one, two = adapted(model), adapted(model, "cp", tasks=["x", "y"], seed=3, name="two")
    three = put(model, "cp", name="three", seed=4, dtype=torch.float64)
    with one.using(["a", "b", "c", "a"]), two.using(["y", "y", None, "x"]):
        found = output(model, inputs)
    for row, (first, second) in enumerate((("a", "y"), ("b", "y"), ("c", None), ("a", "x"))):
        added = updates(record(one, first), plain)
        others = [three] if second is None else [three, record(two, second)]
        for more in (updates(other, plain) for other in others):
            added = {name: added[name] + more[name] for name in added}
        own = {k: v[row : row + 1] for k, v in inputs.items()}
        assert close(found[row], dense_output(plain, added, own)[0].detach(), 1e-8)


@pytest.mark.parametrize("way", [by_deepcopy, by_pickle])
def test_copies_choose_for_themselves(way):
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model)
    adapter.default = "c"
    other = way(model)
    copied = adapters(other)["default"]
    assert same_bits(output(other, inputs), output(model, inputs))
    with copied.using("a"), adapter.using("b"):
        found, own = output(other, inputs), output(model, inputs)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    with copied.using("a"):
        assert same_bits(output(other, inputs), found)
    with copied.using("b"):
        assert same_bits(output(other, inputs), own)


# Training


def test_a_step_within_a_context_takes_effect_in_its_next_forward():
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    losses, names = [], ["a", "b", "a", "c"]
    with adapter.using(names):
        for _ in range(2):
            loss = model(**inputs)[0].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        within = output(model, inputs)
    with adapter.using(names):
        assert same_bits(output(model, inputs), within)
    assert losses[0] != losses[1]
    adapter.default = "a"
    before = output(model, inputs)
    with torch.no_grad():
        next(adapter.parameters()).mul_(2)
    assert not close(output(model, inputs), before, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("then", ["other", "none", "default"])
def test_a_checkpoint_runs_again_with_the_tasks_of_the_forward(reentrant, then):
    model, inputs = small_llama().double(), prompts()
    adapter, found = adapted(model), []
    for checkpoints in (False, True):
        model.train(checkpoints)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        adapter.default = "c" if then == "default" else None
        if then == "default":
            loss = model(**inputs, use_cache=False)[0].square().mean()
            adapter.default = "a"
        else:
            with adapter.using(["b", "a"]):
                loss = model(**inputs, use_cache=False)[0].square().mean()
        if then == "other":
            with adapter.using("c"):
                loss.backward()
        else:
            loss.backward()
        found.append([p.grad for p in adapter.parameters()])
        adapter.zero_grad()
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    for one, other in zip(*found):
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_again_with_an_adapter_that_was_switched_off(reentrant):
    model, inputs = small_llama().double(), prompts()
    adapter, found = adapted(model), []
    for checkpoints in (False, True):
        adapter.enable()
        model.train(checkpoints)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with adapter.using("b"):
            loss = model(**inputs, use_cache=False)[0].square().mean()
        adapter.disable()
        loss.backward()
        found.append([p.grad for p in adapter.parameters() if p.grad is not None])
        adapter.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("line", ["metatt_41d", "cara", LINES[0], LINES[2]])
@pytest.mark.parametrize("start", ["mean", "b"])
def test_an_added_task_leaves_the_others_as_they_are_bit_for_bit(line, start):
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model, line)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.1)
    with adapter.using(["a", "b", "c", "a"]):
        model(**inputs)[0].square().mean().backward()
    optimizer.step()  # the optimiser has moments, and its parameters gradients

    def outputs():
        found = []
        for names in (*TASKS, ["c", "a", None, "b"]):
            with adapter.using(names):
                found.append(bits(output(model, inputs)))
        return found

    before, values = outputs(), {k: v.detach().clone() for k, v in adapter.named_parameters()}
    adapter.add_task("d", start)
    assert adapter.tasks == ("a", "b", "c", "d")
    new = {k: p for k, p in adapter.named_parameters() if k not in values}
    assert {k for k, p in adapter.named_parameters() if p.requires_grad} == {
        k for k in new if new[k].requires_grad
    }
    assert new
    assert any(p.requires_grad for p in new.values())
    (group,) = adapter.groups
    own = [adapter.network_of(group.name, t).stored for t in (*TASKS, "d")]
    for *old, added in zip(*own):
        expected = torch.stack(old).mean(0) if start == "mean" else old[1]
        assert torch.allclose(added, expected, atol=1e-15)
    if start == "b":
        with adapter.using("b"):
            expected = output(model, inputs)
        with adapter.using("d"):
            assert same_bits(output(model, inputs), expected)
    adapter.zero_grad()
    optimizer.add_param_group({"params": [p for p in new.values() if p.requires_grad]})
    for _ in range(3):
        with adapter.using(["d", "a", "d", "b"]):
            model(**inputs)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(values[k], p) for k, p in adapter.named_parameters() if k in values)
    assert all(same_bits(one, other) for one, other in zip(before, outputs(), strict=True))
    for *_, added, first in zip(*own, own[1]):
        assert added is first or not added.requires_grad or not torch.equal(added, first)
    adapter.train_tasks()
    terms = adapter.network_of(group.name, "d").legs.terms
    assert all(
        p.requires_grad != term.frozen
        for task in adapter.tasks
        for term, p in zip(terms, adapter.network_of(group.name, task).stored)
    )


def test_what_trains_can_be_chosen():
    model = LAW_FAMILIES["encoder"].model()
    adapter = put(model, "metatt_41d", tasks=list(TASKS), train_also=["pooler"])
    pooler = list(model.pooler.parameters())
    adapter.train_tasks(["a", "c"])
    trained = [k for k, p in adapter.named_parameters() if p.requires_grad]
    assert trained == ["networks.encoder@a.b_c", "networks.encoder@c.b_c"]
    assert not any(p.requires_grad for p in pooler)
    adapter.train_tasks()
    assert all(p.requires_grad for p in [*pooler, *adapter.parameters()])
    with pytest.raises(TypeError, match=r"give \['a'\]"):
        adapter.train_tasks("a")
    with pytest.raises(KeyError, match="no task 'z'"):
        adapter.train_tasks(["z"])


def test_a_task_that_cannot_be_added_leaves_the_adapter_as_it_was(monkeypatch):
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model)
    with adapter.using("a"):
        before = output(model, inputs)
    state, flags = list(adapter.state_dict()), [p.requires_grad for p in adapter.parameters()]

    def interrupted(self, names):
        next(iter(self.parameters())).requires_grad_(False)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lortalib.nn.TaskAdapter, "train_tasks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapter.add_task("d")
    for name, error in (
        ("a", "has the task 'a' already"),
        ("x.y", "without dots"),
        ("mean", "'mean'"),
    ):
        with pytest.raises(ValueError, match=error):
            adapter.add_task(name)
    with pytest.raises(KeyError, match="no task 'z'"):
        adapter.add_task("d", start="z")
    assert adapter.tasks == TASKS
    assert list(adapter.state_dict()) == state
    assert [p.requires_grad for p in adapter.parameters()] == flags
    with adapter.using("a"):
        assert same_bits(output(model, inputs), before)


def test_parameter_groups_have_the_parameters_of_all_tasks():
    adapter = adapted(model_of())
    found = lortalib.nn.parameter_groups(adapter, 1e-3, speeds={"layer": 2})
    given = [p for group in found for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in adapter.parameters()}
    assert len(given) == len({id(p) for p in given}) == 7


# Files, export, merging


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
    folder = one.save(tmp_path, model=model)
    other = LAW_FAMILIES["encoder"].model()
    lortalib.nn.load(other, folder)
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
