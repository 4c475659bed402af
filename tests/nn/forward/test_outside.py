"""Forwards within others' means: threads, given parameters, torch.func, compilers; and what is left."""

import copy
import gc
import sys
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from adapted import close, output, put, unchanged
from dense_forward import (
    MODELS,
    adapted_model,
    all_close,
    batch,
    densely,
    gradients,
    inputs_of,
    projection,
    same_as_dense,
    same_output_as_dense,
    vectors,
    weighed,
)
from models import words
from strategies import generator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

import lortalib


def loss_on(model, inputs):
    return model(**inputs)[0].float().square().mean()


def gradients_on(model, inputs):
    model.zero_grad()
    loss_on(model, inputs).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.fixture
def hasty():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_do_not_disturb_each_other(hasty):
    model, _ = adapted_model("Llama")
    factors = [p for p in model.parameters() if p.requires_grad]
    wrong, ready = [], threading.Barrier(3)
    expected = {}
    for seed in range(3):
        value = densely(model, batch(seed))
        expected[seed] = [value.detach(), *torch.autograd.grad(weighed(value), factors)]

    def work(seed, mode):
        try:
            ready.wait()
            for _ in range(8):
                with mode():
                    value = model(**batch(seed))[0]
                found = [value.detach()]
                if value.requires_grad:
                    found += torch.autograd.grad(weighed(value), factors)
                if not all_close(found, expected[seed][: len(found)]):
                    wrong.append(seed)
        except BaseException as error:
            wrong.append(error)

    jobs = [(0, nullcontext), (1, torch.no_grad), (2, nullcontext)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def replaced(model, factor):
    own = {name: p for name, p in model.named_parameters() if name.startswith("lortalib.")}
    return {name: (factor * p.detach()).requires_grad_() for name, p in own.items()}


@pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2"])
def test_factors_can_be_given_from_outside(name):
    model, adapter = adapted_model(name)
    own = output(model, words())
    for factor in (1.5, -1.0):
        given = replaced(model, factor)
        value = functional_call(model, given, (), words())[0]
        found = torch.autograd.grad(weighed(value), list(given.values()))
        assert same_output_as_dense(model, words())
        assert close(output(model, words()), own, 1e-12)
        twin = copy.deepcopy(model)
        twin.load_state_dict(given, strict=False)
        dense = densely(twin, words())
        assert all_close([value.detach(), *found], [dense.detach(), *gradients(dense, twin)])
    assert all(factor.grad is None for factor in adapter.parameters())


def test_given_factors_that_share_memory_with_the_own_get_the_gradients():
    model, _ = adapted_model("Llama")
    expected = gradients(model(**words())[0], model)
    given = {
        name: p.detach().requires_grad_()
        for name, p in model.named_parameters()
        if name.startswith("lortalib.")
    }
    value = functional_call(model, given, (), words())[0]
    assert all_close(torch.autograd.grad(weighed(value), list(given.values())), expected)
    assert same_as_dense(model, words())


@pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2", "Phi3"])
def test_torch_func_transforms_a_model_with_an_adapter(name):
    model, _ = adapted_model(name)
    model.set_attn_implementation("eager")
    given = {n: p.detach() for n, p in replaced(model, 1.0).items()}

    inputs = words()
    noise = torch.randn(output(model, inputs).shape, generator=generator(), dtype=torch.float64)

    def loss(given):
        return (functional_call(model, given, (), inputs)[0] * noise).sum()

    expected = gradients(densely(model, words()), model)
    assert all_close(grad(loss)(given).values(), expected)
    stacked = {n: torch.stack([p, -p]) for n, p in given.items()}
    mapped = vmap(grad(loss))(stacked)
    alone = grad(loss)({n: -p for n, p in given.items()})
    assert all_close([g[0] for g in mapped.values()], expected)
    assert all_close([g[1] for g in mapped.values()], alone.values())
    assert same_as_dense(model, words())


def test_a_model_on_the_meta_device_runs():
    with torch.device("meta"):
        model = MODELS["Llama"]()
    lortalib.nn.apply(model, "cp", rank=2, init="normal")
    found = model(input_ids=torch.zeros(2, 7, dtype=torch.long, device="meta"))[0]
    assert found.is_meta
    assert found.shape == (2, 7, 64)


@pytest.mark.parametrize("warm", [True, False])
def test_a_forward_with_fake_tensors_changes_nothing(warm):
    model, _ = adapted_model("Llama")
    if warm:
        output(model, words())
    with FakeTensorMode(allow_non_fake_inputs=True):
        output(model, words())
    with torch.no_grad():
        assert same_output_as_dense(model, words())


@pytest.mark.parametrize(
    "name",
    [
        "Llama",
        "Bert",
        "GPT2",
        "Phi3",
        "T5",
    ],
)
def test_nothing_of_a_forward_outlives_it(name):
    model, adapter = adapted_model(name)
    model.get_input_embeddings().requires_grad_(True)
    seen = []
    for site in adapter.sites:
        module = model.get_submodule(site.path)
        module.register_forward_pre_hook(lambda m, a: seen.append(weakref.ref(a[0])))
    model(**inputs_of(name))
    gc.collect()
    assert len(seen) >= 4
    assert [x() for x in seen if x() is not None] == []


def test_pairs_go_where_a_module_computes():
    """As on several devices: what is read through a pair is larger than the pair, and stays."""
    model, adapter = adapted_model("Llama")
    module, _ = projection(model, adapter)
    module.to("meta")
    assert module(vectors().to("meta")).is_meta
    factors = adapter.sources[0]
    first, second = factors.pair(0, 0, torch.float64, torch.device("meta"))
    assert first.is_meta
    assert second.is_meta
    assert not any(p.is_meta for p in adapter.parameters())


@pytest.mark.slow
def test_compiled_agrees_with_eager(llama, inputs):
    torch._dynamo.reset()
    adapter = put(llama)
    put(llama, "tt", gqa="split", name="second", seed=1)
    expected = output(llama, inputs)
    eager = gradients_on(llama, inputs)
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    llama.zero_grad()
    found = compiled(**inputs)[0]
    found.square().mean().backward()
    assert close(found, expected)
    grads = [p.grad for p in llama.parameters() if p.requires_grad]
    assert all(close(a, b, 1e-6) for a, b in zip(grads, eager))
    adapter.disable()
    assert close(compiled(**inputs)[0], output(llama, inputs))
    torch._dynamo.reset()


def test_a_forward_leaves_nothing_behind(llama, inputs):
    adapter = put(llama)
    with unchanged(llama):
        loss_on(llama, inputs)
        output(llama, inputs)
    held = [name for name, value in vars(adapter).items() if isinstance(value, torch.Tensor)]
    assert held == []
