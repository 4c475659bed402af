"""The doors through which adapters come to a model, each with the same few verbs.

A law (tests/laws) is stated once and holds for every door that has its verbs. What a door has not, it says in
`lacks`, with the reason. A new door is a class here and an entry in `DOORS`; a new format joins by itself.
"""

import copy
import warnings
import zlib
from contextlib import contextmanager
from functools import cache

import peft
import pytest
import torch
from adapted import FORMATS, put
from models import LAW_FAMILIES
from peft.tuners.tuners_utils import BaseTunerLayer
from strategies import mode_sets

import lortalib
from lortalib.peft import LortaConfig

ALPHA = 0.7


class Door:
    """A model with an adapter called "one" on it, and perhaps others.

    Attributes:
        model: what is called.
        plain: the base, which is nobody's to change.
        options: how the adapters are made.
        records: an adapter of the same numbers for each by name, for its groups, networks and sites. Where
            the door keeps parameters of its own, they are those of the record.
    """

    #: The verbs that the door has not, and the families and formats that it does not take, each with the
    #: reason.
    lacks: dict[str, str] = {}

    def __init__(self, base, **options):
        self.model, self.plain = copy.deepcopy(base), base
        self.options, self.records = options, {}

    @classmethod
    def on(cls, base, *, seed=0, fresh=False, **options):
        """Onto a copy of a base: an adapter with random numbers, or a fresh one."""
        dtype = base.dtype if base.dtype == torch.float64 else torch.float32
        door = cls(base, **{"rank": 2, "alpha": ALPHA, "dtype": dtype, **options})
        door.add("one", None if fresh else seed)
        return door

    @classmethod
    def load(cls, base, folder):
        """Onto a copy of a base: the adapter of a folder."""
        raise NotImplementedError

    def drawn(self, seed):
        """An adapter of these numbers on no model, or a fresh one."""
        return drawn(self.plain, seed, **self.options)

    @property
    def record(self):
        return self.records["one"]

    def factors(self):
        """The parameters of the adapter by name, trained or frozen."""
        return dict(self.record.networks.named_parameters())

    def perturb(self, seed):
        """Give the adapter other numbers."""
        fill(self.record, self.drawn(seed))

    def forward(self, inputs):
        return self.model(**inputs)[0]

    def weights(self):
        """The weights of the base, as they are now, by their names in the bare model."""
        return {name: self.weight(name) for name, _ in self.plain.named_parameters()}

    def weight(self, name):
        path, _, own = name.rpartition(".")
        return self.model.get_submodule(path)._parameters[own]


def start_of(seed):
    """Options of `put`: no seed stands for a fresh adapter."""
    return {"init": "invariant"} if seed is None else {"seed": seed}


@cache
def drawn(base, seed, **options):
    """An adapter of these numbers on no model, not to be changed."""
    adapter = put(copy.deepcopy(base), **options, **start_of(seed))
    adapter.remove()
    return adapter


def fill(adapter, source):
    """Copy the numbers of an adapter's networks."""
    pairs = zip(adapter.networks.parameters(), source.networks.parameters(), strict=True)
    with torch.no_grad():
        for own, given in pairs:
            own.copy_(given)


class ByApply(Door):
    """`lortalib.nn.apply`: hooks."""

    lacks = {"rows": "its hooks give all rows one update; banks have hooks for rows"}

    def add(self, name, seed):
        self.records[name] = put(self.model, name=name, **self.options, **start_of(seed))

    @classmethod
    def load(cls, base, folder):
        door = cls(base)
        door.records["one"] = lortalib.nn.load(door.model, folder)
        return door

    def off(self):
        return self.record.disabled()

    def delta(self, site):
        return self.record.delta(site)

    def save(self, folder):
        self.record.save(folder)

    def export_lora(self, folder):
        self.record.export_lora(folder)

    def merge(self):
        self.record.merge()

    def unmerge(self):
        self.record.unmerge()

    def remove(self):
        for record in self.records.values():
            record.remove()
        return self.model


