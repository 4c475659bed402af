"""What a bank holds: added, filled, replaced, deleted and scaled; in any dtype."""

import copy
import tempfile

import pytest
import torch
from adapted import output, put
from banks import alone, constant, equal_tensors, filled, prompts, rows_of, small_llama
from torch import nn

import lortalib


def test_replacing_deleting_and_growing():
    model, inputs = small_llama(), prompts()
    bank = filled(model, number=5)
    assert len(bank) == 5 <= bank.capacity
    first = rows_of(model, bank, [0, 1], inputs)
    with bank.using([0, 1]):
        bank[0] = {name: [2 * values[0], *values[1:]] for name, values in bank[0].items()}
        torch.testing.assert_close(output(model, inputs), first)  # this context keeps its own
    changed = rows_of(model, bank, [0, 1], inputs)
    assert (changed[0] - first[0]).abs().max() > 1e-3
    torch.testing.assert_close(changed[1], first[1])
    del bank[0]
    assert 0 not in bank
    with pytest.raises(KeyError, match="no adapter 0 in the bank, which holds 4"):
        rows_of(model, bank, [0, 1], inputs)
    bank["new"] = bank[1]  # takes the free place
    found = rows_of(model, bank, ["new", 2], inputs)
    torch.testing.assert_close(found[0], first[0] * 0 + rows_of(model, bank, [1, 2], inputs)[0])


def test_filling_is_adding_one_by_one():
    model, inputs = small_llama(), prompts()
    bank = filled(model, number=3)
    again = lortalib.nn.bank(copy.deepcopy(small_llama()), "cp", 2)
    stacked = {
        name: [torch.stack(values) for values in zip(*(bank[k][name] for k in range(3)))]
        for name in bank[0]
    }
    again.fill(["a", "b", "c"], stacked)
    for k, name in enumerate("abc"):
        for group, tensors in again[name].items():
            assert all(torch.equal(one, other) for one, other in zip(tensors, bank[k][group]))
    with pytest.raises(ValueError, match="new names"):
        again.fill(["a"], {name: [t[:1] for t in ts] for name, ts in stacked.items()})
    assert len(again) == 3
    assert rows_of(model, bank, [2, 1], inputs).isfinite().all()


def test_a_saved_adapter_is_added_by_its_folder():
    model, inputs = small_llama(), prompts()
    bank = lortalib.nn.bank(model, "cp", 2)
    adapter = put(model, seed=7, alpha=0.5)
    folder = adapter.save(tempfile.mkdtemp())
    wanted = output(model, inputs)
    adapter.remove()
    bank["saved"] = folder
    torch.testing.assert_close(rows_of(model, bank, ["saved", "saved"], inputs), wanted)


def test_a_folder_is_read_by_the_rules_of_the_bank():
    class RemoteAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.qkv = nn.Linear(8, 24)
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(self.qkv(x)[..., :8])

    class Remote(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([RemoteAttention()])

        def forward(self, x):
            return self.layers[0](x)

    rules = lortalib.nn.BlockRule("RemoteAttention", fused="per_head")
    torch.manual_seed(0)
    model = Remote()
    bank = lortalib.nn.bank(model, "cp", 2, rules=rules)
    adapter = put(model, rules=rules)
    x = torch.randn(2, 3, 8)
    wanted = model(x)
    bank["saved"] = adapter.save(tempfile.mkdtemp())
    adapter.remove()
    with bank.using(["saved"]):
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize(
    ("dtype", "size", "error"), [(torch.bfloat16, 2, 0.05), (torch.float8_e4m3fn, 1, 0.3)]
)
def test_low_precision_storage_and_its_size(dtype, size, error):
    model, inputs = small_llama(), prompts()
    bank = filled(model, dtype=dtype)
    assert bank.dtype == dtype
    assert bank.nbytes == 4 * bank.count() * size
    full = alone(model, 1, inputs)[0]
    base = output(model, inputs)[0]
    found = rows_of(model, bank, [1, None], inputs)[0]
    assert (found - full).abs().max() < error * (full - base).abs().max()


def test_the_count_is_that_of_an_adapter():
    model = small_llama()
    for options in ({}, {"share_residual": True, "gqa": "split"}):
        bank = lortalib.nn.bank(model, "vera", 2, **options)
        adapter = put(model, "vera", 2, **options)
        for trainable_only in (True, False):
            assert bank.count(trainable_only) == adapter.count(trainable_only)
        adapter.remove()
        bank.remove()


@pytest.mark.parametrize("alpha", [0.5, 2.0, -3.0])
def test_alpha_is_applied_once_by_every_door(alpha):
    model, inputs = small_llama(), prompts()
    bank = lortalib.nn.bank(model, "cp", 2, capacity=1, alpha=alpha)
    assert bank.alpha == alpha
    adapter = put(model, seed=3, alpha=0.7)
    bank["adapter"] = adapter
    bank["folder"] = adapter.save(tempfile.mkdtemp())
    wanted = output(model, inputs)[0]
    adapter.remove()
    bank["mapping"] = bank["adapter"]
    bank["again"] = bank["mapping"]
    stack = {name: [t[None] for t in tensors] for name, tensors in bank["adapter"].items()}
    bank.fill(["filled"], stack)
    other = lortalib.nn.bank(small_llama(), "cp", 2, alpha=1.7)
    other.update(bank)
    bank.update({"from other": other["adapter"]})  # bare tensors: scaled by the new bank's alpha
    for name in ("adapter", "folder", "mapping", "again", "filled"):
        found = rows_of(model, bank, [name, None], inputs)[0]
        torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-4)
    assert equal_tensors(bank["again"], bank["adapter"])
    assert equal_tensors(bank["filled"], bank["adapter"])
    bank.remove()
    again = lortalib.nn.bank(model, "cp", 2, alpha=3.1)
    again.update(other)
    for name in other:
        found = rows_of(model, again, [name, None], inputs)[0]
        torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_bare_tensors_are_those_before_the_scaling(alpha):
    model, inputs = small_llama(), prompts()
    bank = lortalib.nn.bank(model, "cp", 2, alpha=alpha)
    adapter = put(model, seed=3, alpha=alpha)
    bare = {
        group.name: [t.detach() for t in adapter.network(group).tensors] for group in adapter.groups
    }
    wanted = output(model, inputs)[0]
    bank["x"] = adapter
    adapter.remove()
    bank["bare"] = bare
    bank.fill(["filled"], {name: [t[None] for t in tensors] for name, tensors in bare.items()})
    for name in ("x", "bare", "filled"):
        assert equal_tensors(bank[name], bare)
        found = rows_of(model, bank, [name, None], inputs)[0]
        torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-4)


