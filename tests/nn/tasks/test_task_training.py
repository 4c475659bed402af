"""Adapters of several tasks: what trains, and what an added task leaves as it is."""

import pytest
import torch
from adapted import bits, close, output, put, same_bits
from banks import prompts, small_llama
from models import LAW_FAMILIES
from task_adapters import LINES, TASKS, adapted, inputs_of, model_of

import lortalib


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


def test_every_task_has_memory_and_a_mode_like_an_adapter_of_its_own():
    """accelerate leaves out of a file what has the memory of another parameter."""
    model = model_of().eval()
    adapter = adapted(model)
    adapter.add_task("d")
    memory = [p.untyped_storage() for p in adapter.parameters()]
    assert len({each.data_ptr() for each in memory}) == len(memory)
    assert [each.nbytes() for each in memory] == [p.nbytes for p in adapter.parameters()]
    assert not any(module.training for module in model.modules())


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


@pytest.mark.parametrize("line", ["metatt_41d", "cp", "in p, task layer matrix p q, head out q"])
def test_the_own_parameters_of_tasks_have_a_learning_rate(line):
    adapter = adapted(model_of(), line)
    groups = lortalib.nn.parameter_groups(adapter, 1e-2, speeds={"task": 3, "layer": 2})
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    assert len(rates) == len(list(adapter.parameters()))
    whole = adapter.tensor(adapter.groups[0]).legs
    for task in TASKS:
        network = adapter.network_of(adapter.groups[0].name, task)
        for term, parameter in zip(whole.terms, network.stored, strict=True):
            wanted = 1e-2 * (3 if "task" in term.legs else 1) * (2 if "layer" in term.legs else 1)
            assert rates[id(parameter)] == pytest.approx(wanted)
    adapter.train_tasks(["b"])
    groups = lortalib.nn.parameter_groups(adapter, 1e-2, speeds={"task": 3})
    assert [group["lr"] for group in groups] == [pytest.approx(0.03)]
    with pytest.raises(ValueError, match="no network has the leg 'tasks'; there are"):
        lortalib.nn.parameter_groups(adapter, 1e-2, speeds={"tasks": 3})
