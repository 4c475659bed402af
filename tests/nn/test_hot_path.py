"""What a forward with an adapter costs, in operations and sizes of tensors; nothing is timed."""

import copy
from collections import Counter

import pytest
import torch
from adapted import output, put
from models import BERT, LLAMA, TEXT, Family
from torch.utils._python_dispatch import TorchDispatchMode

from lortalib.decomp import TensorNetwork
from lortalib.nn import Adapter, Group, set_active

WIDE = {"hidden_size": 64}
SIZES = {
    "Llama": {**LLAMA, **WIDE},
    "Bert": {**BERT, **WIDE},
    "GPT2": {**TEXT, "n_embd": 64, "n_head": 4},
    "Phi3": {**LLAMA, **WIDE, "bos_token_id": 1, "eos_token_id": 2},
}
each_model = pytest.mark.parametrize("name", SIZES)
each_format = pytest.mark.parametrize("decomposition", ["cp", "tucker", "tt", "lora"])

#: Operations that compute nothing.
_VIEWS = frozenset(("t", "view", "_unsafe_view", "expand", "detach", "alias"))
#: Modules that have one of their own for q, k and v.
_APART = ("Llama", "Bert")


def wide(name, layers=2):
    return Family(name, {**SIZES[name], "num_hidden_layers": layers}, {}).model()


def token():
    return {"input_ids": torch.tensor([[7]])}


