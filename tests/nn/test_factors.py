"""The pairs that adapters keep: whatever happens between two forwards, they are those of the factors.

The reference is the same model with every weight's dense update added to it, with autograd.
"""

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections import Counter
from contextlib import nullcontext
from itertools import permutations

import pytest
import torch
from harness import close, examples, generator, output, put, same_bits
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, LLAMA, TEXT, Attention, Family, both_sides, words
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.functional import dropout, linear
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import lortalib
from lortalib.nn import adapters, set_active

MODELS = {
    "Llama": lambda **sizes: FAMILIES["Llama"].model("ForCausalLM", **sizes),
    "Bert": FAMILIES["Bert"].model,
    "GPT2": Family("GPT2", {**TEXT, "n_embd": 16, "n_head": 4, "n_layer": 2}, {}).model,
    "Phi3": Family("Phi3", {**LLAMA, "bos_token_id": 1, "eos_token_id": 2}, {}).model,
    "T5": lambda: FAMILIES["T5"].model("ForConditionalGeneration"),
}
FORMATS = ["cp", "tucker", "tt", "lora"]
each_model = pytest.mark.parametrize("name", MODELS)


def made(name, decomposition="cp", /, rank=2, **options):
    """A tiny float64 model with an adapter whose numbers are random."""
    sizes = options.pop("sizes", {})
    model = MODELS[name](**sizes).double()
    adapter = put(model, decomposition, rank, **{"alpha": 0.7, "dtype": torch.float64, **options})
    return model, adapter


def fed(name):
    return both_sides() if name == "T5" else words()


def active(model):
    return [adapter for adapter in adapters(model).values() if adapter.active]


def densely(root, inputs, module=None):
    """What the model, or a module of it, returns with weights that hold the updates."""
    module = module or root
    path = next(path for path, known in root.named_modules() if known is module)
    start, on, weights = path + "." * bool(path), active(root), {}
    for adapter in on:
        for site in adapter.sites:
            if site.path.startswith(start):
                name = f"{site.path}.{site.parameter}".removeprefix(start)
                old = weights.get(name, module.get_parameter(name))
                weights[name] = old + adapter.delta(site)
    for adapter in on:
        adapter.active = False
    try:
        return functional_call(module, weights, (), inputs)[0]
    finally:
        for adapter in on:
            adapter.active = True


def number(value, seed=0):
    """A number that every entry counts for."""
    noise = torch.randn(value.shape, generator=generator(seed), dtype=torch.float64)
    return (value * noise).sum()


def gradients(value, root):
    trained = [p for p in root.parameters() if p.requires_grad]
    return torch.autograd.grad(number(value), trained, materialize_grads=True, allow_unused=True)


def agree(found, expected):
    return all(close(a, b, 1e-8) for a, b in zip(found, expected, strict=True))


def right(root, inputs, module=None):
    """Whether output and gradients are those of dense updates."""
    results = []
    for call in (lambda: (module or root)(**inputs)[0], lambda: densely(root, inputs, module)):
        torch.manual_seed(0)  # for the dropout of the base
        value = call()
        results.append([value.detach(), *gradients(value, root)])
    found, expected = results
    live = {id(p) for adapter in active(root) for p in adapter.parameters()}
    trained = [p for p in root.parameters() if p.requires_grad]
    assert [bool(g.any()) for g in expected[1:]] == [id(p) in live for p in trained]
    return agree(found, expected)


def right_output(root, inputs, module=None):
    """Whether the output alone is, without a backward."""
    torch.manual_seed(0)
    found = (module or root)(**inputs)[0]
    torch.manual_seed(0)
    with torch.no_grad():
        return close(found, densely(root, inputs, module), 1e-8)


def projection(model, adapter, role="q", layer=0):
    """A projection module, and what it computes with the dense update."""
    site = next(site for site in adapter.sites if (site.role, site.layer) == (role, layer))
    module = model.get_submodule(site.path)
    return module, lambda x: linear(x, module.weight + adapter.delta(site), module.bias)


def vectors(*size, seed=3):
    return torch.randn(*(size or (2, 5)), 16, generator=generator(seed), dtype=torch.float64)


def body(model):
    """The module that a model with a head holds its layers in, or such a module of a bare one."""
    return model.get_submodule({"LlamaForCausalLM": "model"}.get(type(model).__name__, "encoder"))


# --- as with dense updates ------------------------------------------------------------------------


@pytest.mark.parametrize("decomposition", FORMATS)
@each_model
def test_outputs_and_gradients_are_those_of_dense_updates(name, decomposition):
    model, _ = made(name, decomposition)
    for mode in (False, True):
        model.train(mode)
        assert right(model, fed(name))
        assert right(model, fed(name))


