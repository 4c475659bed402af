"""The law of the forward: outputs and gradients are those of weights that hold the dense update."""

import pytest
import torch
from adapted import close, output, same_bits
from dense_forward import MODES
from doors import adapt, base, inputs_of, over, targets_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, generator
from updates import dense_output, updates

GQA = st.sampled_from(["pool", "split"])


@over()
@given(data=st.data())
@examples(2)
def test_the_forward_is_that_of_dense_updates(door, decomposition, family, data):
    options = {
        "targets": data.draw(st.sampled_from(targets_of(door, family))),
        "gqa": data.draw(GQA),
    }
    model, inputs = adapt(door, decomposition, family, **options), inputs_of(family)
    with torch.no_grad():
        expected = dense_output(model.plain, updates(model.record, model.plain), inputs)
    assert not close(output(model.plain, inputs), expected, 1e-6)
    for mode in data.draw(st.permutations(list(MODES))):
        with MODES[mode]():
            assert close(model.forward(inputs).detach(), expected, 1e-8), mode


@over("delta")
def test_the_delta_is_the_dense_tensor_entry_by_entry(door, decomposition, family):
    model = adapt(door, decomposition, family)
    expected, found = updates(model.record, model.plain), {}
    for site in model.record.sites:
        name = f"{site.path}.{site.parameter}"
        found[name] = found.get(name, 0) + model.delta(site)
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert found[name].shape == model.plain.get_parameter(name).shape
        assert close(found[name], update, 1e-12)


@over("gradients")
@given(gqa=GQA)
@examples(1)
def test_gradients_are_those_of_dense_updates(door, decomposition, family, gqa):
    model, inputs = adapt(door, decomposition, family, gqa=gqa), inputs_of(family)
    lines = [net.legs for net in model.record.networks.values()]
    terms = [t for legs in lines for k, t in enumerate(legs.terms) if legs.holders[k] == k]
    factors = list(model.factors().values())
    assert [p.requires_grad for p in factors] == [not term.frozen for term in terms]
    trained = [p for p in factors if p.requires_grad]
    value = model.forward(inputs)
    noise = torch.randn(value.shape, generator=generator(), dtype=value.dtype)
    (value * noise).sum().backward()
    dense = dense_output(model.plain, updates(model.record, model.plain), inputs)
    expected = torch.autograd.grad((dense * noise).sum(), trained)
    for factor, gradient in zip(trained, expected):
        assert gradient.abs().max() > 0
        assert close(factor.grad / gradient.abs().max(), gradient / gradient.abs().max(), 1e-8)
    owned = {id(factor) for factor in trained}
    others = [p for p in model.model.parameters() if id(p) not in owned]
    assert all(p.grad is None for p in others)


@over("rows")
def test_each_row_of_a_batch_is_its_adapter_alone(door, decomposition, family):
    model = adapt(door, decomposition, family)
    for seed, name in enumerate(("two", "three"), 1):
        model.add(name, seed)
    inputs = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in inputs_of(family).items()}
    names = ["two", None, "three", "one"]
    with torch.no_grad():
        found = model.rows(inputs, names)
        for row, name in enumerate(names):
            added = updates(model.records[name], model.plain) if name else {}
            assert close(found[row], dense_output(model.plain, added, inputs)[row], 1e-8), name


@over()
def test_a_fresh_adapter_changes_no_bit(door, decomposition, family):
    """The start is zero, whatever the dtype of the base."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = adapt(door, decomposition, family, dtype=dtype, fresh=True)
        expected = output(model.plain, inputs_of(family))
        with torch.no_grad():
            assert same_bits(model.forward(inputs_of(family)), expected)


@over()
def test_switched_off_it_changes_no_bit(door, decomposition, family):
    model, inputs = adapt(door, decomposition, family, dtype=torch.float32), inputs_of(family)
    expected = output(model.plain, inputs)
    with torch.no_grad():
        on = model.forward(inputs)
        with model.off():
            assert same_bits(model.forward(inputs), expected)
        assert same_bits(model.forward(inputs), on)
    assert not close(on, expected, 1e-3)


@over("names")
def test_the_names_of_the_base_stay(door, decomposition, family):
    model = adapt(door, decomposition, family)
    own = [name for name in model.model.state_dict() if not name.startswith("lortalib.")]
    assert own == list(model.plain.state_dict())
    classes = {path: module.__class__.__name__ for path, module in model.plain.named_modules()}
    assert classes == {
        path: module.__class__.__name__
        for path, module in model.model.named_modules()
        if path.partition(".")[0] != "lortalib"
    }


@pytest.mark.parametrize("family", ["decoder"])
def test_the_reference_tells_one_update_from_another(family):
    """Of the base itself, and of an update whose heads are in another order."""
    model, inputs = adapt("nn.apply", "cp", family), inputs_of(family)
    with torch.no_grad():
        added = updates(model.record, model.plain)
        expected = dense_output(model.plain, added, inputs)
        rolled = {
            name: update.roll(model.record.sites[0].head_dim, 0) for name, update in added.items()
        }
        assert not close(dense_output(base(family), rolled, inputs), expected, 1e-3)
