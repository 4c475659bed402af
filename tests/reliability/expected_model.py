"""What a model with adapters is to be after any sequence of calls, said by dense weights.

An `ExpectedModel` is told of every call and never looks at what the library did with it, but for two things
that cannot be foreseen to the last bit: the numbers after a step of training, and those of a base that took
an update for good. They are compared first, then taken over.
"""

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from adapted import close, same_bits
from torch.func import functional_call
from updates import updates

HEAD = "lm_head"


@dataclass(frozen=True)
class Recipe:
    """How an adapter is made; `options` are those of `lortalib.nn.apply`."""

    decomposition: str
    rank: int
    options: tuple = ()
    also: bool = False  # whether the head trains with it
    freeze: bool = True

    def arguments(self):
        return {
            **dict(self.options),
            "train_also": [HEAD] * self.also,
            "freeze": self.freeze,
            "dtype": torch.float64,
            "alpha": 0.3,
        }

    @property
    def on_stream(self):
        return dict(self.options).get("acts_on") == "stream"


@dataclass
class Expected:
    """One adapter: its numbers, its own values of the head, and what of it stands in the weights."""

    recipe: Recipe
    sites: frozenset  # names of the weights that it updates
    numbers: dict
    head: torch.Tensor | None = None
    active: bool = True
    standing: object = None  # a picture of it as it was merged

    @property
    def merged(self):
        return self.standing is not None


def numbers_of(adapter):
    """Copies of the numbers of an adapter by name."""
    return {name: p.detach().clone() for name, p in adapter.networks.named_parameters()}


def picture_of(adapter):
    """An adapter as it is now, as far as its updates go."""
    networks = copy.deepcopy(dict(adapter.networks))
    return SimpleNamespace(
        groups=adapter.groups,
        scaling=adapter.scaling,
        network=lambda group: networks[group.name],
    )


def updates_of(adapter, base):
    """What an adapter adds to each weight of a base, by name."""
    plain = SimpleNamespace(get_parameter=base.__getitem__)
    return {name: added.detach() for name, added in updates(adapter, plain).items()}


def sites_of(adapter):
    return frozenset(f"{site.path}.{site.parameter}" for site in adapter.sites)


@dataclass
class ExpectedModel:
    """The base, the adapters on it in their order, and the weights that hold something merged."""

    plain: torch.nn.Module
    adapters: dict = field(default_factory=dict)
    stored: dict = field(default_factory=dict)

    def __post_init__(self):
        self.base = {name: p.detach().clone() for name, p in self.plain.named_parameters()}
        self.flags = {name: p.requires_grad for name, p in self.plain.named_parameters()}
        self.classes = {path: type(module) for path, module in self.plain.named_modules()}
        self.settled = set()  # of these weights the base is known up to rounding only

    # What would be refused

    def conflict(self, name, active=None, merged=None):
        """Whether an adapter on the stream would meet a weight that another is merged into."""
        state = {other: (each.active, each.merged) for other, each in self.adapters.items()}
        state[name] = (state[name][0] if active is None else active, bool(merged))
        into = [each.sites for other, each in self.adapters.items() if state[other][1]]
        return any(
            each.recipe.on_stream and on and not is_merged and any(each.sites & s for s in into)
            for (on, is_merged), each in zip(state.values(), self.adapters.values())
        )

    def head_taken(self, name):
        """Whether another active adapter has its own values in the head that this one trains."""
        own = self.adapters[name]
        others = [each for other, each in self.adapters.items() if other != name and each.active]
        return not own.active and own.recipe.also and any(each.recipe.also for each in others)

    # Calls

    def add(self, name, recipe, adapter, head=None):
        head = self.base[f"{HEAD}.weight"] if head is None else head
        own = head.clone() if recipe.also else None
        self.adapters[name] = Expected(recipe, sites_of(adapter), numbers_of(adapter), own)

    def write(self, sites):
        """The weights of these names hold the base and all that is merged into them."""
        for site in sites:
            inside = [each for each in self.adapters.values() if each.merged and site in each.sites]
            total = self.base[site]
            for each in inside:
                total = total + updates_of(each.standing, self.base)[site]
            self.stored.pop(site, None)
            if inside:
                self.stored[site] = total

    def merge(self, name, picture):
        own = self.adapters[name]
        if not own.merged:
            own.active, own.standing = True, picture
            self.write(own.sites)

    def unmerge(self, name):
        own = self.adapters[name]
        if own.merged:
            own.standing = None
            self.write(own.sites)

    def disable(self, name):
        self.unmerge(name)
        self.adapters[name].active = False

    def settle(self, name):
        """An adapter that is merged becomes part of the base."""
        own = self.adapters[name]
        for site, added in updates_of(own.standing, self.base).items():
            self.base[site] = self.base[site] + added
            self.settled.add(site)
            if not any(each.merged for each in self.others(name) if site in each.sites):
                self.stored.pop(site, None)
        if own.recipe.also:
            self.base[f"{HEAD}.weight"] = own.head
        del self.adapters[name]

    def others(self, name):
        return [each for other, each in self.adapters.items() if other != name]

    # What is expected

    def required_grad(self, name):
        trained = any(each.recipe.also for each in self.adapters.values())
        frozen = any(each.recipe.freeze for each in self.adapters.values())
        if name.startswith(f"{HEAD}.") and trained:
            return True
        return self.flags[name] and not frozen

    def weights(self):
        """The weights as the model stores them, by name."""
        heads = [each.head for each in self.adapters.values() if each.active and each.recipe.also]
        return {**self.base, **self.stored, **{f"{HEAD}.weight": head for head in heads}}

    def dense(self, model, beside=()):
        """The weights that make a bare model compute what the model is to compute.

        Args:
            model: with the adapters on it, of which the numbers are read.
            beside: further adapters, such as one that a row of a batch uses.
        """
        weights = self.weights()
        unmerged = [model[name] for name, e in self.adapters.items() if e.active and not e.merged]
        for adapter in [*unmerged, *beside]:
            for site, added in updates_of(adapter, self.base).items():
                weights[site] = weights[site] + added
        return weights

    def output(self, model, inputs, beside=()):
        with torch.no_grad():
            return functional_call(self.plain, self.dense(model, beside), (), inputs)[0]

    def wrong_weights(self, model):
        """Names of weights that are not what they are to be: in every bit where nothing is merged."""
        own = {n: p for n, p in model.named_parameters() if not n.startswith("lortalib.")}
        if list(own) != list(self.base):
            return ["other names"]
        wrong = [name for name, p in own.items() if p.requires_grad != self.required_grad(name)]
        for name, weight in self.weights().items():
            exact = name not in self.stored and name not in self.settled
            same = same_bits if exact else lambda one, other: close(one.detach(), other, 1e-11)
            if not same(own[name], weight):
                wrong.append(name)
            elif name in self.settled and name not in self.stored:
                self.base[name] = own[name].detach().clone()
                self.settled.discard(name)
        return wrong

    def wrong_adapters(self, found):
        """Names of adapters whose place, state or numbers are not what they are to be."""
        if list(found) != list(self.adapters):
            return ["other adapters"]
        wrong = []
        for name, own in self.adapters.items():
            numbers = numbers_of(found[name])
            alike = numbers.keys() == own.numbers.keys() and all(
                same_bits(numbers[key], own.numbers[key]) for key in numbers
            )
            if (own.active, own.merged) != (found[name].active, found[name].merged) or not alike:
                wrong.append(name)
        return wrong
