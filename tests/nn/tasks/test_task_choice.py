"""Adapters of several tasks: a task is chosen for a forward."""

import copy
import threading

import pytest
import torch
from adapted import close, output, put, same_bits
from dense_forward import by_deepcopy, by_pickle
from strategies import generator
from task_adapters import (
    TASKS,
    adapted,
    inputs_of,
    model_of,
    record,
)
from updates import dense_output, updates

from lortalib.nn import adapters


def test_a_fresh_adapter_changes_no_bit_and_a_removed_one_leaves_nothing():
    model, inputs = model_of(), inputs_of("encoder")
    before = output(model, inputs)
    adapter = adapted(model, init="invariant")
    with adapter.using(["a", "b", None, "c"]):
        assert same_bits(output(model, inputs), before)
    adapter.disable()
    assert same_bits(output(model, inputs), before)  # no task need be chosen
    adapter.enable()
    adapter.remove()
    assert same_bits(output(model, inputs), before)
    with pytest.raises(RuntimeError, match="was removed"), adapter.using("a"):
        pass


def test_without_a_choice_the_forward_says_what_to_do():
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model)
    for call in (
        lambda: model(**inputs),
        lambda: adapter.network(adapter.groups[0]),
        adapter.merge,
    ):
        with pytest.raises(
            ValueError, match=r"not one is chosen: stay within `with adapter.using\('a'"
        ):
            call()
    with adapter.using(["a", "b", "c", "a"]), pytest.raises(ValueError, match="not one is chosen"):
        adapter.delta(adapter.sites[0])
    adapter.default = "b"
    found = output(model, inputs)
    with adapter.using("b"):
        assert same_bits(output(model, inputs), found)
    with adapter.using("c"):
        assert not close(output(model, inputs), found, 1e-6)
        with adapter.using(["b"]):  # one row, whatever the batch
            assert same_bits(output(model, inputs), found)
    adapter.default = "c"
    assert not close(output(model, inputs), found, 1e-6)
    adapter.default = None
    with pytest.raises(ValueError, match="not one is chosen"):
        model(**inputs)
    with pytest.raises(KeyError, match="no task 'z'; its tasks are 'a', 'b', 'c'"):
        adapter.default = "z"
    with pytest.raises(KeyError, match="no task 'z'"), adapter.using(["a", "z"]):
        pass
    with adapter.using(["a", "b", "c"]), pytest.raises(ValueError, match="named 3 rows"):
        model(**inputs)
    one = adapted(model, tasks=["only"], name="one")
    adapter.disable()
    assert one.default == "only"
    assert torch.isfinite(output(model, inputs)).all()


def test_one_task_takes_inputs_without_an_axis_of_the_batch():
    model = model_of()
    adapter = adapted(model)
    site = adapter.sites[0]
    module, x = model.get_submodule(site.path), torch.randn(5, 16, generator=generator()).double()
    with torch.no_grad():
        with adapter.using("b"):
            expected = x @ (module.weight + adapter.delta(site)).mT + module.bias
            assert close(module(x), expected, 1e-10)
        with adapter.using(["a", "b"]), pytest.raises(ValueError, match="begin with the batch"):
            module(x)


def test_each_thread_has_a_choice_of_its_own():
    model, inputs = model_of(), inputs_of("encoder")
    adapter, wanted, wrong = adapted(model), {}, []
    for name in TASKS:
        with adapter.using(name):
            wanted[name] = output(model, inputs)

    def work(name):
        for _ in range(5):
            with adapter.using(name):
                if not torch.equal(output(model, inputs), wanted[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_adapters_add_up():
    model, inputs = model_of(), inputs_of("encoder")
    plain = copy.deepcopy(model)
    one, two = adapted(model), adapted(model, "cp", tasks=["x", "y"], seed=3, name="two")
    three = put(model, "cp", name="three", seed=4, dtype=torch.float64)
    with one.using(["a", "b", "c", "a"]), two.using(["y", "y", None, "x"]):
        found = output(model, inputs)
    for row, (first, second) in enumerate((("a", "y"), ("b", "y"), ("c", None), ("a", "x"))):
        added = updates(record(one, first), plain)
        others = [three] if second is None else [three, record(two, second)]
        for more in (updates(other, plain) for other in others):
            added = {name: added[name] + more[name] for name in added}
        own = {k: v[row : row + 1] for k, v in inputs.items()}
        assert close(found[row], dense_output(plain, added, own)[0].detach(), 1e-8)


@pytest.mark.parametrize("way", [by_deepcopy, by_pickle])
def test_copies_choose_for_themselves(way):
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model)
    adapter.default = "c"
    other = way(model)
    copied = adapters(other)["default"]
    assert same_bits(output(other, inputs), output(model, inputs))
    with copied.using("a"), adapter.using("b"):
        found, own = output(other, inputs), output(model, inputs)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    with copied.using("a"):
        assert same_bits(output(other, inputs), found)
    with copied.using("b"):
        assert same_bits(output(other, inputs), own)