class Log(TorchDispatchMode):
    """Every operation: its name, and the most entries of a tensor that it returns."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        several = result if isinstance(result, (tuple, list)) else [result]
        sizes = [part.numel() for part in several if isinstance(part, torch.Tensor)]
        self.calls.append((operation.overloadpacket.__name__, max(sizes, default=0)))
        return result


def operations(call):
    """Names and sizes of the operations of a call."""
    with Log() as log:
        call()
    return Counter(log.calls)


def inferring(model):
    return lambda: output(model, token())


def training(model):
    return lambda: model(**token())[0].sum().backward()


def beyond(one, other):
    """The operations of one call that are not of the other, which does nothing else, by name."""
    assert not other - one
    names = Counter()
    for (name, _), times in (one - other).items():
        names[name] += times
    return names


def warm(model, adapter):
    """The operations of a forward that finds its pairs made."""
    with adapter.keep_pairs():
        inferring(model)()
        return operations(inferring(model))


def extra(model, adapter):
    """What a forward with the adapter does beyond one without, once its pairs are there."""
    on = warm(model, adapter)
    set_active(model, [])
    off = operations(inferring(model))
    set_active(model, "default")
    return beyond(on, off)


def hooks(model):
    kinds = [kind for kind in vars(torch.nn.Module()) if kind.endswith("_hooks")]
    assert "_forward_pre_hooks" in kinds
    return [hook for m in model.modules() for kind in kinds for hook in vars(m)[kind].values()]


# --- merged ---------------------------------------------------------------------------------------


@each_model
def test_a_merged_model_is_the_base_with_other_numbers(name):
    """No hook, the very same modules, the very same operations."""
    model = wide(name)
    modules = {path: (id(module), type(module)) for path, module in model.named_modules()}
    base = operations(inferring(model))
    assert hooks(model) == []
    adapter = put(model)
    assert hooks(model) != []
    adapter.merge()
    assert hooks(model) == []
    assert operations(inferring(model)) == base
    own = {path for path, _ in model.named_modules() if path.partition(".")[0] == "lortalib"}
    now = {p: (id(m), type(m)) for p, m in model.named_modules() if p not in own}
    assert now == modules
    adapter.unmerge()
    assert hooks(model) != []
    adapter.remove()
    assert hooks(model) == []


# --- not merged -----------------------------------------------------------------------------------


@each_format
@each_model
def test_no_dense_update_is_formed(name, decomposition, monkeypatch):
    """Neither asked for, nor any tensor as large as the smallest of the weights."""

    def refused(*args, **kwargs):
        raise AssertionError("a dense update was asked for")

    for owner, method in (
        (TensorNetwork, "dense"), (Group, "dense"), (Group, "pair"), (Adapter, "delta")
    ):  # fmt: skip
        monkeypatch.setattr(owner, method, refused)
    model = wide(name)
    adapter = put(model, decomposition, freeze=False)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_("embed" in path or path.startswith(("wte", "lortalib")))
    least = min(model.get_submodule(site.path).weight.numel() for site in adapter.sites)
    for call in (inferring(model), training(model)):
        found = []
        for names in ("default", "default", []):
            set_active(model, names)
            model.zero_grad()
            sizes = operations(call)
            found.append(Counter({k: n for k, n in sizes.items() if k[1] >= least}))
        assert found[0] == found[1] == found[2]


@each_format
@each_model
def test_a_site_costs_at_most_two_operations_whatever_the_rank_and_the_depth(name, decomposition):
    """One product with x, which projections share that read alike, and one with h."""
    costs = []
    for layers, rank in ((2, 2), (2, 8), (4, 2)):
        model = wide(name, layers)
        adapter = put(model, decomposition, rank)
        found = extra(model, adapter)
        computed = sum(n for operation, n in found.items() if operation not in _VIEWS)
        modules = len({site.path for site in adapter.sites})
        assert computed <= 2 * modules
        if name in _APART and decomposition != "lora":
            assert computed == (1 + 3 + 2) * layers
        assert {n % layers for n in found.values()} == {0}
        costs.append({operation: n // layers for operation, n in found.items()})
    assert costs[0] == costs[1] == costs[2]


@each_format
def test_the_pairs_of_all_layers_are_made_at_once(decomposition):
    """Seven more layers do not take seven more operations."""
    cold = []
    for layers in (5, 12):
        model = wide("Llama", layers)
        adapter = put(model, decomposition)
        cold.append(operations(inferring(model)).total() - warm(model, adapter).total())
    assert 0 < cold[1] < cold[0] + 7


def compared(found):
    return sum(times for (operation, _), times in found.items() if operation == "equal")


@each_model
def test_a_forward_compares_each_parameter_once_and_one_that_keeps_its_pairs_none(name):
    model = wide(name)
    adapter = put(model)
    inferring(model)()
    found = operations(inferring(model))
    assert compared(found) == len(list(adapter.parameters()))
    training(model)()
    inferring(model)()
    assert operations(inferring(model)) == found
    assert compared(warm(model, adapter)) == 0


@each_model
def test_a_disabled_adapter_costs_no_operation(name):
    model = wide(name)
    base = operations(inferring(model))
    put(model)
    inferring(model)()
    set_active(model, [])
    assert operations(inferring(model)) == base


@each_model
def test_to_switch_adapters_touches_no_tensor(name):
    model = wide(name)
    for seed, own in enumerate("ab"):
        put(model, name=own, seed=seed)
    alone = {}
    for own in "ab":
        set_active(model, own)
        inferring(model)()
        alone[own] = operations(inferring(model))
    for names in ("a", "b", [], ["a", "b"], "a", "b"):
        assert operations(lambda names=names: set_active(model, names)) == Counter()
        if names in ("a", "b"):
            assert operations(inferring(model)) == alone[names]


def test_a_copy_makes_its_own_pairs_once():
    model = wide("Llama")
    put(model)
    inferring(model)()
    again = operations(inferring(model))
    twin = copy.deepcopy(model)
    assert operations(inferring(twin)).total() > again.total()
    assert operations(inferring(twin)) == again


def test_kept_pairs_are_made_anew_after_a_change():
    model = wide("Llama")
    adapter = put(model)
    with adapter.keep_pairs():
        before = output(model, token())
        with torch.no_grad():
            next(adapter.parameters()).mul_(-2)
        after = output(model, token())
    assert not torch.equal(before, after)
    assert torch.equal(after, output(model, token()))