LAYERS = "model.layers.{}.self_attn.{}_proj"
OPTIONS = {
    "only q": {"targets": "q"},
    "k and v": {"targets": "kv"},
    "only o": {"targets": "o"},
    "one layer": {"layers": 1},
    "layers differ": {"targets": [LAYERS.format(*pair) for pair in ("0q", "0o", "1k", "1v")]},
    "k in one layer": {"targets": [LAYERS.format(*pair) for pair in ("0q", "0k", "1q")]},
    "split": {"gqa": "split"},
    "mlp": {"targets": "mlp"},
    "one factor for in": {"targets": "all", "share_residual": True},
    "more than a row of a batch": {"rank": 9},
}


@pytest.mark.parametrize("decomposition", ["cp", "tt"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whatever_sites_there_are(options, decomposition):
    model, _ = made("Llama", decomposition, **options)
    assert right(model, words())
    assert right_output(model, words())


@each_model
def test_two_adapters_at_once(name):
    model, _ = made(name, name="one")
    put(model, "tucker", name="two", seed=1, dtype=torch.float64)
    for names in (["one", "two"], "two", "one", ["two", "one"]):
        set_active(model, names)
        assert right(model, fed(name))
        assert right_output(model, fed(name))


@pytest.mark.parametrize("size", [(), (5,), (1, 5), (3, 5), (3, 1), (2, 2, 5)], ids=str)
@pytest.mark.parametrize(("name", "role"), [("Llama", "q"), ("Llama", "k"), ("Bert", "v")])
def test_projections_of_inputs_of_any_shape(name, role, size):
    model, adapter = made(name)
    module, dense = projection(model, adapter, role)
    x = torch.randn(*size, 16, generator=generator(), dtype=torch.float64)
    for start in (x, torch.stack([x, x], -1)[..., 0]):
        one, other = (start.clone(memory_format=torch.preserve_format) for _ in range(2))
        with torch.no_grad():
            assert close(module(one), dense(one), 1e-8)
        one.requires_grad_()
        other.requires_grad_()
        wanted = list(adapter.parameters())
        found = torch.autograd.grad(number(module(one)), [one, *wanted])
        assert agree(found, torch.autograd.grad(number(dense(other)), [other, *wanted]))


# --- never stale ----------------------------------------------------------------------------------


def step(kind, **options):
    def change(model, adapter):
        kind(adapter.parameters(), lr=0.02, **options).step()

    return change


def for_each(change):
    """A change of a model by a change of each parameter of its adapter."""

    def act(model, adapter):
        for parameter in adapter.parameters():
            change(parameter)

    return act


def other(tensor):
    """Other numbers of the same size."""
    return tensor.detach().roll(1)


def in_place(parameter):
    with torch.no_grad():
        parameter.copy_(other(parameter))


def new_data(parameter):
    parameter.data = other(parameter)


def by_numpy(parameter):
    parameter.detach().numpy()[...] = other(parameter).numpy()


def load(assign):
    def change(model, adapter):
        state = {name: other(value) for name, value in adapter.state_dict().items()}
        adapter.load_state_dict(state, assign=assign)

    return change


def as_one_vector(model, adapter):
    vector_to_parameters(other(parameters_to_vector(adapter.parameters())), adapter.parameters())


def and_back(model, adapter):
    adapter.to(torch.float32)
    for_each(in_place)(model, adapter)
    adapter.to(torch.float64)


#: These count as changes for torch, or replace the storage.
SEEN = {
    "SGD": step(torch.optim.SGD, foreach=False),
    "SGD foreach": step(torch.optim.SGD, foreach=True),
    "Adam": step(torch.optim.Adam, foreach=False),
    "Adam foreach": step(torch.optim.Adam, foreach=True),
    "AdamW": step(torch.optim.AdamW),
    "in place": for_each(in_place),
    "new data": for_each(new_data),
    "load_state_dict": load(assign=False),
    "load_state_dict assign": load(assign=True),
    "one vector": as_one_vector,
    "another dtype and back": and_back,
}
#: These leave no trace.
UNSEEN = {
    "SGD fused": step(torch.optim.SGD, fused=True),
    "Adam fused": step(torch.optim.Adam, fused=True),
    "data.mul_": lambda model, adapter: next(adapter.parameters()).data.mul_(-1.1),
    "data.copy_": for_each(lambda p: p.data.copy_(other(p))),
    "numpy": for_each(by_numpy),
    "one number": lambda model, adapter: next(adapter.parameters()).data.view(-1)[-1:].neg_(),
}


@pytest.mark.parametrize("change", [*SEEN, *UNSEEN])
@pytest.mark.parametrize(("name", "decomposition"), [("Llama", "cp"), ("Bert", "tucker")])
def test_after_any_change_the_pairs_are_new(name, decomposition, change):
    model, adapter = made(name, decomposition)
    inputs, act = fed(name), {**SEEN, **UNSEEN}[change]
    number(model(**inputs)[0]).backward()
    with torch.no_grad():
        before = output(model, inputs)
        act(model, adapter)
        after = model(**inputs)[0]
        assert not close(after, before, 1e-4)
        assert close(after, densely(model, inputs), 1e-7)
    number(model(**inputs)[0]).backward()
    act(model, adapter)
    assert right(model, inputs)
    act(model, adapter)
    assert right(model, inputs)


PARTS = [(name, change) for name in ("Llama", "Bert", "T5") for change in [*SEEN, *UNSEEN]]


@pytest.mark.parametrize(("name", "change"), PARTS)
def test_a_submodule_that_is_called_directly_sees_the_change(name, change):
    """Its forward is the only one before and after."""
    model, adapter = made(name)
    part, act = body(model), {**SEEN, **UNSEEN}[change]
    inputs = words() if name != "Bert" else {"hidden_states": vectors()}
    number(model(**fed(name))[0]).backward()
    with torch.no_grad():
        before = part(**inputs)[0]
        act(model, adapter)
        after = part(**inputs)[0]
        assert not close(after, before, 1e-4)
        assert close(after, densely(model, inputs, part), 1e-7)


@pytest.mark.parametrize("change", SEEN)
def test_a_projection_that_is_called_directly_sees_the_change(change):
    model, adapter = made("Llama")
    number(model(**words())[0]).backward()
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
    model, adapter = made("Llama")
    number(model(**words())[0]).backward()
    module, dense = projection(model, adapter)
    with torch.no_grad():
        module(vectors())
        UNSEEN[change](model, adapter)
        assert close(module(vectors()), dense(vectors()), 1e-7)


@pytest.mark.parametrize("change", [*SEEN, *UNSEEN])
def test_a_projection_sees_after_a_backward_what_left_no_trace(change):
    """As where it is trained by itself: optimisers need not count as changes."""
    model, adapter = made("Llama")
    module, dense = projection(model, adapter)
    for _ in range(2):
        number(module(vectors())).backward()
        {**SEEN, **UNSEEN}[change](model, adapter)
        expected = gradients(dense(vectors()), adapter)
        assert agree(gradients(module(vectors()), adapter), expected)
        with torch.no_grad():
            assert close(module(vectors()), dense(vectors()), 1e-8)


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def toggled(model):
    first = next(adapters(model)["default"].parameters())
    first.requires_grad_(not first.requires_grad)


def changed(name):
    return lambda model: {**SEEN, **UNSEEN}[name](model, adapters(model)["default"])


def run(mode):
    def act(model):
        with mode():
            output(model, words())

    return act


def trained(model):
    number(model(**words())[0]).backward()


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
    "deepcopy": copied,
    "pickle": pickled,
    **{name: changed(name) for name in [*SEEN, *UNSEEN] if "SGD" not in name},
}


@examples(40)
@given(
    name=st.sampled_from(["Llama", "Bert", "GPT2", "Phi3"]),
    decomposition=st.sampled_from(FORMATS),
    acts=st.lists(st.sampled_from(list(ACTS)), min_size=2, max_size=8),
    dull=st.booleans(),
)
def test_whatever_happens_the_pairs_are_those_of_the_factors(name, decomposition, acts, dull):
    """``dull`` looks at outputs without gradients only, so that no backward raises a doubt."""
    model, _ = made(name, decomposition)
    for act in acts:
        twin = ACTS[act](model)
        model = twin if isinstance(twin, nn.Module) else model
        if dull:
            with torch.no_grad():
                assert right_output(model, words())
        else:
            assert right(model, words())


# --- with gradients and without -------------------------------------------------------------------

MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": nullcontext}
orders = pytest.mark.parametrize("order", [*permutations(MODES)], ids="-".join)


@orders
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_forwards_with_and_without_gradients_in_any_order(name, order):
    model, _ = made(name)
    for kind in [*order, *order]:
        with MODES[kind]():
            if kind != "grad":
                assert right_output(model, words())
                continue
        assert right(model, words())


@orders
@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_projections_of_one_input_with_and_without_gradients(name, order):
    model, adapter = made(name)
    x = vectors()
    pairs = [projection(model, adapter, role) for role in "qkv"]
    for kinds in (order, order[::-1]):
        for (module, dense), kind in zip(pairs, kinds):
            with MODES[kind]():
                y = module(x)
                assert y.requires_grad == (kind == "grad")
            assert close(y.detach(), dense(x), 1e-8)
            if kind == "grad":
                assert agree(gradients(y, adapter), gradients(dense(x), adapter))


def test_an_adapter_made_in_inference_mode_works_outside_it():
    model = MODELS["Llama"]().double()
    with torch.inference_mode():
        put(model, dtype=torch.float64)
    with torch.no_grad():
        assert right_output(model, words())
    with torch.inference_mode():
        assert right_output(model, words())


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_factor_gets_gradients_exactly_while_it_wants_them(name):
    model, adapter = made(name)
    factors = list(adapter.parameters())
    for flags in ([1, 1, 0, 1, 1], [0, 0, 0, 0, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]):
        for factor, flag in zip(factors, flags):
            factor.requires_grad_(bool(flag))
            factor.grad = None
        assert right(model, words())
        number(model(**words())[0]).backward()
        assert [factor.grad is not None for factor in factors] == [bool(flag) for flag in flags]
    adapter.requires_grad_(False)
    assert not model(**words())[0].requires_grad


def test_a_factor_frozen_between_forward_and_backward_is_skipped():
    model, adapter = made("Llama")
    first, *others = adapter.parameters()
    loss = number(model(**words())[0])
    first.requires_grad_(False)
    loss.backward()
    assert first.grad is None
    assert all(factor.grad is not None for factor in others)


# --- forwards and backwards in any order ----------------------------------------------------------


def batch(seed):
    return {"input_ids": torch.randint(5, 60, (2, 7), generator=generator(seed))}


def grads(adapter):
    found = [parameter.grad.clone() for parameter in adapter.parameters()]
    adapter.zero_grad()
    return found


def loss_of(model, seed):
    return number(model(**batch(seed))[0], seed)


def dense_gradients(model, *seeds):
    """Of the sum of these losses, with dense updates."""
    loss = sum(number(densely(model, batch(seed)), seed) for seed in seeds)
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


each_simple_model = pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2", "Phi3"])


@each_simple_model
def test_two_forwards_before_their_backwards(name):
    model, adapter = made(name)
    expected = dense_gradients(model, 1, 2)
    one, two = loss_of(model, 1), loss_of(model, 2)
    two.backward()
    one.backward()
    assert agree(grads(adapter), expected)
    one, two = loss_of(model, 1), loss_of(model, 2)
    (one + two).backward()
    assert agree(grads(adapter), expected)


@each_simple_model
def test_a_backward_twice_adds_up(name):
    model, adapter = made(name)
    expected = dense_gradients(model, 1)
    loss = loss_of(model, 1)
    for times in (1, 2, 3):
        loss.backward(retain_graph=times < 3)
        assert agree([p.grad for p in adapter.parameters()], [times * g for g in expected])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    grads(adapter)
    loss_of(model, 1).backward()
    assert agree(grads(adapter), expected)


def test_forwards_and_backwards_that_overlap():
    model, adapter = made("Llama")
    expected = dense_gradients(model, 1, 2, 3)
    one, two = loss_of(model, 1), loss_of(model, 2)
    one.backward()
    three = loss_of(model, 3)
    two.backward()
    three.backward()
    assert agree(grads(adapter), expected)


def test_second_derivatives_are_those_of_dense_updates():
    model, adapter = made("Llama", "tucker")
    model.set_attn_implementation("eager")
    factors, found = list(adapter.parameters()), []
    for value in (model(**words())[0], densely(model, words())):
        first = torch.autograd.grad(number(value), factors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), factors))
    assert agree(*found)


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_projections_of_one_input_with_a_backward_between(name):
    model, adapter = made(name)
    x = vectors()
    for order in ("qkv", "vqk", "qqk", "kkkk"):
        for role in order:
            module, dense = projection(model, adapter, role)
            number(module(x)).backward()
            assert agree(grads(adapter), gradients(dense(x), adapter))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_the_input_alone_between_projections(frozen):
    model, adapter = made("Llama")
    adapter.requires_grad_(not frozen)
    x = vectors().requires_grad_()
    for role in "qk":
        module, dense = projection(model, adapter, role)
        (found,) = torch.autograd.grad(number(module(x)), x)
        assert close(found, torch.autograd.grad(number(dense(x)), x)[0], 1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_an_input_changed_in_place_between_projections(mode):
    model, adapter = made("Llama")
    x = vectors()
    for role in "qkvkq":
        module, dense = projection(model, adapter, role)
        with MODES[mode]():
            found = module(x).detach().clone()
            assert close(found, dense(x), 1e-8)
            x.mul_(-1.5)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_that_take_turns(mode):
    model, adapter = made("Llama")
    one, two = vectors(seed=1), vectors(seed=2)
    with MODES[mode]():
        for role, x in zip("qkvqkvkk", (one, two, one, two, two, two, one, two)):
            module, dense = projection(model, adapter, role)
            assert close(module(x).detach(), dense(x).detach(), 1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_projections_of_one_input_that_read_through_other_factors(mode):
    """Of other layers, or after a step."""
    model, adapter = made("Llama", "lora")
    x = vectors()
    with MODES[mode]():
        for layer in (0, 1):
            for role in "qk":
                module, dense = projection(model, adapter, role, layer)
                assert close(module(x).detach(), dense(x).detach(), 1e-8)
                SEEN["in place"](model, adapter)


def test_an_input_that_wants_gradients_from_now_on():
    model, adapter = made("Llama")
    x = vectors()
    adapter.scope.begin(model, sys._getframe())  # as where the model's own forward runs
    projection(model, adapter, "q")[0](x)
    x.requires_grad_()
    module, dense = projection(model, adapter, "k")
    (found,) = torch.autograd.grad(number(module(x)), x)
    assert close(found, torch.autograd.grad(number(dense(x)), x)[0], 1e-8)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize("change", ["SGD foreach", "Adam", "in place", "load_state_dict"])
def test_a_step_between_forward_and_backward_is_an_error(name, change):
    model, adapter = made(name)
    (network,) = adapter.networks
    loss_of(model, 1).backward()
    loss = loss_of(model, 1)
    SEEN[change](model, adapter)
    with pytest.raises(RuntimeError, match=f"network '{network}' was changed in place between"):
        loss.backward()
    assert right(model, words())


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copy_between_forwards_trains_by_itself(duplicate, mode):
    model, adapter = made("Bert", targets="all", share_residual=True)
    with MODES[mode]():
        before = model(**words())[0].detach()
    twin = duplicate(model)
    own = adapters(twin)["default"]
    assert close(output(twin, words()), before, 1e-12)
    loss_of(twin, 1).backward()
    assert all(factor.grad is None for factor in adapter.parameters())
    torch.optim.SGD(own.parameters(), lr=0.1).step()
    assert close(output(model, words()), before, 1e-12)
    assert not close(output(twin, words()), before, 1e-4)
    own.zero_grad()
    assert right(twin, words())
    assert right(model, words())


# --- checkpoints and saved tensors ----------------------------------------------------------------

re_entrant = pytest.mark.parametrize("use_reentrant", [True, False])


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")
@re_entrant
@pytest.mark.parametrize("decomposition", ["cp", "lora"])
def test_checkpoints_of_many_layers_leave_the_gradients_as_they_are(decomposition, use_reentrant):
    model, adapter = made("Llama", decomposition, sizes={"num_hidden_layers": 4})
    model.train()
    expected = dense_gradients(model, 1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for early_stop in (True, False, True):
        with set_checkpoint_early_stop(early_stop):
            loss_of(model, 1).backward()
        assert agree(grads(adapter), expected)
        torch.optim.SGD(adapter.parameters(), lr=0.0).step()


@re_entrant
def test_checkpoints_of_single_projections(use_reentrant):
    model, adapter = made("Llama")
    x, values = vectors().requires_grad_(), 0
    for role in "qkv":
        module, _ = projection(model, adapter, role)
        values = values + number(checkpoint(module, x, use_reentrant=use_reentrant))
    values.backward()
    found = grads(adapter)
    dense = [projection(model, adapter, role)[1] for role in "qkv"]
    expected = torch.autograd.grad(sum(number(d(x)) for d in dense), list(adapter.parameters()))
    assert agree(found, expected)


def saved_in(call):
    """Shapes of the tensors that a call saves for the backward."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return Counter(shapes)


@each_model
def test_a_forward_that_is_repeated_saves_what_it_saved_at_first(name):
    """Whoever made the pairs, and whatever came between."""
    model, adapter = made(name)
    call = lambda: model(**fed(name))[0]  # noqa: E731
    first = saved_in(call)
    assert saved_in(call) == first
    output(model, fed(name))
    assert saved_in(call) == first
    number(call()).backward()
    assert saved_in(call) == first
    SEEN["SGD"](model, adapter)
    output(model, fed(name))
    assert saved_in(call) == first


@pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2"])
def test_of_the_pairs_only_small_tensors_are_saved(name):
    """Beyond what the base saves: the inputs it has anyway, products of length p, and the pairs."""
    model, _ = made(name)
    set_active(model, [])
    model.get_input_embeddings().requires_grad_(True)
    base = saved_in(lambda: model(**words()))
    set_active(model, "default")
    beyond = saved_in(lambda: model(**words())) - base
    assert beyond
    assert all(2 in shape or shape[-1] == 16 for shape in beyond)


# --- who else looks -------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["before a forward", "after one"])
@pytest.mark.parametrize("options", [{}, {"targets": "all", "share_residual": True}], ids=str)
def test_hooks_of_a_factor_see_its_whole_gradient_once(options, before):
    model, adapter = made("Llama", **options)
    factors = list(adapter.parameters())
    if not before:
        loss_of(model, 1)
    seen, done = [], []
    for k, factor in enumerate(factors):
        factor.register_hook(lambda gradient, k=k: seen.append((k, gradient)))
        factor.register_post_accumulate_grad_hook(lambda p, k=k: done.append((k, p.grad.clone())))
    for _ in range(2):
        adapter.zero_grad()
        loss_of(model, 1).backward()
        for calls in (seen, done):
            assert sorted(k for k, _ in calls) == list(range(len(factors)))
            assert all(close(gradient, factors[k].grad, 1e-12) for k, gradient in calls)
            calls.clear()


def test_a_hook_that_changes_the_gradient_is_obeyed():
    model, adapter = made("Llama")
    loss_of(model, 1).backward()
    plain = grads(adapter)
    for factor in adapter.parameters():
        factor.register_hook(lambda gradient: 3 * gradient)
    loss_of(model, 1).backward()
    assert agree(grads(adapter), [3 * g for g in plain])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("places", [["before"], ["behind"], ["before", "behind"]], ids=" and ".join)
@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_an_observer_before_the_adapter_sees_the_base_and_one_behind_it_the_sum(name, places, mode):
    model, seen = MODELS[name]().double(), {}
    target = next(m for p, m in model.named_modules() if p.endswith(("q_proj", "self.query")))
    if "before" in places:
        target.register_forward_hook(lambda m, a, y: seen.update(before=y))
    module, dense = projection(model, put(model, dtype=torch.float64))
    assert module is target
    if "behind" in places:
        target.register_forward_hook(lambda m, a, y: seen.update(behind=y))
    x = vectors()
    expected = {"before": linear(x, module.weight, module.bias), "behind": dense(x)}
    with MODES[mode]():
        y = module(x)
    assert close(y, expected["behind"], 1e-8)
    assert not close(y, expected["before"], 1e-3)
    assert sorted(seen) == places
    assert all(close(seen[place], expected[place], 1e-8) for place in places)


@pytest.mark.parametrize("mode", MODES)
def test_a_hook_on_all_modules_sees_the_output_of_the_base(mode):
    model, adapter = made("Llama")
    module, dense = projection(model, adapter)
    seen = []
    handle = register_module_forward_hook(lambda m, a, y: seen.append(y))
    try:
        with MODES[mode]():
            y = module(vectors())
    finally:
        handle.remove()
    assert close(seen[0].detach(), linear(vectors(), module.weight), 1e-12)
    assert close(y.detach(), dense(vectors()).detach(), 1e-8)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2"])
def test_full_backward_hooks_leave_the_gradients_as_they_are(name):
    model, adapter = made(name)
    calls = []
    for site in adapter.sites:
        module = model.get_submodule(site.path)
        module.register_full_backward_hook(lambda m, gi, go: calls.append(m))
        module.register_full_backward_pre_hook(lambda m, go: calls.append(m))
    assert right(model, words())
    assert len({*calls}) == len({site.path for site in adapter.sites})


class Passing(nn.Linear):
    """Returns its very input."""

    def forward(self, x):
        return x


class Remembering(nn.Linear):
    """Returns one buffer for ever."""

    def forward(self, x):
        if not hasattr(self, "memory"):
            self.memory = torch.ones(2, 5, 16, dtype=torch.float64)
        return self.memory


class Block(nn.Module):
    """A model of one layer of attention, whose projections are of this class."""

    def __init__(self, linear):
        super().__init__()
        self.layers = nn.ModuleList([Attention(linear=linear)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["passing", "remembering", "patched", "patched with its input"])
def test_what_a_projection_returns_but_does_not_own_is_not_written_to(kind, mode):
    classes = {"passing": Passing, "remembering": Remembering}
    model = Block(classes.get(kind, nn.Linear)).double()
    module = model.layers[0].q_proj
    x, memory = vectors(), torch.ones(2, 5, 16, dtype=torch.float64)
    if kind.startswith("patched"):
        module.forward = lambda given: given if "input" in kind else memory
    adapter = put(model, dtype=torch.float64)
    site = next(site for site in adapter.sites if site.role == "q")
    kept = x.clone()
    for _ in range(3):
        with MODES[mode]():
            y = module(x)
        share = linear(x, adapter.delta(site))
        base = x if kind in ("passing", "patched with its input") else torch.ones_like(x)
        assert close(y.detach(), (base + share).detach(), 1e-8)
        assert torch.equal(x, kept)
        if mode == "grad":
            assert agree(gradients(y, adapter), gradients(share, adapter))
    assert torch.equal(memory, torch.ones_like(memory))
    assert torch.equal(getattr(module, "memory", memory), torch.ones_like(memory))


# --- threads and transformed functions ------------------------------------------------------------


@pytest.fixture
def hasty():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_do_not_disturb_each_other(hasty):
    model, _ = made("Llama")
    factors = [p for p in model.parameters() if p.requires_grad]
    wrong, ready = [], threading.Barrier(3)
    expected = {}
    for seed in range(3):
        value = densely(model, batch(seed))
        expected[seed] = [value.detach(), *torch.autograd.grad(number(value), factors)]

    def work(seed, mode):
        try:
            ready.wait()
            for _ in range(8):
                with mode():
                    value = model(**batch(seed))[0]
                found = [value.detach()]
                if value.requires_grad:
                    found += torch.autograd.grad(number(value), factors)
                if not agree(found, expected[seed][: len(found)]):
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
    model, adapter = made(name)
    own = output(model, words())
    for factor in (1.5, -1.0):
        given = replaced(model, factor)
        value = functional_call(model, given, (), words())[0]
        found = torch.autograd.grad(number(value), list(given.values()))
        assert right_output(model, words())
        assert close(output(model, words()), own, 1e-12)
        twin = copy.deepcopy(model)
        twin.load_state_dict(given, strict=False)
        dense = densely(twin, words())
        assert agree([value.detach(), *found], [dense.detach(), *gradients(dense, twin)])
    assert all(factor.grad is None for factor in adapter.parameters())


def test_given_factors_that_share_memory_with_the_own_get_the_gradients():
    model, _ = made("Llama")
    expected = gradients(model(**words())[0], model)
    given = {
        name: p.detach().requires_grad_()
        for name, p in model.named_parameters()
        if name.startswith("lortalib.")
    }
    value = functional_call(model, given, (), words())[0]
    assert agree(torch.autograd.grad(number(value), list(given.values())), expected)
    assert right(model, words())


@pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2", "Phi3"])
def test_torch_func_transforms_a_model_with_an_adapter(name):
    model, _ = made(name)
    model.set_attn_implementation("eager")
    given = {n: p.detach() for n, p in replaced(model, 1.0).items()}

    inputs = words()
    noise = torch.randn(output(model, inputs).shape, generator=generator(), dtype=torch.float64)

    def loss(given):
        return (functional_call(model, given, (), inputs)[0] * noise).sum()

    expected = gradients(densely(model, words()), model)
    assert agree(grad(loss)(given).values(), expected)
    stacked = {n: torch.stack([p, -p]) for n, p in given.items()}
    mapped = vmap(grad(loss))(stacked)
    alone = grad(loss)({n: -p for n, p in given.items()})
    assert agree([g[0] for g in mapped.values()], expected)
    assert agree([g[1] for g in mapped.values()], alone.values())
    assert right(model, words())


# --- dropout --------------------------------------------------------------------------------------


def test_the_projections_of_a_layer_share_one_mask():
    model, adapter = made("Llama", dropout=0.5)
    adapter.train()
    masks = []
    for _ in range(2):
        x = vectors(4, 9)
        torch.manual_seed(len(masks))
        dropped = dropout(x, 0.5)
        torch.manual_seed(len(masks))
        adapter.scope.begin(model, sys._getframe())  # as where the model's own forward runs
        for role in "qkv":
            module, _ = projection(model, adapter, role)
            site = next(s for s in adapter.sites if s.path == LAYERS.format(0, role))
            expected = linear(x, module.weight) + linear(dropped, adapter.delta(site))
            assert close(module(x), expected, 1e-8)
        adapter.scope.end(model)
        masks.append(dropped == 0)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("mode", MODES)
def test_the_next_pass_over_the_same_input_has_another_mask(mode):
    model, adapter = made("Llama", dropout=0.5)
    adapter.train()
    x, passes = vectors(), []
    with MODES[mode]():
        for _ in range(2):
            passes.append([projection(model, adapter, role)[0](x) for role in "qkv"])
    for one, other in zip(*passes):
        assert not close(one, other, 1e-3)


def test_the_mean_over_masks_is_the_share_without_dropout():
    model, adapter = made("Llama", dropout=0.5)
    x = vectors(1).expand(20_000, 16)
    with torch.no_grad():
        torch.manual_seed(0)
        for role in "qkvo":
            module, dense = projection(model, adapter.train(), role)
            base, expected = linear(x[:1], module.weight), dense(x[:1])
            noisy = module(x)
            assert close(noisy.mean(0, keepdim=True), expected, 0.02)
            assert not close(noisy[:1], expected, 0.02)
            assert not close(base, expected, 0.1)
            adapter.eval()
            assert close(module(x.clone()), dense(x), 1e-8)


@pytest.mark.parametrize("first", [True, False], ids=["train first", "eval first"])
def test_train_and_eval_between_projections_of_one_input(first):
    model, adapter = made("Llama", dropout=0.5)
    x = vectors()
    adapter.scope.begin(model, sys._getframe())  # as where the model's own forward runs
    with torch.no_grad():
        projection(model, adapter.train(first), "q")[0](x)
        module, dense = projection(model, adapter.train(not first), "k")
        assert close(module(x), dense(x), 1e-8) == first


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_training_drops_and_one_in_evaluation_does_not(name):
    model, adapter = made(name, dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert right(model, fed(name))
    adapter.train()
    one, two = output(model, fed(name)), output(model, fed(name))
    assert not close(one, two, 1e-3)
    adapter.eval()
    assert right(model, fed(name))


# --- precision ------------------------------------------------------------------------------------


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["Llama", "Phi3"])
def test_in_bfloat16_the_shared_factor_gathers_all_of_its_gradient(name, how):
    """Every projection of every layer adds to the gradient of ``in``; none is rounded away."""
    model, adapter = made(name, sizes={"num_hidden_layers": 16}, dtype=torch.float32)
    model.to(torch.bfloat16)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.float()
    exact = copy.deepcopy(model).double()
    if how == "autocast":
        model.float()
    roles = {site.path: site for site in adapter.sites if not site.writer}
    cast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
    total = expected = 0.0
    for k, path in enumerate(roles):
        x = torch.randn(4, 32, 16, generator=generator(k)).bfloat16()
        with cast:
            y = model.get_submodule(path)(x if how == "bfloat16" else x.float())
        assert y.dtype == torch.bfloat16
        noise = torch.randn(y.shape, generator=generator(k + 50)).bfloat16()
        little = 0.004 if k else 1.0  # of the first, which bfloat16 would not notice
        total = total + little * (y.float() * noise.float()).sum()
        exact_value = (exact.get_submodule(path)(x.double()) * noise.double()).sum()
        expected = expected + little * exact_value
    total.backward()
    expected.backward()
    pairs = zip(adapter.named_parameters(), adapters(exact)["default"].parameters())
    for (factor, one), other in pairs:
        assert one.grad.dtype == torch.float32
        assert relative(one.grad, other.grad) < 0.02, factor


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@each_model
def test_in_bfloat16_outputs_are_those_of_float64_up_to_rounding(name, how):
    model, _ = made(name)
    expected = output(model, fed(name))
    model.to(torch.bfloat16 if how == "bfloat16" else torch.float32)
    for adapter in adapters(model).values():
        adapter.to(torch.float32)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = output(model, fed(name))
        off = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert off.median() < 0.05


@pytest.mark.parametrize("cast", [True, False], ids=["autocast", "plain"])
@pytest.mark.parametrize("decomposition", ["cp", "tucker"])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_pairs_in_bfloat16_are_those_of_float32_rounded_once(name, decomposition, cast):
    _, adapter = made(name, decomposition, dtype=torch.float32)
    for factors in adapter.sources:
        for kind, _ in enumerate(factors._signatures):
            exact = factors.pair(kind, 1, torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                found = factors.pair(kind, 1, torch.bfloat16)
                again = factors.pair(kind, 1, torch.float32)
            assert all(same_bits(a, b.bfloat16()) for a, b in zip(found, exact))
            assert all(map(same_bits, again, exact))


@each_model
def test_autocast_on_and_off_in_turns(name):
    model, _ = made(name)
    expected = output(model, fed(name))
    model.float()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**fed(name))[0]
        off = (found.detach().double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert 1e-4 < off.median() < 0.05
        assert close(model(**fed(name))[0].detach().double(), expected, 1e-4)


# --- elsewhere, and afterwards --------------------------------------------------------------------


def test_a_model_on_the_meta_device_runs():
    with torch.device("meta"):
        model = MODELS["Llama"]()
    lortalib.nn.apply(model, "cp", rank=2, init="normal")
    found = model(input_ids=torch.zeros(2, 7, dtype=torch.long, device="meta"))[0]
    assert found.is_meta
    assert found.shape == (2, 7, 64)


@pytest.mark.parametrize("warm", [True, False])
def test_a_forward_with_fake_tensors_changes_nothing(warm):
    model, _ = made("Llama")
    if warm:
        output(model, words())
    with FakeTensorMode(allow_non_fake_inputs=True):
        output(model, words())
    with torch.no_grad():
        assert right_output(model, words())


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
    model, adapter = made(name)
    model.get_input_embeddings().requires_grad_(True)
    seen = []
    for site in adapter.sites:
        module = model.get_submodule(site.path)
        module.register_forward_pre_hook(lambda m, a: seen.append(weakref.ref(a[0])))
    model(**fed(name))
    gc.collect()
    assert len(seen) >= 4
    assert [x() for x in seen if x() is not None] == []


def test_pairs_go_where_a_module_computes():
    """As on several devices: what is read through a pair is larger than the pair, and stays."""
    model, adapter = made("Llama")
    module, _ = projection(model, adapter)
    module.to("meta")
    assert module(vectors().to("meta")).is_meta
    factors = adapter.sources[0]
    first, second = factors.pair(0, 0, torch.float64, torch.device("meta"))
    assert first.is_meta
    assert second.is_meta
    assert not any(p.is_meta for p in adapter.parameters())