class ByPeft(Door):
    """`lortalib.peft.LortaConfig`: PEFT's own layers and verbs."""

    lacks = {
        "experts": "PEFT reaches packed experts by target_parameters, which LortaConfig refuses",
        "names": "PEFT's layers wrap the modules of the base",
    }

    def add(self, name, seed):
        drawn = self.drawn(seed)
        config = LortaConfig(
            rank=self.options["rank"],
            decomposition=self.options["decomposition"],
            alpha=self.options["alpha"],
            gqa=self.options.get("gqa", "pool"),
            acts_on=self.options.get("acts_on", "weights"),
            target_modules=sorted({site.path for site in drawn.sites}),
        )
        widened = self.options["dtype"] != torch.float64
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ranks larger than the modes can fill")
            if self.records:
                self.model.add_adapter(name, config, autocast_adapter_dtype=widened)
            else:
                self.model = peft.get_peft_model(
                    self.model, config, adapter_name=name, autocast_adapter_dtype=widened
                )
        self.model.eval()
        self.records[name] = self.model.base_model.lorta_adapters[name]
        if seed is not None:
            fill(self.records[name], drawn)

    @classmethod
    def load(cls, base, folder):
        door = cls(base)
        door.model = peft.PeftModel.from_pretrained(
            door.model, folder / "one", adapter_name="one", autocast_adapter_dtype=False
        ).eval()
        door.records["one"] = door.model.base_model.lorta_adapters["one"]
        return door

    def rows(self, inputs, names):
        return self.model(**inputs, adapter_names=[name or "__base__" for name in names])[0]

    def weight(self, name):
        path, _, own = name.rpartition(".")
        module = self.model.get_base_model().get_submodule(path)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        return module._parameters[own]

    def off(self):
        return self.model.disable_adapter()

    def delta(self, site):
        return self.record.delta(site)

    def save(self, folder):
        self.model.save_pretrained(folder)

    def export_lora(self, folder):
        lortalib.nn.export_lora(self.record, folder, self.plain)

    def merge(self):
        self.model.merge_adapter()

    def unmerge(self):
        self.model.unmerge_adapter()

    def remove(self):
        return self.model.unload()


class ByBank(Door):
    """`lortalib.nn.bank`: every row of a batch names an adapter that the bank holds."""

    lacks = {
        "experts": "packed experts do not see the rows of a batch",
        "gradients": "a bank holds numbers to serve, not parameters to train",
        "delta": "a bank gives out numbers, not updates",
        "merge": "all rows of a batch share one weight",
        "save": "a bank reads the folders of adapters and writes none",
        "export_lora": "a bank reads the folders of adapters and writes none",
    }

    def __init__(self, base, **options):
        super().__init__(base, **options)
        self.bank = lortalib.nn.bank(self.model, capacity=1, **options)
        self.name = "one"

    def add(self, name, seed):
        self.records[name] = self.bank[name] = self.drawn(seed)

    def perturb(self, seed):
        self.add("one", seed)

    def forward(self, inputs):
        return self.rows(inputs, [self.name] * len(next(iter(inputs.values()))))

    def rows(self, inputs, names):
        with self.bank.using(names):
            return self.model(**inputs)[0]

    @contextmanager
    def off(self):
        self.name = None
        yield
        self.name = "one"

    def remove(self):
        self.bank.remove()
        return self.model


class BySharedBank(ByBank):
    """`lortalib.nn.bank` whose adapters share their wide sides. The forward uses tensors that are not in the
    bank, as for training; rows use those that are."""

    lacks = {
        **{verb: reason for verb, reason in ByBank.lacks.items() if verb != "gradients"},
        "uni_lora": "all its parameters are hashed from one vector, so nothing is an adapter's own",
    }

    def __init__(self, base, **options):
        Door.__init__(self, base, **options)
        # The wide side of a LoRA is all of A or B, and an adapter keeps one of them.
        line = options["decomposition"]
        sides = ("in",) if line == "lora" else ("in.1",) if "(full)" in line else ("in", "out")
        self.bank = lortalib.nn.bank(self.model, capacity=1, shared=sides, **options)
        self.name = "one"

    def add(self, name, seed):
        record = self.drawn(seed).snapshot()
        if not len(self.bank):
            self.bank[name] = record  # which gives the bank its shared parameters
        for name_, _, shared in self.divided(record):
            for k in shared:
                parameter = self.bank.shared[name_][shared.index(k)]
                network = record.networks[name_]
                network.register_parameter(network.names[k], parameter)
                parameter.requires_grad_(not network.legs.terms[k].frozen)
        self.records[name] = self.bank[name] = record

    def divided(self, record):
        """Of each network of an adapter, the positions of its own parameters and of the shared ones."""
        marks = {name: [t.shared for t in legs.terms] for name, legs in self.legs().items()}
        for name in record.networks:
            yield name, *([k for k, m in enumerate(marks[name]) if m == s] for s in (False, True))

    def legs(self):
        return self.bank.legs

    def forward(self, inputs):
        if self.name is None:
            return super().forward(inputs)
        tensors = {
            name: [self.record.networks[name].stored[k].unsqueeze(0) for k in own]
            for name, own, _ in self.divided(self.record)
        }
        with self.bank.using_tensors(tensors):
            return self.model(**inputs)[0]


