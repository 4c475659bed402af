"""Faults that are raised at any call within a verb, and pictures of models to compare with."""

import copy
import gc
import random
import sys
from pathlib import Path

import pytest
import torch

import lortalib
from lortalib.nn import adapters

#: What is raised.
KINDS = (KeyboardInterrupt, MemoryError, OSError, RuntimeError)

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
    flags = {
        name: (a.active, a.merged, a.config.init, a.tasks) for name, a in adapters(model).items()
    }
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


def check_faults(name, start, act, number):
    """Raise errors at so many calls within a verb, all if None; whatever comes out, the model is as before or
    as after.

    Args:
        name: the name of the case, which chooses the places.
        start: the model before.
        act: the verb; it takes the model.
        number: the number of places.
    """
    goal = copy.deepcopy(start)
    act(copy.deepcopy(start))  # the first time more is called: caches are filled
    with Fault() as count:
        act(goal)
    before, after = state(start), state(goal)
    assert differences(before, after)
    places = range(count.calls)
    rng = random.Random(name)
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
    print(f"{name}: {len(chosen)} faults, {swallowed} of them swallowed, {len(wrong)} wrong")
    assert not wrong, f"{len(wrong)} of {len(chosen)}: {wrong[:3]}"
