"""Every change of state is a transaction: whatever is raised within it, all is as before or as after.

A fault is raised at the k-th call of a function of the library, or of torch's modules and hooks, within a
verb; then the model is compared with what it was and with what it was to become.
"""

import copy
import gc
import random
import sys
from pathlib import Path

import pytest
import torch
from adapted import put
from models import FAMILIES
from transformers import MixtralConfig, MixtralModel

import lortalib
from lortalib import nn
from lortalib.nn import adapters

#: Where faults are raised: in the library, and in what it calls of torch to change a model.
WATCHED = (
    str(Path(lortalib.__file__).parent),
    str(Path(torch.nn.modules.module.__file__)),
    str(Path(torch.nn.utils.parametrize.__file__)),
    str(Path(torch.utils.hooks.__file__)),
)


class Fault:
    """Raises at the k-th call of a watched function; counts the calls if k is None.

    Attributes:
        calls: the calls of watched functions so far.
        fired: whether the error was raised.
        unraised: errors that Python printed instead of raising them, as in a generator that is collected.
    """

    def __init__(self, kind=KeyboardInterrupt, at=None):
        self.kind, self.at, self.calls = kind, at, 0
        self.fired, self.unraised = False, 0

    def __call__(self, frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(WATCHED):
            self.calls += 1
            if self.calls - 1 == self.at:
                sys.settrace(None)
                self.fired = True
                raise self.kind("injected")

    def _see(self, lost):
        if lost.exc_type is self.kind and str(lost.exc_value) == "injected":
            self.unraised += 1
        else:
            self._hook(lost)

    def __enter__(self):
        gc.collect()  # what other tests left is not collected, and closed, within the verb
        self._hook, sys.unraisablehook = sys.unraisablehook, self._see
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)
        sys.unraisablehook = self._hook


@pytest.fixture(autouse=True)
def frozen_garbage():
    """Each fault collects garbage; it need not look at all that other tests made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def state(model):
    """All that an adapter could change, by value: comparable with a copy's."""
    found = {}
    for path, module in model.named_modules():
        hooks = [
            type(hook).__name__
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            for hook in vars(module)[kind].values()
        ]
        found[path] = (
            type(module).__name__,
            [
                (n, p.requires_grad, p.detach().clone())
                for n, p in module._parameters.items()
                if p is not None
            ],
            list(module._buffers),
            hooks,
            len(module._forward_hooks_always_called),
            module.training,
        )
    flags = {name: (a.active, a.merged, a.config.init) for name, a in adapters(model).items()}
    return found, flags, model


def differences(one, other):
    (found, flags, _), (wanted, wanted_flags, _) = one, other
    names = [f"{path} comes and goes" for path in found.keys() ^ wanted.keys()]
    names += ["flags"] * (flags != wanted_flags)
    for path in found.keys() & wanted.keys():
        one_rest, other_rest = ((s[0], *s[2:]) for s in (found[path], wanted[path]))
        if one_rest != other_rest:
            names.append(f"{path} class, hooks or mode")
        one_own, other_own = found[path][1], wanted[path][1]
        if [x[:2] for x in one_own] != [x[:2] for x in other_own]:
            names.append(f"{path} names or flags of parameters")
        elif not all(torch.equal(x[2], y[2]) for x, y in zip(one_own, other_own)):
            names.append(f"{path} values")
    return names


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
KINDS = (KeyboardInterrupt, MemoryError, OSError, RuntimeError)


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
    start = prepare(make, options)
    goal = copy.deepcopy(start)
    act(copy.deepcopy(start))  # the first time more is called: caches are filled
    with Fault() as count:
        act(goal)
    before, after = state(start), state(goal)
    assert differences(before, after)
    places = range(count.calls)
    rng = random.Random(f"{name} {kind}")
    chosen = places if number is None else sorted(rng.sample(places, min(number, len(places))))
    wrong, swallowed, missed = [], 0, 0
    for place in chosen:
        model = copy.deepcopy(start)
        error = rng.choice(KINDS)
        fault, came_out = Fault(error, place), False
        try:
            with fault:
                act(model)
        except error:
            came_out = True
        found = state(model)
        lost, gone = differences(found, before), differences(found, after)
        if not came_out:  # Python or torch kept the error to itself, so the verb has to be done
            swallowed, missed = swallowed + fault.fired, missed + (not fault.fired)
            if gone:
                wrong.append((place, error.__name__, f"fired: {fault.fired}", gone[:3]))
        elif lost and gone:
            wrong.append((place, error.__name__, lost[:3], gone[:3]))
        elif lost:
            continue
        else:
            act(model)
            if differences(state(model), after):
                wrong.append((place, error.__name__, "the second try differs"))
    print(
        f"{name}, {kind}: {len(chosen)} faults, {swallowed} of them swallowed, {len(wrong)} wrong"
    )
    assert not wrong, f"{len(wrong)} of {len(chosen)}: {wrong[:3]}"


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
