"""Parameter groups: each parameter once, at the rate of its legs."""

import pytest
import torch
from adapted import FORMATS, put
from models import FAMILIES

from lortalib.nn import apply, parameter_groups


def llama():
    return FAMILIES["Llama"].model(kind="ForCausalLM")


@pytest.mark.parametrize("decomposition", FORMATS)
def test_every_trained_parameter_is_in_one_group(decomposition):
    model = llama()
    adapter = put(model, decomposition, targets="all", share_residual=True, train_also=["lm_head"])
    hashed = adapter.network(adapter.groups[0]).vectors
    speeds = dict.fromkeys(hashed, 2.0) or {"in": 0.5, "out": 2.0}
    groups = parameter_groups(adapter, 1e-2, speeds=speeds)
    found = [id(p) for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    torch.optim.AdamW(groups)


def test_the_rate_is_the_product_over_the_legs():
    adapter = put(llama(), "lotr")  # in p, layer matrix p q, head out q
    speeds = {"in": 3.0, "layer": 2.0, "matrix": 5.0, "q": 0.1}
    groups = parameter_groups(adapter, 1e-2, speeds=speeds)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for group in adapter.groups:
        near, core, far = adapter.network(group).tensors
        assert [rates[id(p)] for p in (near, core, far)] == pytest.approx([3e-2, 1e-2, 1e-3])


def test_a_tied_parameter_has_the_rate_of_where_it_stands_first():
    adapter = put(llama(), "indscal", acts_on="stream")
    groups = parameter_groups(adapter, 1e-2, speeds={"in": 0.5, "out": 100.0})
    rates = {group["name"]: (group["lr"], len(group["params"])) for group in groups}
    assert rates == {"tensor x 0.5": (5e-3, 1), "tensor": (1e-2, 1)}


def test_modules_have_a_rate_and_frozen_parameters_are_left_out():
    adapter = put(llama(), "vera", train_also=["lm_head"])
    groups = parameter_groups(adapter, 1e-2, modules_lr=1e-3, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("tensor", 1e-2, 0.1), ("modules", 1e-3, 0.1),
    ]  # fmt: skip
    assert all(p.requires_grad for group in groups for p in group["params"])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"lr": 0}, "lr must be finite and above 0; found 0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": 1e-2, "modules_lr": -1}, "modules_lr must be"),
        ({"lr": 1e-2, "speeds": {"in": "fast"}}, "in must be a number; found 'fast'"),
        ({"lr": 1e-2, "weight_decay": -1}, "weight_decay must be finite and at least 0"),
        ({"lr": 1e-2, "speeds": {"inn": 2}}, "no network has the leg 'inn'; there are in, r"),
    ],
)
def test_wrong_values_are_refused(options, what):
    with pytest.raises((TypeError, ValueError), match=what):
        parameter_groups(put(llama()), **options)


def test_a_split_mode_stands_for_its_factors():
    adapter = apply(llama(), "in.1 r, in.2 r, out r, head r, layer r, matrix r", rank=2)
    groups = parameter_groups(adapter, 1.0, speeds={"in": 0.5, "in.2": 0.1})
    speeds = {id(p): group["lr"] for group in groups for p in group["params"]}
    network = adapter.network(adapter.groups[0])
    found = [speeds[id(tensor)] for tensor in network.stored]
    assert found == pytest.approx([0.5, 0.05, 1, 1, 1, 1])
