"""Hypothesis strategies: small shapes, ranks and networks of every registered format.

All networks are float64 and made by a seeded generator. `KINDS` names what `networks` can draw:
each format of the registry, so that a new format is tested by joining, ``"random"``, legal lines of
legs that no format has, and ``"split"``, the same with modes that are split into factors. Formats whose
line depends on the modes are drawn with split modes too.
"""

import math
import warnings
from functools import lru_cache
from itertools import combinations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from lortalib.decomp import LORTA_MODES, MODES, Legs, LegsError, Network, Shape, formats

FORMATS = sorted(formats)
KINDS = [*FORMATS, "random", "split"]

_INNER = tuple(mode for mode in MODES if mode not in ("in", "out"))
_BONDS = ("r", "p", "q1", "Z_", "train", "dense", "names", "tensors", "in_")


def examples(number):
    """Settings for a property test: so many examples, no deadline."""
    return settings(max_examples=number, deadline=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


seeds = st.integers(0, 2**31)


@lru_cache
def mode_sets(name):
    """Every set of modes that a format can be made over, found by asking it."""
    found = []
    for number in range(len(_INNER) + 1):
        for inner in combinations(_INNER, number):
            shape = Shape(dict.fromkeys((*inner, "in", "out"), 2))
            try:
                formats[name].legs(shape).check(shape.modes)
            except LegsError:
                continue
            found.append(shape.modes)
    return found


def usual_modes(name):
    """The modes of T, and those that a format needs beside them."""
    return max(mode_sets(name), key=lambda modes: (len({*modes} & {*LORTA_MODES}), -len(modes)))


@st.composite
def sized(draw, names, most, budget):
    """Sizes for ``names``, each at most ``most(name)``, their product at most ``budget``."""
    sizes = {}
    for name in draw(st.permutations(list(names))):
        sizes[name] = draw(st.integers(1, max(1, min(most(name), budget))))
        budget //= sizes[name]
    return sizes


def shapes(modes):
    """Shapes over these modes, in any order: up to 6 for in and out, up to 4 for the others."""
    most = {"in": 6, "out": 6}
    return sized(modes, lambda mode: most.get(mode, 4), 600).map(Shape)


def ranks(bonds):
    """One integer, or a mapping from bonds to integers."""
    largest = min(4, int(200 ** (1 / max(1, len(bonds))) + 1e-9))
    return st.integers(1, largest) | sized(bonds, lambda _: 4, 200)


def ranks_of(name, shape):
    """Ranks of a format; one integer where one parameter has two of its bonds. The vector of hashed
    parameters has a number of its own, or what one integer gives."""
    if formats[name].symmetric:
        return st.integers(1, 4)
    legs = formats[name].legs(shape)
    bonds = legs.bonds(shape.modes)
    if not legs.vectors:
        return ranks(bonds)
    numbers = st.fixed_dictionaries(dict.fromkeys(legs.vectors, st.integers(2, 12)))
    every = ranks(bonds).map(lambda r: r if isinstance(r, dict) else dict.fromkeys(bonds, r))
    return ranks(bonds) | st.builds(lambda r, n: {**r, **n}, every, numbers)


def build(name, shape, rank, **options):
    """A registered format over a shape; ranks that are cut are no concern here."""
    options = {"init": "normal", "dtype": torch.float64, "generator": generator(), **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ranks larger than the modes can fill")
        return formats[name](shape, rank, **options)


def small(name, rank=2, **options):
    """A network of a registered format over its usual modes, in fixed sizes."""
    sizes = {"layer": 2, "head": 2, "matrix": 3, "in": 4, "out": 3}
    shape = Shape({mode: sizes.get(mode, 2) for mode in usual_modes(name)})
    return build(name, fitting(name, shape), rank, **options)


def fitting(name, shape):
    """The shape, with ``out`` as large as ``in`` where one parameter of the format serves both."""
    return Shape({**shape, "out": shape["in"]}) if formats[name].symmetric else shape


def registered_shapes(name):
    drawn = st.sampled_from(mode_sets(name)).flatmap(shapes)
    drawn = drawn.map(lambda shape: fitting(name, shape))
    splits = callable(formats[name].line) and not formats[name].symmetric
    return drawn.flatmap(split_shapes) if splits else drawn


def factorings(size, most=3):
    """Every way to write a size as an ordered product of up to so many factors, of which one may be 1."""
    found = [(size,)]
    if most > 1:
        for first in range(1 if most == 3 else 2, size + 1):
            if size % first == 0:
                found += [(first, *rest) for rest in factorings(size // first, most - 1)]
    return found


@st.composite
def split_shapes(draw, shape):
    """The shape with some of its modes split."""
    split = draw(st.sets(st.sampled_from(list(shape)), max_size=3))
    return Shape({**shape, **{m: draw(st.sampled_from(factorings(shape[m]))) for m in split}})


@st.composite
def registered(draw, name, **options):
    """A network of this format, with any modes that the format allows."""
    shape = draw(registered_shapes(name))
    rank = draw(ranks_of(name, shape))
    return build(name, shape, rank, generator=generator(draw(seeds)), **options)


@st.composite
def lines(draw, split=False):
    """A legal line of legs and its modes: any bonds and modes over up to four parameters.

    ``in`` stands on one parameter, every other mode on one or two, every bond on two or more. So do the
    factors of a mode that is split.
    """
    modes = ["in", "out", *draw(st.lists(st.sampled_from(_INNER), unique=True, max_size=3))]
    number = draw(st.integers(1, 4))
    terms = [[] for _ in range(number)]

    def place(leg, least, most):
        at = st.lists(st.integers(0, number - 1), min_size=least, max_size=most, unique=True)
        for position in draw(at):
            terms[position].append(leg)

    for mode in modes:
        factors = draw(st.integers(0, 3)) if split else 0
        for leg in [f"{mode}.{k + 1}" for k in range(factors)] or [mode]:
            place(leg, 1, 1 if mode == "in" else min(2, number))
    if number > 1:
        for bond in draw(st.lists(st.sampled_from(_BONDS), unique=True, max_size=4)):
            place(bond, 2, 3)
        empty = [term for term in terms if not term]
        for term in empty:
            term.append("extra")
        if len(empty) == 1:
            next(term for term in terms if term is not empty[0]).append("extra")
    texts = [" ".join(draw(st.permutations(term))) for term in terms]
    frozen = draw(st.sets(st.integers(0, number - 1), max_size=number - 1))
    texts = [text + " (frozen)" * (k in frozen) for k, text in enumerate(texts)]
    return ", ".join(texts), tuple(draw(st.permutations(modes)))


def network_of(line, modes, sizes, seed):
    """The network of a line with normal entries."""
    legs, source = Legs.parse(line), generator(seed)
    dims = [[sizes[leg] for leg in term.legs] for term in legs.terms]
    tensors = [torch.randn(size, generator=source, dtype=torch.float64) for size in dims]
    return Network(legs, tensors, modes)


@st.composite
def random_networks(draw, split=False):
    """A network of a legal line, of any sizes."""
    line, modes = draw(lines(split))
    legs = Legs.parse(line)
    sizes = {**draw(shapes(legs.open_legs(modes)))} | draw(
        sized(legs.bonds(modes), lambda _: 4, 200)
    )
    return network_of(line, modes, sizes, draw(seeds))


def networks(kind):
    """Networks of one of `KINDS`."""
    return registered(kind) if kind in formats else random_networks(split=kind == "split")


def indices(net, modes):
    """A position for each of these modes, counted from either end."""
    return st.fixed_dictionaries(
        {mode: st.integers(-net.shape[mode], net.shape[mode] - 1) for mode in modes}
    )


@st.composite
def selections(draw, net, keep=()):
    """Positions for some of the modes that are not in ``keep``."""
    free = [mode for mode in net.modes if mode not in keep]
    chosen = draw(st.lists(st.sampled_from(free), unique=True)) if free else []
    return draw(indices(net, chosen))


def slices(net):
    """Positions for every mode but in, head and out, after which a network can be cut."""
    return indices(net, [mode for mode in net.modes if mode not in ("in", "head", "out")])


def numel(net):
    """How many products the definition of the dense tensor adds up."""
    return math.prod(net.sizes.values())