DOORS = {"nn.apply": ByApply, "peft": ByPeft, "bank": ByBank, "shared bank": BySharedBank}

#: Verbs that a family does not have behind any door, with the reason.
FAMILY_LACKS = {"experts": {"export_lora": "PEFT's LoRA of packed experts is of other shapes"}}

#: Formats of tensors that act on the residual stream, among those that act on the weights.
ON_STREAM = ["cp on stream", "indscal on stream"]

#: Verbs that such a format does not have, with the reason.
STREAM_LACKS = {
    "heads": "the far side of the update is the weight's own, so heads have no part in it"
}

#: Lines with split modes, which laws are tested on beside the registered formats. The widths of the tiny
#: models are too small for a registered format to split them.
SPLIT = {
    "folded": "layer in.1 a, in.2 a b, matrix head b c, matrix out.1 c d, out.2 d",
    "kronecker": "layer in.1 out.1 r (full), matrix in.2 head out.2 r (full)",
}

#: Of the cases of a law, one in so many is tested at once; the others are marked slow.
ONE_IN = 5


@cache
def base(family, dtype=torch.float64):
    """The tiny model of a family, not to be changed; frozen, as it is where it has an adapter."""
    model = LAW_FAMILIES[family].model().to(dtype).requires_grad_(False)
    if family == "experts":
        model.set_experts_implementation("eager")  # the others do not compute in float64
    return model


def inputs_of(family):
    return LAW_FAMILIES[family].inputs()


def targets_of(door, family):
    """What can be adapted of a family through a door, as `lortalib.nn.apply` names it."""
    if family == "experts":
        return ["all", "mlp", "qkvo"]
    if door == "peft" and family.startswith("fused"):
        return ["qkvo", "all", "o"]  # PEFT names modules: of a fused one there are no parts
    return ["qkvo", "all", "qk", "kv", "v", "ko"]


def formats_of(family):
    """The formats that a family can have: with a mode for experts where there are some."""
    modes = {"layer", "head", "matrix"} | ({"expert"} if family == "experts" else set())
    found = [name for name in FORMATS if any(modes <= {*found} for found in mode_sets(name))]
    return [*found, *(SPLIT if family != "experts" else ()), *ON_STREAM]


def cases(*verbs):
    """Every door, format and family that has these verbs."""
    return [
        (door, decomposition, family)
        for door in DOORS
        for family in LAW_FAMILIES
        if not DOORS[door].lacks.keys() & {family, *verbs}
        if not FAMILY_LACKS.get(family, {}).keys() & {*verbs}
        for decomposition in formats_of(family)
        if decomposition not in DOORS[door].lacks
        if not (decomposition in ON_STREAM and STREAM_LACKS.keys() & {*verbs})
    ]


def over(*verbs):
    """Parametrises a law over every door, format and family that has these verbs; see `adapt`.

    Each law has another part of them tested at once, in which every door meets every format once.
    """

    def mark(law):
        turn = zlib.crc32(law.__name__.encode())
        number = {name: k for k, name in enumerate([*FORMATS, *ON_STREAM, *LAW_FAMILIES, *SPLIT])}
        found = []
        for case in cases(*verbs):
            slow = sum(number.get(name, 0) for name in case) % ONE_IN != turn % ONE_IN
            marks = [pytest.mark.slow] if slow else []
            found.append(pytest.param(*case, id="-".join(case), marks=marks))
        return pytest.mark.parametrize(("door", "decomposition", "family"), found)(law)

    return mark


def adapt(door, decomposition, family, *, dtype=torch.float64, **options):
    """The adapted model of a case.

    Args:
        dtype: that of the base.
        options: those of `lortalib.nn.apply`; ``fresh=True`` for an adapter that nobody trained.
    """
    options = {"targets": targets_of(door, family)[0], **options}
    if decomposition in ON_STREAM:
        decomposition, options["acts_on"] = decomposition.split(" on ")
        if family.startswith("fused") and options["targets"] not in ("all", "o"):
            options["targets"] = "qkvo"  # a module has one input, whatever its parts
    decomposition = SPLIT.get(decomposition, decomposition)
    return DOORS[door].on(base(family, dtype), decomposition=decomposition, **options)
