"""A tiny model with adapters beside what is expected of it: the state machine without its calls."""

import gc
import tempfile
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from adapted import close, output, put, unchanged
from expected_model import HEAD, ExpectedModel, Recipe, numbers_of, sites_of
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from models import FAMILIES, MIXTRAL, words

from lortalib import nn
from lortalib.decomp import LegsError

NAMES = ("one", "two", "three")
REFUSALS = (ValueError, KeyError, RuntimeError, FileNotFoundError, TypeError)

names = st.sampled_from(NAMES)
seeds = st.integers(0, 5)
on_weights = st.builds(
    lambda targets, gqa, shared: (("targets", targets), ("gqa", gqa), ("share_residual", shared)),
    st.sampled_from(["all", "qkvo", "qv", "mlp", "o"]),
    st.sampled_from(["pool", "split"]),
    st.booleans(),
)
on_stream = st.builds(
    lambda targets: (("targets", targets), ("acts_on", "stream")),
    st.sampled_from(["all", "qkvo", "kv", "mlp"]),
)
FORMATS = ["cp", "tucker", "tt", "lora", "lotr", "cp_matrix", "lora_xs", "block_term"]
recipes = st.one_of(
    st.builds(
        Recipe,
        decomposition=st.sampled_from(formats),
        rank=st.integers(1, 2),
        options=options,
        also=st.sampled_from([False, False, True]),
        freeze=st.sampled_from([True, True, False]),
    )
    for formats, options in (
        (FORMATS, on_weights),
        (["indscal", "rescal", "cp", "tt", "lora"], on_stream),
    )
)


def tiny_llama():
    """Grouped queries; a part of the base is frozen from the beginning."""
    model = FAMILIES["Llama"].model("ForCausalLM").double()
    model.model.embed_tokens.requires_grad_(False)
    return model


def tiny_mixtral():
    model = MIXTRAL.model("ForCausalLM", num_hidden_layers=1).double()
    model.set_experts_implementation("eager")  # the others do not compute in float64
    return model


BASES = {"llama": tiny_llama, "mixtral": tiny_mixtral}


def hooks(model):
    """How many hooks the modules of a model have."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(vars(m)[kind]) for m in model.modules() for kind in kinds)


@cache
def facts(base, recipe):
    """The weights that an adapter updates and the number of its hooks; or how it is refused."""
    model = BASES[base]()
    try:
        adapter = put(model, recipe.decomposition, recipe.rank, **recipe.arguments())
    except (LegsError, ValueError) as error:
        return type(error)
    return sites_of(adapter), hooks(model)


class WatchedModel(RuleBasedStateMachine):
    """A model, the expected one, and what holds after each call."""

    base = "llama"
    steps = 0
    refused = 0

    def __init__(self):
        super().__init__()
        gc.collect()
        gc.freeze()  # what is counted at the end is what came in between
        self.model = BASES[self.base]()
        self.expected = ExpectedModel(BASES[self.base]())
        self.saved = {}
        self.bank = None
        self.removed = []
        self.inputs = words(5)

    @initialize(recipe=recipes, seed=seeds)
    def begin(self, recipe, seed):
        self.scratch = tempfile.TemporaryDirectory()
        self.apply("one", recipe, seed)

    @property
    def path(self):
        return Path(self.scratch.name)

    @property
    def adapters(self):
        return nn.adapters(self.model)

    def here(self, name):
        """One of the adapters that there are."""
        known = list(self.expected.adapters)
        return known[NAMES.index(name) % len(known)]

    def act(self, call, refuse=False):
        """Make a call, which is to be refused and change nothing, or to succeed."""
        if not refuse:
            return call()
        type(self).refused += 1
        with unchanged(self.model), pytest.raises(REFUSALS):
            call()
        return None

    def come(self, name, recipe, call):
        """A new adapter, unless something speaks against it."""
        found = facts(self.base, recipe)
        known = self.expected
        merged = [e.sites for e in known.adapters.values() if e.merged]
        heads = [e for e in known.adapters.values() if e.active and e.recipe.also]
        refuse = (
            name in known.adapters
            or isinstance(found, type)
            or (recipe.also and bool(heads))
            or (recipe.on_stream and any(found[0] & sites for sites in merged))
        )
        return self.act(call, refuse)

    def apply(self, name, recipe, seed):
        arguments = {**recipe.arguments(), "name": name, "seed": seed}
        adapter = self.come(
            name, recipe, lambda: put(self.model, recipe.decomposition, recipe.rank, **arguments)
        )
        if adapter is not None:
            self.expected.add(name, recipe, adapter)
            self.move(name, seed)

    def move(self, name, seed):
        """Other numbers for an adapter, and for the head if that has its values now."""
        own, draw = self.expected.adapters[name], torch.Generator().manual_seed(seed)
        moved = list(self.adapters[name].networks.parameters())
        if own.recipe.also and own.active:
            moved.append(self.model.get_submodule(HEAD).weight)
        with torch.no_grad():
            for parameter in moved:
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.add_(noise, alpha=0.1)
        own.numbers = numbers_of(self.adapters[name])
        if own.recipe.also and own.active:
            own.head = moved[-1].detach().clone()

    def watch(self, name):
        """What is of this adapter is to be freed."""
        self.removed += [weakref.ref(p) for p in self.adapters[name].parameters()]

    # What holds after each call

    @invariant()
    def all_is_as_dense_weights_say(self):
        type(self).steps += 1
        known = self.expected
        assert known.wrong_weights(self.model) == []
        assert known.wrong_adapters(self.adapters) == []
        modules = {p: m for p, m in self.model.named_modules() if p.split(".")[0] != "lortalib"}
        assert list(modules) == list(known.classes)
        for path, kind in known.classes.items():
            # Experts that hold an adapter unmerged are of a class derived from theirs, with its name.
            assert isinstance(modules[path], kind)
            assert type(modules[path]).__qualname__ == kind.__qualname__
        for name in self.model.state_dict():
            assert name in known.base or name.startswith("lortalib.")
        assert close(
            output(self.model, self.inputs), known.output(self.adapters, self.inputs), 1e-8
        )
        own = [facts(self.base, e.recipe)[1] for e in known.adapters.values() if not e.merged]
        assert hooks(self.model) == sum(own) + (self.bank[2] if self.bank else 0)

    @invariant()
    def what_was_removed_is_freed(self):
        if self.removed:
            gc.collect()
            assert not any(reference() is not None for reference in self.removed)
            self.removed = []

    def teardown(self):
        if self.bank is not None:
            self.bank[0].remove()
        for name in list(self.adapters):
            self.watch(name)
            self.adapters[name].remove()
            self.expected.disable(name)
            del self.expected.adapters[name]
        assert self.expected.wrong_weights(self.model) == []
        assert hooks(self.model) == 0
        assert {p: type(m) for p, m in self.model.named_modules()} == self.expected.classes
        self.bank = self.saved = None
        self.what_was_removed_is_freed()
        if hasattr(self, "scratch"):
            self.scratch.cleanup()
