"""Every change of state is a transaction: whatever is raised within it, all is as before or as after.

A fault is raised at the k-th call of a function of the library, or of torch's modules and hooks, within a
verb; then the model is compared with what it was and with what it was to become.
"""

import pytest
import torch
from adapted import put
from faults import Fault, check_faults, frozen_garbage  # noqa: F401
from models import FAMILIES
from transformers import MixtralConfig, MixtralModel

from lortalib import nn
from lortalib.nn import adapters


def llama():
    return FAMILIES["Llama"].model("ForCausalLM")


def bert():
    return FAMILIES["Bert"].model("ForSequenceClassification")


def mixtral():
    torch.manual_seed(0)
    return MixtralModel(
        MixtralConfig(
            num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=16, vocab_size=64, num_local_experts=2, head_dim=8,
        )
    ).eval()  # fmt: skip


MODELS = {
    "llama": (llama, {"targets": "all"}),
    "bert": (bert, {"train_also": "classifier"}),
    "mixtral": (mixtral, {"targets": "mlp"}),
}


def adapted(make, options):
    model = make()
    put(model, **options)
    return model


def merged(make, options):
    model = adapted(make, options)
    adapters(model)["default"].merge()
    return model


def disabled(make, options):
    model = adapted(make, options)
    adapters(model)["default"].disable()
    return model


def two(make, options):
    """Two adapters that stand in the same weights, the second one merged as well."""
    model = merged(make, options)
    rest = {k: v for k, v in options.items() if k != "train_also"}
    put(model, "tucker", name="other", seed=1, **rest)
    adapters(model)["other"].merge()
    return model


def fresh(make, options):
    model = make()
    put(model, "lora", **{**options, "init": "invariant"})
    return model


def align(model):
    batch = {"input_ids": torch.tensor([[5, 6, 7], [7, 6, 5]])}
    nn.align_to_gradient(
        model,
        [batch],
        loss=lambda batch: model(**batch)[0].square().mean(),
        generator=torch.Generator().manual_seed(0),
    )


def verb(name, **arguments):
    return lambda model: getattr(adapters(model)["default"], name)(**arguments)


VERBS = {
    "apply": (lambda make, options: make(), None),
    "apply a second": (merged, lambda model: put(model, name="other", targets="q", freeze=True)),
    "merge": (adapted, verb("merge")),
    "merge a disabled one": (disabled, verb("merge")),
    "unmerge": (merged, verb("unmerge")),
    "unmerge one of two": (two, verb("unmerge")),
    "enable": (disabled, verb("enable")),
    "disable": (adapted, verb("disable")),
    "disable a merged one": (merged, verb("disable")),
    "set_active": (two, lambda model: nn.set_active(model, "other")),
    "remove": (adapted, verb("remove")),
    "remove a merged one": (merged, verb("remove")),
    "remove and leave merged": (adapted, verb("remove", merged=True)),
    "align": (fresh, align),
}


def cases(number):
    for name in MODELS:
        for kind in VERBS:
            if kind == "align" and name == "mixtral":
                continue  # its format carries no mode `expert`
            yield pytest.param(name, kind, number, id=f"{name}-{kind}")


def check(name, kind, number):
    make, options = MODELS[name]
    prepare, act = VERBS[kind]
    if act is None:
        act = lambda model: put(model, **options)  # noqa: E731
    check_faults(f"{name}, {kind}", prepare(make, options), act, number)


@pytest.mark.parametrize(("name", "kind", "number"), list(cases(12)))
def test_a_fault_leaves_all_as_before_or_as_after(name, kind, number):
    check(name, kind, number)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "number"), list(cases(150)))
def test_faults_at_many_places_leave_all_as_before_or_as_after(name, kind, number):
    check(name, kind, number)


class Closed:
    """An object with code that Python runs when it is collected, where no error can be raised."""

    def __del__(self):
        torch.nn.Identity()


def test_an_error_that_python_keeps_to_itself_is_seen():
    fault = Fault(RuntimeError, 0)
    with fault:
        Closed()
    assert (fault.fired, fault.unraised) == (True, 1)
    fault = Fault(RuntimeError, 10**6)
    with fault:
        torch.nn.Identity()
    assert (fault.fired, fault.unraised) == (False, 0)
    assert fault.calls > 0