def test_places_that_are_free_are_taken_before_the_bank_grows():
    bank = lortalib.nn.bank(small_llama(), "cp", 2, capacity=4)
    for k in range(30):
        bank.update({"a": constant(bank, k), "b": constant(bank, -k)})
        bank.fill(["c"], constant(bank, k, 1))
        del bank["c"]
    assert bank.capacity == 4
    assert equal_tensors(bank["a"], constant(bank, 29))
    assert equal_tensors(bank["b"], constant(bank, -29))
    for name in bank:
        del bank[name]
    assert len(bank) == 0


def test_a_bank_stands_in_memory_where_the_model_has_no_values_yet():
    with torch.device("meta"):
        model = small_llama()
    bank = lortalib.nn.bank(model, "cp", 2)
    bank["x"] = constant(bank, 1)
    assert {t.device.type for ts in bank["x"].values() for t in ts} == {"cpu"}


@pytest.mark.parametrize("decomposition", ["cp", "indscal", "uni_lora"])
def test_an_adapter_with_another_scaling_comes_out_as_it_went_in(decomposition):
    model, inputs = small_llama(), prompts()
    bank = lortalib.nn.bank(model, decomposition, 2, alpha=2.0)
    adapter = put(model, decomposition, 2, seed=1, alpha=0.5)
    wanted = output(model, inputs)
    bank["x"] = adapter
    adapter.remove()
    torch.testing.assert_close(
        rows_of(model, bank, ["x", "x"], inputs), wanted, atol=3e-5, rtol=1e-4
    )
    again = lortalib.nn.bank(model, decomposition, 2)
    again["x"] = bank.adapter("x")
    torch.testing.assert_close(
        rows_of(model, again, ["x", "x"], inputs), wanted, atol=3e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("decomposition", "options"),
    [("indscal", {}), ("cp", {"targets": "all", "share_residual": True})],
    ids=["tied", "in several networks"],
)
def test_a_parameter_at_several_places_is_kept_once(decomposition, options):
    bank = lortalib.nn.bank(small_llama(), decomposition, 2, **options)
    bank["ann"] = lortalib.nn.apply(small_llama(), decomposition, 2, init="normal", **options)
    kept = sum(t[0].numel() for t in bank._store._stacks.values())
    assert kept == bank.count() == bank.nbytes / 4
    assert kept < sum(t.numel() for tensors in bank["ann"].values() for t in tensors)


def test_tied_parameters_have_one_tensor():
    bank = lortalib.nn.bank(small_llama(), "indscal", 2)
    different = {n: [torch.randn(t.shape) for t in ts] for n, ts in bank[None].items()}
    with pytest.raises(ValueError, match="that are tied have one tensor; found different ones"):
        bank["x"] = different
    negative = lortalib.nn.bank(small_llama(), "uni_lora", 2, alpha=-1.0)
    with pytest.raises(ValueError, match="none can take a negative scaling"):
        negative["x"] = put(small_llama(), "uni_lora", 2)
