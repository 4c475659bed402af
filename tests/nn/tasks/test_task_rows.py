"""Adapters of several tasks: each row, or token, of a batch uses the slice of its task."""

import warnings

import pytest
import torch
from adapted import close, output, put
from banks import prompts, small_llama
from hypothesis import given, reject
from hypothesis import strategies as st
from strategies import examples, generator
from task_adapters import (
    FAMILIES,
    FORMATS,
    LINES,
    TASKS,
    adapted,
    check_rows,
    inputs_of,
    model_of,
    task_lines,
)
from updates import dense_tensor

import lortalib
from lortalib import decomp

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


@pytest.mark.parametrize("names", [["a"] * 6, ["a", "b"] * 3], ids=["one task", "two tasks"])
def test_other_tokens_than_those_named_are_refused(names):
    model, ids = model_of(), inputs_of("encoder")
    adapter = adapted(model)
    tokens = ids["input_ids"].shape[1]
    with adapter.using([names] * 4), pytest.raises(ValueError, match="4 rows of 6 tokens, but"):
        model(**ids)
    with adapter.using([(names * 6)[:tokens]] * 4):
        assert torch.isfinite(model(**ids)[0]).all()


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
