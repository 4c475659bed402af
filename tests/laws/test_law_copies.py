"""The laws of copies and casts: a copy lives on its own, and numbers go where the model goes."""

import copy
import io

import torch
from adapted import close, same_bits
from dense_forward import by_deepcopy, by_pickle
from doors import adapt, inputs_of, over
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from updates import dense_output, updates


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@over()
@given(duplicate=st.sampled_from([by_deepcopy, by_pickle, by_torch_save]))
@examples(1)
def test_a_copy_lives_on_its_own(door, decomposition, family, duplicate):
    model, inputs = adapt(door, decomposition, family), inputs_of(family)
    with torch.no_grad():
        expected = model.forward(inputs)
        twin = duplicate(model)
        assert same_bits(twin.forward(inputs), expected)
        twin.perturb(1)
        changed = twin.forward(inputs)
        assert not close(changed, expected, 1e-4)
        assert same_bits(model.forward(inputs), expected)
        model.perturb(2)
        assert not close(model.forward(inputs), expected, 1e-4)
        assert same_bits(twin.forward(inputs), changed)
        bare = twin.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
        model.perturb(0)
        assert same_bits(model.forward(inputs), expected)


#: Of tiny models whose norms amplify what is rounded; without its adapter each is off by more than 0.5.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}


def off(found, expected):
    """How far two outputs are apart; a layer norm can blow up the rounding of single positions."""
    return ((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).median()


@over()
@given(dtype=st.sampled_from(list(TOLERANCE)))
@examples(2)
def test_a_cast_model_computes_the_same_up_to_rounding(door, decomposition, family, dtype):
    model, inputs = adapt(door, decomposition, family), inputs_of(family)
    with torch.no_grad():
        expected = model.forward(inputs)
        model.model.to(dtype)
        found = model.forward(inputs)
    assert found.dtype == dtype
    assert off(found, expected) < TOLERANCE[dtype]


@over("gradients")
@given(how=st.sampled_from([torch.bfloat16, torch.float16, "autocast"]))
@examples(1)
def test_in_low_precision_factors_and_gradients_are_float32(door, decomposition, family, how):
    dtype = torch.float32 if how == "autocast" else how
    model, inputs = adapt(door, decomposition, family, dtype=dtype), inputs_of(family)
    with torch.no_grad():
        added = {
            name: update.double() for name, update in updates(model.record, model.plain).items()
        }
        expected = dense_output(copy.deepcopy(model.plain).double(), added, inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = model.forward(inputs)
        found.float().square().mean().backward()
    assert off(found.detach(), expected) < TOLERANCE[torch.bfloat16]
    factors = model.factors().values()
    assert {p.dtype for p in factors} == {torch.float32}
    trained = [p for p in factors if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
