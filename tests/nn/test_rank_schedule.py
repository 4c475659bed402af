"""Ranks that change in training: the adapter, its optimiser, and what is refused."""

import copy
import sys

import pytest
import torch
from adapted import FORMATS, close, output, put
from faults import Fault, differences, frozen_garbage, state  # noqa: F401
from models import FAMILIES
from strategies import generator

from lortalib import nn

CHANGING = [name for name in FORMATS if name not in ("lora_xs", "uni_lora", "vera")]
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
}


def bert():
    model = FAMILIES["Bert"].model("ForSequenceClassification")
    return model, {"input_ids": torch.arange(6).reshape(2, 3)}


def training(decomposition="cp", rank=4, kind="adamw", **options):
    """A model in training: its inputs, its adapter and optimiser, and a function that takes a step."""
    model, inputs = bert()
    adapter = put(model, decomposition, rank, train_also=["classifier"], **options)
    optimizer = OPTIMIZERS[kind](nn.parameter_groups(adapter, 1e-2))

    def step():
        optimizer.zero_grad()
        output(model, inputs)  # pairs that a later forward could reuse
        model(**inputs)[0].square().sum().backward()
        optimizer.step()

    return model, inputs, adapter, optimizer, step


@pytest.mark.parametrize("decomposition", [*CHANGING, "indscal", "rescal"])
def test_a_training_goes_on_with_the_new_ranks(decomposition, tmp_path):
    model, inputs, adapter, optimizer, step = training(decomposition)
    schedule = nn.RankSchedule(adapter, optimizer, {2: 2, 4: 3}, generator=generator(1))
    counts = [adapter.count()]
    for k in range(1, 6):
        step()
        before = output(model, inputs)
        assert schedule.step() == (k in (2, 4))
        counts.append(adapter.count())
        after = output(model, inputs)
        assert close(after, before) == (k != 2)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in optimizer.state} <= held
        for p, kept in optimizer.state.items():
            assert all(value.shape in (p.shape, ()) for value in kept.values())
    assert counts[1] == counts[0] > counts[2] == counts[3] < counts[4]
    assert schedule.errors[4] == dict.fromkeys(schedule.errors[4], 0.0)
    assert all(0 < error < 1 for error in schedule.errors[2].values())
    expected = output(model, inputs)
    adapter.save(tmp_path)
    adapter.remove()
    again = nn.load(model, tmp_path)
    assert again.count() == counts[-1]
    assert torch.equal(output(again.model, inputs), expected)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_follows_the_coordinates(kind):
    _, _, adapter, optimizer, step = training(kind=kind)
    step()
    step()
    group = adapter.groups[0]
    network = adapter.network(group)
    old = [tensor.detach().clone() for tensor in network.stored]
    states = [copy.copy(optimizer.state[tensor]) for tensor in network.stored]
    nn.change_rank(adapter, optimizer, 2)
    assert adapter.network(group) is network
    assert network.ranks == {"r": 2}
    kept = None
    for before, was, tensor in zip(old, states, network.stored):
        rows = [k for k in range(4) if any(torch.equal(before[:, k], c) for c in tensor.T)]
        kept = kept or rows
        assert rows == kept
        now = optimizer.state[tensor]
        assert set(now) == set(was)
        for name, value in was.items():
            wanted = value[:, rows] if value.ndim else value
            assert torch.equal(now[name], wanted), name


def test_a_step_after_growth_moves_the_old_numbers_as_without_it():
    two = [training(kind="sgd", generator=generator(3)) for _ in range(2)]
    for _, _, _, _, step in two:
        step()
    nn.change_rank(two[1][2], two[1][3], 6, generator=generator(1))
    for _, _, _, _, step in two:
        step()
    small, large = (adapter.network(adapter.groups[0]).tensors for _, _, adapter, _, _ in two)
    for one, other in zip(small, large):
        assert close(other[:, :4], one, 1e-5)


def test_schedulers_groups_and_frozen_parameters_stay():
    _, _, adapter, optimizer, step = training(rank=3)
    network = adapter.network(adapter.groups[0])
    network.get_parameter("layer_r").requires_grad_(False)
    rates = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    groups = list(optimizer.param_groups)
    step()
    nn.change_rank(adapter, optimizer, 2)
    rates.step()
    assert [one is other for one, other in zip(groups, optimizer.param_groups)] == [True, True]
    assert groups[0]["lr"] == 5e-3
    assert not network.get_parameter("layer_r").requires_grad
    assert dict(network.named_parameters()).keys() == {
        "in_r",
        "layer_r",
        "matrix_r",
        "head_r",
        "out_r",
    }
    step()
    network.get_parameter("layer_r").requires_grad_(True)
    restored = torch.optim.AdamW(nn.parameter_groups(adapter, 1e-2), amsgrad=True)
    restored.load_state_dict(optimizer.state_dict())


