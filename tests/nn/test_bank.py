"""A bank: every row of a batch with an adapter of its own is that adapter alone on the model."""

import copy
import io
import itertools
import linecache
import pickle
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import torch
from harness import changes, each_format, output, picture, put, unchanged
from models import FAMILIES, Stored
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, LongformerConfig, LongformerModel

import lortalib
from lortalib.nn import adapters

EASY = ("Llama", "Bert", "Conv1D", "T5", "ViT", "Qwen3")
FAMILY = {name: FAMILIES[name] for name in EASY}


def filled(model, decomposition="cp", rank=2, number=4, **options):
    """A bank with so many random adapters, and the model's output with each alone."""
    bank = lortalib.nn.bank(model, decomposition, rank, capacity=2, **options)
    for seed in range(number):
        adapter = put(model, decomposition, rank, seed=seed, alpha=0.5)
        bank[seed] = adapter
        adapter.remove()
    return bank


def alone(model, seed, inputs, decomposition="cp", rank=2):
    """The output with one of these adapters on the model, or none."""
    if seed is None:
        return output(model, inputs)
    adapter = put(model, decomposition, rank, seed=seed, alpha=0.5)
    found = output(model, inputs)
    adapter.remove()
    return found


def rows_of(model, bank, names, inputs):
    with bank.using(names):
        return output(model, inputs)


@pytest.mark.parametrize("family", sorted(FAMILY))
@each_format
def test_every_row_is_its_adapter_alone(family, decomposition):
    model, inputs = FAMILY[family].model().eval(), FAMILY[family].inputs()
    bank = filled(model, decomposition)
    number = len(next(iter(inputs.values())))
    for names in ([3, None, 1], [2, 2, 0], [None, 0, 3]):
        names = (names * number)[:number]
        found = rows_of(model, bank, names, inputs)
        for row, name in enumerate(names):
            wanted = alone(model, name, inputs, decomposition)[row]
            torch.testing.assert_close(found[row], wanted, atol=3e-5, rtol=1e-4)
    assert not adapters(model)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(rows=2, length=5):
    draw = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, 60, (rows, length), generator=draw)}


def test_outside_a_context_and_after_removal_the_model_is_its_own():
    model, inputs = llama(), prompts()
    before, look = output(model, inputs), picture(model)
    bank = filled(model)
    assert torch.equal(output(model, inputs), before)
    assert torch.equal(rows_of(model, bank, [None, None], inputs), before)
    bank.remove()
    assert changes(look, picture(model)) == []


def test_generation_with_beams_padding_and_several_sequences():
    model = llama()
    bank = filled(model)
    ids = prompts(3, 6)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for options in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {}):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
        with bank.using([1, None, 3]):
            found = model.generate(ids, attention_mask=mask, **options)
        copies = options.get("num_return_sequences", 1)
        for row, seed in enumerate((1, None, 3)):
            adapter = None if seed is None else put(model, seed=seed, alpha=0.5)
            one = slice(row, row + 1)
            wanted = model.generate(ids[one], attention_mask=mask[one], **options)
            if adapter is not None:
                adapter.remove()
            own = found[row * copies : (row + 1) * copies, : wanted.shape[1]]
            assert torch.equal(own, wanted)


def test_replacing_deleting_and_growing():
    model, inputs = llama(), prompts()
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
    model, inputs = llama(), prompts()
    bank = filled(model, number=3)
    again = lortalib.nn.bank(copy.deepcopy(llama()), "cp", 2)
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
    model, inputs = llama(), prompts()
    bank = lortalib.nn.bank(model, "cp", 2)
    adapter = put(model, seed=7, alpha=0.5)
    folder = adapter.save(tempfile.mkdtemp())
    wanted = output(model, inputs)
    adapter.remove()
    bank["saved"] = folder
    torch.testing.assert_close(rows_of(model, bank, ["saved", "saved"], inputs), wanted)


@pytest.mark.parametrize(
    ("dtype", "size", "error"), [(torch.bfloat16, 2, 0.05), (torch.float8_e4m3fn, 1, 0.3)]
)
def test_low_precision_storage_and_its_size(dtype, size, error):
    model, inputs = llama(), prompts()
    bank = filled(model, dtype=dtype)
    assert bank.dtype == dtype
    assert bank.nbytes == 4 * bank.count() * size
    full = alone(model, 1, inputs)[0]
    base = output(model, inputs)[0]
    found = rows_of(model, bank, [1, None], inputs)[0]
    assert (found - full).abs().max() < error * (full - base).abs().max()


