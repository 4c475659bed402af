"""Low-rank pairs that are kept are never stale: whatever changes between two forwards is seen."""

import pytest
import torch
from adapted import close, output
from changes import SEEN, UNSEEN
from dense_forward import (
    FORMATS,
    adapted_model,
    all_close,
    body,
    by_deepcopy,
    by_pickle,
    densely,
    gradients,
    inputs_of,
    projection,
    same_as_dense,
    same_output_as_dense,
    vectors,
    weighed,
)
from hypothesis import given
from hypothesis import strategies as st
from models import words
from strategies import examples
from torch import nn

from lortalib.nn import adapters


@pytest.mark.parametrize("change", [*SEEN, *UNSEEN])
@pytest.mark.parametrize(("name", "decomposition"), [("Llama", "cp"), ("Bert", "tucker")])
def test_after_any_change_the_pairs_are_new(name, decomposition, change):
    model, adapter = adapted_model(name, decomposition)
    inputs, act = inputs_of(name), {**SEEN, **UNSEEN}[change]
    weighed(model(**inputs)[0]).backward()
    with torch.no_grad():
        before = output(model, inputs)
        act(model, adapter)
        after = model(**inputs)[0]
        assert not close(after, before, 1e-4)
        assert close(after, densely(model, inputs), 1e-7)
    weighed(model(**inputs)[0]).backward()
    act(model, adapter)
    assert same_as_dense(model, inputs)
    act(model, adapter)
    assert same_as_dense(model, inputs)


PARTS = [(name, change) for name in ("Llama", "Bert", "T5") for change in [*SEEN, *UNSEEN]]


@pytest.mark.parametrize(("name", "change"), PARTS)
def test_a_submodule_that_is_called_directly_sees_the_change(name, change):
    """Its forward is the only one before and after."""
    model, adapter = adapted_model(name)
    part, act = body(model), {**SEEN, **UNSEEN}[change]
    inputs = words() if name != "Bert" else {"hidden_states": vectors()}
    weighed(model(**inputs_of(name))[0]).backward()
    with torch.no_grad():
        before = part(**inputs)[0]
        act(model, adapter)
        after = part(**inputs)[0]
        assert not close(after, before, 1e-4)
        assert close(after, densely(model, inputs, part), 1e-7)


@pytest.mark.parametrize("change", SEEN)
def test_a_projection_that_is_called_directly_sees_the_change(change):
    model, adapter = adapted_model("Llama")
    weighed(model(**words())[0]).backward()
    for role in "qvo":
        module, dense = projection(model, adapter, role, layer=1)
        with torch.no_grad():
            before = module(vectors())
            SEEN[change](model, adapter)
            after = module(vectors())
            assert not close(after, before, 1e-4)
            assert close(after, dense(vectors()), 1e-7)


@pytest.mark.parametrize("change", UNSEEN)
def test_a_projection_that_is_called_directly_sees_what_left_no_trace(change):
    model, adapter = adapted_model("Llama")
    weighed(model(**words())[0]).backward()
    module, dense = projection(model, adapter)
    with torch.no_grad():
        module(vectors())
        UNSEEN[change](model, adapter)
        assert close(module(vectors()), dense(vectors()), 1e-7)


@pytest.mark.parametrize("change", [*SEEN, *UNSEEN])
def test_a_projection_sees_after_a_backward_what_left_no_trace(change):
    """As where it is trained by itself: optimisers need not count as changes."""
    model, adapter = adapted_model("Llama")
    module, dense = projection(model, adapter)
    for _ in range(2):
        weighed(module(vectors())).backward()
        {**SEEN, **UNSEEN}[change](model, adapter)
        expected = gradients(dense(vectors()), adapter)
        assert all_close(gradients(module(vectors()), adapter), expected)
        with torch.no_grad():
            assert close(module(vectors()), dense(vectors()), 1e-8)


def toggled(model):
    first = next(adapters(model)["default"].parameters())
    first.requires_grad_(not first.requires_grad)


def change_by(name):
    return lambda model: {**SEEN, **UNSEEN}[name](model, adapters(model)["default"])


def run(mode):
    def act(model):
        with mode():
            output(model, words())

    return act


def trained(model):
    weighed(model(**words())[0]).backward()


def merged_and_back(model):
    adapters(model)["default"].merge()
    adapters(model)["default"].unmerge()


ACTS = {
    "forward": lambda model: model(**words()),
    "forward without gradients": run(torch.no_grad),
    "forward in inference mode": run(torch.inference_mode),
    "train": lambda model: model.train(),
    "eval": lambda model: model.eval(),
    "backward": trained,
    "toggle": toggled,
    "merge": merged_and_back,
    "deepcopy": by_deepcopy,
    "pickle": by_pickle,
    **{name: change_by(name) for name in [*SEEN, *UNSEEN] if "SGD" not in name},
}


@examples(40)
@given(
    name=st.sampled_from(["Llama", "Bert", "GPT2", "Phi3"]),
    decomposition=st.sampled_from(FORMATS),
    acts=st.lists(st.sampled_from(list(ACTS)), min_size=2, max_size=8),
    outputs_only=st.booleans(),
)
def test_whatever_happens_the_pairs_are_those_of_the_factors(
    name, decomposition, acts, outputs_only
):
    """``dull`` looks at outputs without gradients only, so that no backward raises a doubt."""
    model, _ = adapted_model(name, decomposition)
    for act in acts:
        twin = ACTS[act](model)
        model = twin if isinstance(twin, nn.Module) else model
        if outputs_only:
            with torch.no_grad():
                assert same_output_as_dense(model, words())
        else:
            assert same_as_dense(model, words())