class FaultOfTheChange(Fault):
    """Raises at the k-th call of a function of the file that makes the change."""

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename.endswith("_change_rank.py"):
            super().__call__(frame, event, arg)


@pytest.mark.parametrize(("kind", "most"), [(Fault, 40), (FaultOfTheChange, 1000)])
def test_whatever_is_raised_within_a_change_all_is_as_before_or_as_after(kind, most):
    def fresh():
        found = training(rank=3)
        found[-1]()
        found[3].zero_grad()
        return found

    def change(found):
        nn.change_rank(found[2], found[3], {"r": 4}, generator=generator(1))

    def picture(found):
        model, _, _, optimizer, _ = found
        held = [[tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups]
        ids = {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert ids == {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in optimizer.state} <= ids
        return held, sorted(map(str, optimizer.state_dict()["state"].values()))

    change(fresh())  # what is computed once and kept is no part of the count
    begun, done = fresh(), fresh()
    wanted_output = output(begun[0], begun[1])
    with kind() as counted:
        change(done)
    pictures = [picture(begun), picture(done)]
    states = [(*copy.deepcopy(state(found[0])[:2]), found[0]) for found in (begun, done)]
    ends = set()
    for at in range(0, counted.calls, max(1, counted.calls // most)):
        found = fresh()
        with pytest.raises(KeyboardInterrupt), kind(at=at):
            change(found)
        reached = pictures.index(picture(found))
        assert not differences(state(found[0]), states[reached])
        assert close(output(found[0], found[1]), wanted_output)
        change(found)
        found[-1]()
        ends.add(reached)
    assert 0 in ends
    assert sys.gettrace() is None


def test_what_cannot_change_is_refused_and_stays():
    model, inputs, adapter, optimizer, step = training()
    step()
    before = output(model, inputs)
    with pytest.raises(ValueError, match="ranks were given for z"):
        nn.change_rank(adapter, optimizer, {"z": 2})
    with pytest.raises(ValueError, match="lacks 5 of the 5 parameters of adapter 'default'"):
        nn.change_rank(adapter, torch.optim.SGD(model.classifier.parameters()), 2)
    others = list(adapter.parameters())[1:]
    with pytest.raises(ValueError, match=r"lacks 1 of the 5 .* go on with the old ones"):
        nn.RankSchedule(adapter, torch.optim.SGD(others), {1: 2})  # another has the first
    first = adapter.network(adapter.groups[0]).stored[0]
    optimizer.state[first]["prev_step"] = torch.ones(3)
    with pytest.raises(ValueError, match="keeps 'prev_step', and it is not known"):
        nn.change_rank(adapter, optimizer, 2)
    del optimizer.state[first]["prev_step"]
    handle = first.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match="hooks for its gradient"):
        nn.change_rank(adapter, optimizer, 2)
    handle.remove()
    adapter.merge()
    with pytest.raises(ValueError, match="is merged and does not train"):
        nn.change_rank(adapter, optimizer, 2)
    adapter.unmerge()
    assert torch.equal(output(model, inputs), before)
    assert adapter.count() == 4 * sum(adapter.groups[0].shape.values())
    adapter.remove()
    with pytest.raises(RuntimeError, match="was removed from its model"):
        nn.change_rank(adapter, optimizer, 2)


@pytest.mark.parametrize(
    ("decomposition", "options", "says"),
    [
        ("vera", {}, "a frozen parameter keeps its numbers"),
        ("uni_lora", {}, "another rank would draw anew"),
        ("cp", {"targets": "all", "share_residual": True}, "share a parameter"),
    ],
)
def test_adapters_that_cannot_change_are_refused_before_the_training(decomposition, options, says):
    _, _, adapter, optimizer, _ = training(decomposition, **options)
    with pytest.raises(ValueError, match=says):
        nn.RankSchedule(adapter, optimizer, {10: 2})


def test_trying_the_changes_of_a_schedule_takes_no_random_numbers():
    _, _, adapter, optimizer, _ = training()
    before = torch.get_rng_state()
    nn.RankSchedule(adapter, optimizer, {1: 8, 2: 12})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ranks", [{}, {0: 2}, {1.5: 2}, {True: 2}, [2]])
def test_steps_that_are_none_are_refused(ranks):
    _, _, adapter, optimizer, _ = training()
    with pytest.raises(ValueError, match=r"ranks must map steps|counted from 1"):
        nn.RankSchedule(adapter, optimizer, ranks)


def test_a_checkpoint_that_waits_and_several_processes_are_refused(monkeypatch):
    _, _, adapter, optimizer, _ = training()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="several processes train"):
        nn.change_rank(adapter, optimizer, 2)
    monkeypatch.undo()
    model = adapter.model.train()
    model.gradient_checkpointing_enable()
    loss = model(input_ids=torch.tensor([[1, 2]]))[0].sum()
    with pytest.raises(RuntimeError, match="waits for its backward"):
        nn.change_rank(adapter, optimizer, 2)
    loss.backward()
    nn.change_rank(adapter, optimizer, 2)
    assert adapter.network(adapter.groups[0]).ranks == {"r": 2}


@pytest.mark.parametrize("decomposition", ["cp", "tt"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_training_goes_on_from_a_checkpoint(decomposition, stop, tmp_path):
    ranks = {2: 2, 4: 5}

    def started():
        model, _, adapter, optimizer, step = training(decomposition)
        return (
            model,
            adapter,
            step,
            nn.RankSchedule(adapter, optimizer, ranks, generator=generator(1)),
        )

    model, adapter, step, whole = started()
    for _ in range(5):
        step()
        whole.step()
    _, part, step, schedule = started()
    for _ in range(stop):
        step()
        schedule.step()
    part.save(tmp_path)
    torch.save([schedule.optimizer.state_dict(), schedule.state_dict()], tmp_path / "state")

    other, inputs = bert()
    loaded = nn.load(other, tmp_path)
    optimizer = OPTIMIZERS["adamw"](nn.parameter_groups(loaded, 1e-2))
    of_optimizer, of_schedule = torch.load(tmp_path / "state", weights_only=True)
    optimizer.load_state_dict(of_optimizer)
    again = nn.RankSchedule(loaded, optimizer, ranks, generator=generator(7))
    again.load_state_dict(of_schedule)
    for _ in range(5 - stop):
        optimizer.zero_grad()
        other(**inputs)[0].square().sum().backward()
        optimizer.step()
        again.step()
    assert again.steps == whole.steps == 5
    assert again.errors == {k: pytest.approx(v, rel=1e-3) for k, v in whole.errors.items()}
    assert close(output(other, inputs), output(model, inputs), 1e-5)
    for one, two in zip(loaded.parameters(), adapter.parameters(), strict=True):
        assert close(one, two, 1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("steps"), r"Give what state_dict\(\)"),
        (lambda state: state.update(generator=None), "had no generator, and this has one"),
        (lambda state: state.update(steps="9"), "damaged: it has the steps '9'"),
        (lambda state: state.update(steps=float("nan")), "damaged: it has the steps nan"),
        (lambda state: state.update(steps=-1), "damaged: it has the steps -1"),
        (lambda state: state.update(steps=None), "damaged: it has the steps None"),
        (lambda state: state.update(errors=None), "the errors None"),
        (lambda state: state.update(errors={1: 0.5}), "the errors {1: 0.5}"),
        (
            lambda state: state.update(errors={1: {"encoder": "x"}}),
            "the errors {1: {'encoder': 'x'}}",
        ),
        (
            lambda state: state.update(generator=torch.zeros(3)),
            "a generator on cpu cannot take its state",
        ),
        (lambda state: state.update(generator="x"), "a generator on cpu cannot take its state"),
        (
            lambda state: state.update(generator=torch.zeros(5056, dtype=torch.uint8)),
            "a generator on cpu cannot take its state",
        ),
    ],
)
def test_another_state_is_refused_and_the_schedule_stays(change, says):
    _, _, adapter, optimizer, _ = training()
    schedule = nn.RankSchedule(adapter, optimizer, {2: 2}, generator=generator(1))
    state = {**schedule.state_dict(), "steps": 9}
    change(state)
    with pytest.raises(ValueError, match=says):
        schedule.load_state_dict(state)
    assert schedule.steps == 0


@pytest.mark.parametrize("ranks", [{1: 2}, {1: 6}], ids=["prune", "grow"])
def test_a_failed_step_takes_nothing_from_the_generator(ranks, monkeypatch):
    _, _, adapter, optimizer, step = training()
    schedule = nn.RankSchedule(adapter, optimizer, ranks, generator=generator(1))
    step()
    before = schedule.state_dict()
    with monkeypatch.context() as patched:
        patched.setattr("lortalib.nn._change_rank._plan_again", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            schedule.step()
    after = schedule.state_dict()
    assert torch.equal(before.pop("generator"), after.pop("generator"))
    assert before == after
    assert schedule.step()