def test_a_model_of_low_precision_gets_pairs_of_full_precision():
    model, inputs = llama().bfloat16(), prompts()
    bank = filled(model)
    wanted = put(model, seed=1, alpha=0.5)
    site = wanted.sites[0]
    cut = wanted.low_rank_pair(site)
    wanted.remove()
    seen = []
    down, add_up = (getattr(lortalib.nn._forward.lowrank, name) for name in ("down", "add_up"))

    def watched_down(x, a, p):
        seen.append(a)
        return down(x, a, p)

    def watched_add_up(y, h, b, may_write):
        seen.append(b)
        return add_up(y, h, b, may_write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lortalib.nn._forward.scope.down", watched_down)
        patch.setattr("lortalib.nn._forward.update.add_up", watched_add_up)
        rows_of(model, bank, [1, None], inputs)
    assert torch.equal(seen[0][0], (cut.A * 0.5).bfloat16())
    assert torch.equal(seen[1][0], cut.B.mT.bfloat16())  # not a product of rounded factors
    assert len(seen) == 2 * (2 + 4)  # in each layer x is read once for q, k and v


def test_the_count_is_that_of_an_adapter():
    model = llama()
    for options in ({}, {"share_residual": True, "gqa": "split"}):
        bank = lortalib.nn.bank(model, "vera", 2, **options)
        adapter = put(model, "vera", 2, **options)
        for trainable_only in (True, False):
            assert bank.count(trainable_only) == adapter.count(trainable_only)
        adapter.remove()
        bank.remove()


def test_an_adapter_on_the_model_adds_to_the_rows():
    model, inputs = llama(), prompts()
    bank = filled(model)
    both = put(model, seed=9, alpha=0.5, name="both")
    found = rows_of(model, bank, [None, 1], inputs)
    torch.testing.assert_close(found[0], output(model, inputs)[0])
    other = put(model, seed=1, alpha=0.5, name="one")
    torch.testing.assert_close(found[1], output(model, inputs)[1], atol=3e-5, rtol=1e-4)
    both.remove()
    other.remove()


def test_each_thread_has_a_choice_of_its_own():
    model, inputs = llama(), prompts()
    bank = filled(model)
    wanted = {k: rows_of(model, bank, [k, k], inputs) for k in range(4)}
    wrong = []

    def work(k):
        for _ in range(10):
            if not torch.allclose(rows_of(model, bank, [k, k], inputs), wanted[k], atol=1e-5):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_pass_through_the_rows():
    model, inputs = llama(), prompts()
    bank = filled(model)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    with bank.using([1, None]):
        model(inputs_embeds=embedded)[0].square().sum().backward()
    adapter = put(model, seed=1, alpha=0.5)
    wanted = embedded.detach().clone().requires_grad_()
    model(inputs_embeds=wanted)[0][0].square().sum().backward()
    torch.testing.assert_close(embedded.grad[0], wanted.grad[0], atol=1e-4, rtol=1e-4)
    adapter.remove()


def test_a_batch_that_the_rows_do_not_divide_is_refused():
    model = llama()
    bank = filled(model)
    with pytest.raises(
        ValueError, match="named 3 rows, but the model was called with a batch of 2"
    ):
        rows_of(model, bank, [0, 1, 2], prompts(2))
    with pytest.raises(ValueError, match="needs a name"):
        rows_of(model, bank, [], prompts(2))


def test_what_does_not_fit_is_refused_and_nothing_changes():
    model = llama()
    bank = filled(model)
    before = {k: bank[k] for k in bank}
    other = put(llama(), rank=3)
    lotr = put(llama(), "lotr", 2)
    some = put(llama(), targets="q")
    beside = put(llama(), train_also=["lm_head"])
    nan = {name: [t * float("nan") for t in ts] for name, ts in bank[0].items()}
    for source, why in (
        (other, "tensors of the shapes"),
        (lotr, "has the legs"),
        (some, "other projections"),
        (beside, "trains whole modules"),
        (nan, "NaN or infinity"),
        ({}, "does not fit"),
    ):
        with pytest.raises(ValueError, match=why):
            bank.update({0: bank[1], "x": source})
    with pytest.raises(ValueError, match="None stands for rows"):
        bank.add(None, bank[0])
    for k, groups in before.items():
        assert all(torch.equal(a, b) for g in groups for a, b in zip(groups[g], bank[k][g]))
    assert "x" not in bank


def test_a_copy_of_the_model_has_a_bank_of_its_own():
    model, inputs = llama(), prompts()
    bank = filled(model)
    wanted = rows_of(model, bank, [1, None], inputs)
    other, own = copy.deepcopy((model, bank))
    torch.testing.assert_close(rows_of(other, own, [1, None], inputs), wanted)
    own.remove()
    torch.testing.assert_close(rows_of(model, bank, [1, None], inputs), wanted)
    assert not torch.allclose(output(other, inputs), wanted)


def test_attention_with_time_before_batch_is_refused():
    config = LongformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        attention_window=[4], vocab_size=30,
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not see the batch as rows"):
        lortalib.nn.bank(LongformerModel(config))


def test_wrong_arguments_are_refused():
    for options in ({"capacity": 0}, {"alpha": 0.0}, {"capacity": 1.5}, {"alpha": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            lortalib.nn.bank(llama(), "cp", 2, **options)


# The scaling


def equal_tensors(one, other):
    return all(torch.equal(a, b) for group in one for a, b in zip(one[group], other[group]))


@pytest.mark.parametrize("alpha", [0.5, 2.0, -3.0])
def test_alpha_is_applied_once_by_every_door(alpha):
    model, inputs = llama(), prompts()
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
    other = lortalib.nn.bank(llama(), "cp", 2, alpha=1.7)
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
    model, inputs = llama(), prompts()
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


# What cannot be stored


def test_values_that_the_dtype_cannot_hold_are_refused():
    for dtype, value in (
        (torch.float16, 7e4),
        (torch.float8_e4m3fn, 500.0),  # a cast would clip it
        (torch.float32, float("inf")),
        (torch.float64, float("-inf")),
        (torch.bfloat16, float("nan")),
    ):
        bank = lortalib.nn.bank(llama(), "cp", 2, dtype=dtype)
        good = {name: [torch.ones_like(t).float() for t in ts] for name, ts in bank[None].items()}
        bad = copy.deepcopy(good)
        bad["layers"][1].view(-1)[2] = value
        stack = {name: [torch.stack(each) for each in zip(good[name], bad[name])] for name in good}
        for call in (
            lambda: bank.add("bad", bad),  # noqa: B023
            lambda: bank.update({"good": good, "bad": bad}),  # noqa: B023
            lambda: bank.fill(["good", "bad"], stack),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="adapter 'bad' holds NaN or infinity in group"):
                call()
        assert len(bank) == 0
        bank["good"] = good


def test_tensors_that_are_missing_or_are_none_are_refused():
    bank = lortalib.nn.bank(llama(), "cp", 2)
    good = bank[None]
    for tensors, why in (
        ({"layers": []}, "found none"),
        ({"layers": good["layers"][:-1]}, "has tensors of the shapes"),
        ({**good, "other": good["layers"]}, "found 'other'"),
        ({"layers": [t.to("meta") for t in good["layers"]]}, "on meta"),
        ({"layers": [t.cfloat() for t in good["layers"]]}, "complex64"),
        ({"layers": [t.numpy() for t in good["layers"]]}, "found ndarray"),
    ):
        with pytest.raises(ValueError, match=why):
            bank["x"] = tensors
        stack = {name: [t[None] for t in ts] for name, ts in tensors.items()}
        with pytest.raises(ValueError, match=why):
            bank.fill(["x"], stack)
    with pytest.raises(TypeError, match="found int"):
        bank["x"] = 3
    assert len(bank) == 0


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


def test_names_are_new_for_fill():
    bank = lortalib.nn.bank(llama(), "cp", 2)
    bank["old"] = bank[None]
    two = {name: [t.expand(2, *t.shape) for t in ts] for name, ts in bank[None].items()}
    for names, why in (
        (["new", "new"], "'new' is there twice"),
        (["new", "old"], "'old' is in the bank already"),
        (["new", None], "None stands for rows"),
    ):
        with pytest.raises(ValueError, match=why):
            bank.fill(names, two)
    assert list(bank) == ["old"]
    bank.fill([], {name: [t[:0] for t in ts] for name, ts in two.items()})
    bank.update({})
    assert list(bank) == ["old"]


def test_another_gqa_is_another_shape():
    model = llama()
    pooled, split = (put(llama(), "lora", 2, targets="kv", gqa=gqa) for gqa in ("pool", "split"))
    bank = lortalib.nn.bank(model, "lora", 2, targets="kv")
    bank["pooled"] = pooled
    with pytest.raises(ValueError, match="does not fit the bank"):
        bank["split"] = split
    with pytest.raises(ValueError, match="the other bank does not fit"):
        lortalib.nn.bank(llama(), "lora", 2, targets="kv", gqa="split").update(bank)


# Transactions


def state(bank):
    tensors = {name: bank[name] for name in (None, *bank)}
    return bank.capacity, {
        name: [t for ts in tensors[name].values() for t in ts] for name in tensors
    }


def same_state(one, other):
    return (
        one[0] == other[0]
        and list(one[1]) == list(other[1])
        and all(torch.equal(a, b) for n in one[1] for a, b in zip(one[1][n], other[1][n]))
    )


def constant(bank, value, *lead):
    return {
        name: [torch.full((*lead, *t.shape), float(value)) for t in ts]
        for name, ts in bank[None].items()
    }


def is_in(frame, *folders):
    path = frame.f_code.co_filename.replace("\\", "/")
    return any(folder in path for folder in folders)


@contextmanager
def tracing(trace):
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupted(at):
    """KeyboardInterrupt before the at-th line of the bank's code; not on the way out of a context, where
    Python itself looks for no signal."""
    left = [at]

    def trace(frame, event, _):
        if not is_in(frame, "nn/_bank"):
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not text.startswith(("with ", "try:", "except ", "raise")):
            left[0] -= 1
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    return tracing(trace)


def interrupted_call(at):
    """KeyboardInterrupt at the at-th call of a function of the bank or of what puts hooks on modules."""
    left = [at]

    def trace(frame, event, _):
        if event == "call" and is_in(frame, "nn/_bank", "nn/modules", "utils/hooks"):
            left[0] -= 1
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt

    return tracing(trace)


class FailingAt(TorchDispatchMode):
    """MemoryError in the at-th operation of torch."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise MemoryError
        return func(*args, **(kwargs or {}))


def two_and_one_free(model):
    """A full bank of the adapters 1 and 2, one of whose places is free."""
    bank = lortalib.nn.bank(model, "cp", 2, capacity=3)
    bank.update({k: constant(bank, k) for k in (0, 1, 2)})
    del bank[0]
    return bank


def more(bank):
    other = lortalib.nn.bank(llama(), "cp", 2, alpha=2.0)
    other.update({k: constant(other, k) for k in (2, 7, 8)})
    return other


#: What changes a bank, with a function that makes what it is given.
CHANGES = {
    "add": (lambda bank: constant(bank, 9), lambda bank, given: bank.add("new", given)),
    "replace": (lambda bank: constant(bank, 9), lambda bank, given: bank.add(1, given)),
    "update": (
        lambda bank: {k: constant(bank, 9 + k) for k in (2, 3, 4, 1)},
        lambda bank, given: bank.update(given),
    ),
    "fill": (
        lambda bank: constant(bank, 9, 6),
        lambda bank, given: bank.fill(range(3, 9), given),
    ),
    "delete": (lambda bank: 2, lambda bank, given: bank.__delitem__(given)),
    "update from a bank": (more, lambda bank, given: bank.update(given)),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("failure", [interrupted, FailingAt])
def test_a_change_that_fails_anywhere_changes_nothing(change, failure):
    bank = two_and_one_free(llama())
    before = state(bank)
    want = two_and_one_free(llama())
    make, call = CHANGES[change]
    given = make(want)
    call(want, given)
    after = state(want)
    for at in itertools.count():
        try:
            with failure(at):
                call(bank, given)
            break
        except (KeyboardInterrupt, MemoryError):
            now = state(bank)
            if same_state(now, after):  # the interrupt came behind the change
                break
            assert same_state(now, before), at
    assert same_state(state(bank), after)
    assert at > 2 or change == "delete"
    bank.update({50 + k: constant(bank, 50 + k) for k in range(8)})  # no place is given twice
    now = state(bank)[1]
    assert same_state((0, after[1]), (0, {name: now[name] for name in after[1]}))
    assert all(torch.equal(t, torch.full_like(t, 50 + k)) for k in range(8) for t in now[50 + k])


class Name:
    """A name that raises when it is hashed for the at-th time."""

    def __init__(self):
        self.left = float("inf")

    def __hash__(self):
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return 5


def test_a_name_that_raises_changes_nothing():
    bank, name, new = two_and_one_free(llama()), Name(), Name()
    stack = constant(bank, 9, 3)
    tensors = {group: [t[0] for t in ts] for group, ts in stack.items()}

    def raising_everywhere(culprit, call):
        before = state(bank)
        for at in itertools.count():
            culprit.left = at
            try:
                call()
                assert at > 2
                break
            except KeyboardInterrupt:
                assert same_state(state(bank), before), at
            finally:
                culprit.left = float("inf")

    bank[name] = tensors  # the bank is full
    raising_everywhere(name, lambda: bank.add(name, tensors))
    raising_everywhere(new, lambda: bank.update({1: tensors, new: tensors}))
    raising_everywhere(new, lambda: bank.__delitem__(new))
    raising_everywhere(new, lambda: bank.fill([8, new, 9], stack))
    assert bank.capacity == 7  # no place was lost


def test_a_bank_that_cannot_be_made_leaves_nothing_on_the_model():
    model = llama()
    with unchanged(model):
        for at in itertools.count():
            try:
                with interrupted_call(at):
                    bank = lortalib.nn.bank(model, "cp", 2)
                bank.remove()
                break
            except KeyboardInterrupt:
                found = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
                assert found == [], at
        with pytest.raises(MemoryError), FailingAt(0):
            lortalib.nn.bank(model, "cp", 2)
        with pytest.raises(ValueError, match="dtype must be one of"):
            lortalib.nn.bank(model, "cp", 2, dtype=torch.int64)
        with pytest.raises(ValueError, match="device must be one that holds values"):
            lortalib.nn.bank(model, "cp", 2, device="meta")


def test_a_bank_stands_in_memory_where_the_model_has_no_values_yet():
    with torch.device("meta"):
        model = llama()
    bank = lortalib.nn.bank(model, "cp", 2)
    bank["x"] = constant(bank, 1)
    assert {t.device.type for ts in bank["x"].values() for t in ts} == {"cpu"}


def test_places_that_are_free_are_taken_before_the_bank_grows():
    bank = lortalib.nn.bank(llama(), "cp", 2, capacity=4)
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


# Threads


@contextmanager
def switching():
    """Threads take turns in the bank's code line by line."""

    def trace(frame, event, _):
        if not is_in(frame, "nn/_bank"):
            return None
        time.sleep(0)
        return trace

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threading.settrace(trace)
    try:
        yield
    finally:
        threading.settrace(None)
        sys.setswitchinterval(interval)


def together(*works):
    """Run these at once; what they raised."""
    errors = []

    def run(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    with switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return errors


def test_threads_that_add_get_places_of_their_own():
    bank = lortalib.nn.bank(llama(), "cp", 2, capacity=1)

    def worker(k):
        def work():
            for j in range(8):
                bank[k, j] = constant(bank, 100 * k + j)
                if j % 3 == 1:
                    del bank[k, j]
                if j % 3 == 2:
                    bank.fill([(k, j, "a"), (k, j, "b")], constant(bank, 100 * k + j, 2))
                    bank[k, 0] = constant(bank, 100 * k)

        return work

    assert together(*(worker(k) for k in range(6))) == []
    assert len(bank) == 6 * (5 + 2 * 2)
    for name in bank:
        wanted = constant(bank, 100 * name[0] + name[1])
        assert equal_tensors(bank[name], wanted), name


def test_what_is_gathered_is_one_adapter_and_not_two():
    bank = lortalib.nn.bank(llama(), "cp", 2, capacity=2)
    bank["x"] = constant(bank, 0)
    mixed = []

    def write():
        for k in range(1, 30):
            bank["x"] = constant(bank, k)
            del bank["x"]
            bank.update({"y": constant(bank, -k), "x": constant(bank, k)})

    def read():
        for _ in range(40):
            with suppress(KeyError):
                values = {float(v) for ts in bank["x"].values() for t in ts for v in t.unique()}
                if len(values) > 1:
                    mixed.append(values)

    assert together(write, read, read) == []
    assert not mixed


# Modes of autograd


def test_a_bank_made_and_grown_in_inference_mode_works_outside():
    model, inputs = llama(), prompts()
    adapter = put(model, seed=1, alpha=0.5)
    wanted = output(model, inputs)
    adapter.disable()
    with torch.inference_mode():
        bank = lortalib.nn.bank(model, "cp", 2, capacity=1)
        bank[0] = adapter
        bank[1] = bank[2] = bank[0]  # grows
        assert not any(t.is_inference() for ts in bank[1].values() for t in ts)
    bank[1] = bank[0]
    bank.fill(["f"], {name: [t[None] for t in ts] for name, ts in bank[0].items()})
    bank.update(dict.fromkeys(range(10), adapter))
    del bank[0]
    bank[0] = adapter
    for name in (0, 1, "f"):
        torch.testing.assert_close(
            rows_of(model, bank, [name, name], inputs), wanted, atol=3e-5, rtol=1e-4
        )


def test_one_context_serves_forwards_in_any_mode():
    model, inputs = llama(), prompts()
    bank = filled(model)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    with torch.inference_mode():
        context = bank.using([1, None])
        context.__enter__()
        wanted = model(**inputs)[0]
    found = model(inputs_embeds=embedded)[0]
    context.__exit__(None, None, None)
    found.square().sum().backward()
    assert embedded.grad.abs().max() > 0
    torch.testing.assert_close(found.detach(), wanted.clone())


def test_transforms_and_traces_leave_nothing_in_a_context():
    model, inputs = llama(), prompts()
    bank = filled(model)
    wanted = rows_of(model, bank, [1, None], inputs)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()

    def loss(embedded):
        return model(inputs_embeds=embedded)[0].square().sum()

    with bank.using([1, None]):
        found = torch.func.grad(loss)(embedded)
        loss(embedded.requires_grad_()).backward()
        torch.testing.assert_close(found, embedded.grad)
    with bank.using([1, None]):
        with FakeTensorMode(allow_non_fake_inputs=True):
            output(model, inputs)
        torch.testing.assert_close(output(model, inputs), wanted)


# How many rows a forward has


class Masked(nn.Module):
    """A model whose arguments have names of their own, the batch among the last."""

    def __init__(self):
        super().__init__()
        self.inner = Stored()

    def forward(self, mask, places=None, *, states=None, **rest):
        return self.inner(next(x for x in (states, *rest.values()) if x is not None))


class Ordered(nn.Module):
    """A model whose first argument has the batch."""

    def __init__(self):
        super().__init__()
        self.inner = Stored()

    def forward(self, states, table=None):
        return self.inner(states)


def test_the_batch_is_told_whatever_the_order_of_the_arguments():
    model, inputs = llama(), prompts()
    bank = filled(model)
    ids = inputs["input_ids"]
    wanted = rows_of(model, bank, [1, 2], inputs)
    places = torch.arange(ids.shape[1])[None]
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    for given in (
        {"position_ids": places, "input_ids": ids},
        {"attention_mask": mask, "input_ids": ids},
        {"position_ids": places, "inputs_embeds": model.get_input_embeddings()(ids)},
    ):
        torch.testing.assert_close(rows_of(model, bank, [1, 2], given), wanted)
    with pytest.raises(ValueError, match=r"named 3 rows, but .* a batch of 2"):
        rows_of(model, bank, [1, 2, 3], {"labels": ids.expand(2, 5), "input_ids": ids})


def test_the_batch_of_arguments_of_unknown_names():
    model = Masked().eval()
    bank = filled(model)
    x = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(1))
    wanted = rows_of(model, bank, [1, 2], {"mask": x[:1, :1], "states": x})
    for given in (
        {"states": x, "mask": x[:1, None]},
        {"mask": x[:1, :, 0], "places": x[:3, 0], "extra": x},
    ):
        torch.testing.assert_close(rows_of(model, bank, [1, 2], given), wanted)
    with bank.using([1, 2, 3]), pytest.raises(ValueError, match=r"named 3 rows, but .* batch of 4"):
        model(x, states=x)
    with torch.no_grad(), bank.using([1, 2]):
        torch.testing.assert_close(model(x[:1], x[:3, 0], states=x)[0], wanted)
        # A name of transformers tells more than the order.
        torch.testing.assert_close(model(x[:, 0], inputs_embeds=x[1:3])[0], wanted[1:3])
    model = Ordered().eval()
    bank = filled(model)
    with torch.no_grad(), bank.using([1, 2]):
        wanted = model(x[:2])[0]
        torch.testing.assert_close(model(table=x, states=x[:2])[0], wanted)
        torch.testing.assert_close(model(x[:2], x)[0], wanted)
    with bank.using([1, 2, 3]), pytest.raises(ValueError, match=r"named 3 rows, but .* batch of 4"):
        model(x)


def test_the_batch_belongs_to_one_forward():
    model, inputs = llama(), prompts()
    bank = filled(model)
    twice = {"input_ids": inputs["input_ids"].repeat_interleave(2, 0)}
    with torch.no_grad():
        with bank.using([1, 2]):
            wanted = model.model(**inputs)[0]
        with bank.using([1, 2]):
            model(**twice)
            torch.testing.assert_close(model.model(**inputs)[0], wanted)
            with pytest.raises(ValueError, match="a batch of 3"):
                model(input_ids=twice["input_ids"][:3])
            torch.testing.assert_close(model.model(**inputs)[0], wanted)


def test_an_encoder_is_called_by_itself_behind_a_generation_with_beams():
    model, inputs = FAMILIES["T5"].model("ForConditionalGeneration"), FAMILIES["T5"].inputs()
    bank = filled(model)
    ids = inputs["input_ids"]
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options["decoder_start_token_id"] = 0
    with bank.using([1, None]):
        first, second = (model.generate(ids, **options) for _ in range(2))
    assert torch.equal(first, second)


# Names of legs, copies, the end


def test_a_line_may_have_a_bond_of_the_name_of_the_banks_own_mode():
    line = "in adapter, out adapter, head adapter, layer adapter, matrix adapter"
    model, inputs = llama(), prompts()
    bank = filled(model, line)
    found = rows_of(model, bank, [1, None], inputs)
    torch.testing.assert_close(found[0], alone(model, 1, inputs, line)[0], atol=3e-5, rtol=1e-4)


def test_a_pickled_model_and_its_bank_belong_together():
    model, inputs = llama(), prompts()
    bank = filled(model)
    wanted = rows_of(model, bank, [1, None], inputs)
    for copied in (
        lambda: pickle.loads(pickle.dumps((model, bank))),
        lambda: pickle.loads(pickle.dumps((bank, model)))[::-1],
        lambda: copy.deepcopy((bank, model))[::-1],
    ):
        other, own = copied()
        before = output(other, inputs)
        torch.testing.assert_close(rows_of(other, own, [1, None], inputs), wanted)
        own["new"] = own[1]
        assert "new" not in bank
        torch.testing.assert_close(rows_of(other, own, ["new", None], inputs), wanted)
        own.remove()
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in other.modules())
        torch.testing.assert_close(output(other, inputs), before)


def test_a_copy_of_the_model_alone_does_not_carry_the_adapters():
    model, inputs = llama(), prompts()
    bare = len(pickle.dumps(model))
    bank = lortalib.nn.bank(model, "cp", 2, capacity=10_000)
    bank.fill(range(10_000), constant(bank, 1, 10_000))
    stream = io.BytesIO()
    torch.save(model, stream)
    assert len(pickle.dumps(model)) < bare + bank.nbytes / 10
    assert stream.tell() < bare + bank.nbytes / 10
    with bank.using([1, 2]):
        torch.testing.assert_close(
            output(copy.deepcopy(model), inputs), output(llama(), inputs), atol=0, rtol=0
        )


def test_a_removed_bank_says_so():
    model = llama()
    bank = filled(model)
    bank.remove()
    with unchanged(model):
        bank.remove()  # may be called again
        with pytest.raises(RuntimeError, match="removed from its model"), bank.using([1]):
            pass
        assert bank[1]


def test_one_text_is_not_taken_for_its_letters():
    bank = filled(llama())
    with pytest.raises(TypeError, match="found the text 'ann'"), bank.using("ann"):
        pass
