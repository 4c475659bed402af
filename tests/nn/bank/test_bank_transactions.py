"""Every change of a bank is a transaction: a fault anywhere within leaves all as before or as after."""

import itertools
import linecache
import sys
from contextlib import contextmanager

import pytest
import torch
from adapted import unchanged
from banks import constant, is_in, small_llama
from faults import Fault, frozen_garbage  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import lortalib


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
    other = lortalib.nn.bank(small_llama(), "cp", 2, alpha=2.0)
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
    bank = two_and_one_free(small_llama())
    before = state(bank)
    want = two_and_one_free(small_llama())
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
    bank, name, new = two_and_one_free(small_llama()), Name(), Name()
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
    model = small_llama()
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


def test_a_bank_that_is_removed_with_an_interrupt_leaves_no_hook():
    bank = lortalib.nn.bank(small_llama(), "cp", 2)
    with Fault() as count:
        bank.remove()
    for at in range(count.calls):
        model = small_llama()
        bank = lortalib.nn.bank(model, "cp", 2)
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        with pytest.raises(KeyboardInterrupt), Fault(KeyboardInterrupt, at):
            bank.remove()
        found = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert found == hooks or not any(found), at
        bank.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
