"""Copies of a model between two forwards."""

import pytest
import torch
from adapted import close, output
from dense_forward import MODES, adapted_model, by_deepcopy, by_pickle, loss_of, same_as_dense
from models import words

from lortalib.nn import adapters


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle])
def test_a_copy_between_forwards_trains_by_itself(duplicate, mode):
    model, adapter = adapted_model("Bert", targets="all", share_residual=True)
    with MODES[mode]():
        before = model(**words())[0].detach()
    twin = duplicate(model)
    own = adapters(twin)["default"]
    assert close(output(twin, words()), before, 1e-12)
    loss_of(twin, 1).backward()
    assert all(factor.grad is None for factor in adapter.parameters())
    torch.optim.SGD(own.parameters(), lr=0.1).step()
    assert close(output(model, words()), before, 1e-12)
    assert not close(output(twin, words()), before, 1e-4)
    own.zero_grad()
    assert same_as_dense(twin, words())
    assert same_as_dense(model, words())
