"""Threads that add, delete and read at once."""

import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from adapted import put
from banks import constant, equal_tensors, is_in, small_llama

import lortalib


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
    bank = lortalib.nn.bank(small_llama(), "cp", 2, capacity=1)

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
    bank = lortalib.nn.bank(small_llama(), "cp", 2, capacity=2)
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


@pytest.mark.parametrize("reading", ["save", "update"])
def test_own_and_shared_parameters_are_those_of_one_moment(reading, tmp_path, monkeypatch):
    """Another thread empties the bank, and gives it other shared parameters, as soon as it gets the lock."""
    model, sides = small_llama(), ("in", "out")
    sources = [put(small_llama(), seed=seed, shared=sides) for seed in range(2)]
    bank = lortalib.nn.bank(model, "cp", 2, shared=sides)
    bank["x"] = sources[0]
    gather, threads = bank._store.gather, []

    def change():
        del bank["x"]
        bank["x"] = sources[1]

    def gathered(names):
        found = gather(names)
        if not threads:
            threads.append(threading.Thread(target=change))
            threads[0].start()
            threads[0].join(0.2)
        return found

    monkeypatch.setattr(bank._store, "gather", gathered)
    other = lortalib.nn.bank(small_llama(), "cp", 2, shared=sides)
    if reading == "save":
        other.load(bank.save(tmp_path))
    else:
        other.update(bank)
    threads[0].join()
    wanted = lortalib.nn.bank(small_llama(), "cp", 2, shared=sides)
    wanted["x"] = sources[0]
    assert equal_tensors(other["x"], wanted["x"])
    assert equal_tensors(other.shared, wanted.shared)
