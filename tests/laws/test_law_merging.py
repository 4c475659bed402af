"""The law of merging: merged is adapted, and unmerged is the base, bit for bit."""

import torch
from adapted import close, output, same_bits
from doors import adapt, inputs_of, over, targets_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from updates import updates

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@over("merge")
@given(data=st.data())
@examples(2)
def test_merged_is_adapted(door, decomposition, family, data):
    targets = data.draw(st.sampled_from(targets_of(door, family)))
    gqa = data.draw(st.sampled_from(["pool", "split"]))
    model = adapt(door, decomposition, family, targets=targets, gqa=gqa)
    inputs = inputs_of(family)
    with torch.no_grad():
        expected = model.forward(inputs)
        model.merge()
        assert close(model.forward(inputs), expected, 1e-8)
        model.unmerge()
        assert same_bits(model.forward(inputs), expected)


@over("merge")
@given(dtype=st.sampled_from(DTYPES))
@examples(2)
def test_merged_weights_are_rounded_once_and_unmerging_gives_every_bit_back(
    door, decomposition, family, dtype
):
    model = adapt(door, decomposition, family, dtype=dtype)
    before = {name: weight.detach().clone() for name, weight in model.weights().items()}
    with torch.no_grad():
        added = updates(model.record, model.plain)
    for seed in (1, None):
        model.merge()
        for name, weight in model.weights().items():
            if name in added:
                assert not same_bits(weight, before[name])
                exact = before[name].to(added[name].dtype) + added[name]
                step = torch.finfo(dtype).eps
                assert close(
                    weight.to(exact.dtype),
                    exact,
                    max(step, 1e-6) if dtype != torch.float64 else 1e-12,
                )
            else:
                assert same_bits(weight, before[name])
        model.unmerge()
        assert all(same_bits(weight, before[name]) for name, weight in model.weights().items())
        if seed:
            model.perturb(seed)  # a merge follows changed numbers
            added = {
                name: update.detach() for name, update in updates(model.record, model.plain).items()
            }


@over("merge")
@given(dtype=st.sampled_from(DTYPES))
@examples(1)
def test_merging_a_fresh_adapter_changes_no_bit(door, decomposition, family, dtype):
    model = adapt(door, decomposition, family, dtype=dtype, fresh=True)
    before = {name: weight.detach().clone() for name, weight in model.weights().items()}
    model.merge()
    assert all(torch.equal(weight, before[name]) for name, weight in model.weights().items())


@over()
def test_a_removed_adapter_leaves_the_base(door, decomposition, family):
    model, inputs = adapt(door, decomposition, family, dtype=torch.float32), inputs_of(family)
    expected = output(model.plain, inputs)
    with torch.no_grad():
        model.forward(inputs)
    bare = model.remove()
    assert list(bare.state_dict()) == list(model.plain.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
    assert same_bits(output(bare.requires_grad_(False), inputs), expected)
