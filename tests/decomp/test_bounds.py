"""Lines of strangers: bounds, and time that grows no faster than a line does."""

import math
import time

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FORMATS, examples, mode_sets

from lortalib.decomp import Legs, LegsError, Network, Term, formats, get_format, network
from lortalib.decomp._cut import cheapest_cut
from lortalib.decomp._min_cut import exact_logarithms

SHAPE = {"in": 3, "out": 4}


def seconds(call):
    begin = time.process_time()
    call()
    return time.process_time() - begin


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "(" + " " * 3000,
        "in r, (" + " " * 9000 + ", out r",
        "( " * 4999,
        "(" * 9999,
        "in r (" + "a" * 9000,
        "in r " + "(zero)" * 1500 + " x",
        " ".join(f"a{k}" for k in range(1600)),
        ", ".join(["r"] * 3000),
        ",".join(f"b{k}" for k in range(1500)),
        "r" * 9999,
        "in " + "r" * 4000 + ", out " + "r" * 4000,
        "(" + " " * 10**7,
        "r" * 10**7,
        ", ".join(["r"] * 10**6),
    ],
    ids=lambda line: f"{line[:12]}-{len(line)}",
)
def test_a_hostile_line_is_refused_at_once(line):
    def read():
        with pytest.raises(LegsError):
            Legs.parse(line)
        with pytest.raises((LegsError, ValueError)) as caught:
            get_format(line)
        assert len(str(caught.value)) < 40_000

    assert seconds(read) < 0.5


def names(number, letters=1):
    return [f"b{k}".ljust(letters, "_") for k in range(number)]


def chain(bonds):
    """A line of a train with so many bonds."""
    left, right = ["in", *bonds], [*bonds, "out"]
    return ", ".join(f"{one} {other}" for one, other in zip(left, right))


@pytest.mark.parametrize(
    ("most", "beyond", "says"),
    [
        (chain(names(50)), chain(names(51)), "at most 52 different legs, .* einsum; found 53"),
        (
            "in r, out r" + ", r" * 62,
            "in r, out r" + ", r" * 63,
            "at most 64 parameters; found 65",
        ),
        (
            chain(names(1, 100)),
            chain(names(1, 101)),
            "has at most 100 characters; found 'b0_.*'... of 101 characters",
        ),
        (
            "in r, out r" + " " * 9989,
            "in r, out r" + " " * 9990,
            r"at most 10,000 characters; found 10,001, which begin 'in r, out r",
        ),
    ],
)
def test_bounds_are_what_is_said(most, beyond, says):
    net = network(most, SHAPE, 1, init="normal")
    a, b = net.cut()
    torch.testing.assert_close((b @ a).mT, net.dense())
    with pytest.raises(LegsError, match=says):
        Legs.parse(beyond)
    with pytest.raises(LegsError, match=says):
        network(beyond, SHAPE, 1)


def test_bounds_hold_for_networks_without_a_line():
    terms = tuple(Term((leg,)) for leg in ["in", "out", *names(60), *names(60)])
    with pytest.raises(LegsError, match="at most 64 parameters; found 122"):
        Network(Legs(terms), [torch.ones(2)] * len(terms), ["in", "out"])
    full = network(chain(names(50)), SHAPE, 1)
    with pytest.raises(LegsError, match=r"at most 52 different legs, .*; found 53"):
        full.mode_dot(torch.ones(2, 3), "in")
    with pytest.raises(LegsError, match=r"at most 52 different legs, .*; found 60"):
        network(chain(names(58)), SHAPE, 1)


def test_many_modes_are_named_in_linear_time():
    modes = {f"m{k}": 1 for k in range(20_000)}

    def refuse():
        with pytest.raises(LegsError, match="it names a mode"):
            network("in r, out r, mm r", modes, 1)

    assert seconds(refuse) < 0.5
    with pytest.raises(LegsError, match="did you mean 'layer'"):
        network("in r, out r, layr", {**SHAPE, "x" * 10**6: 2, "layer": 2}, 1)


def test_an_unknown_format_of_many_letters_is_shortened():
    with pytest.raises(
        ValueError, match=r"decomposition 'lotrlotr.*'... of 4,000,000 characters; the"
    ) as caught:
        get_format("lotr" * 10**6)
    assert len(str(caught.value)) < 1000


def test_equal_parameters_get_names_in_linear_time():
    class Many(Network):
        def __init__(self, number):
            torch.nn.Module.__init__(self)
            self.legs, self.names = Legs((Term(("r",)),) * number), ()

    made = Many(2000)
    assert seconds(made._parameter_names) < 0.5
    assert made._parameter_names() == ["r" + "_" * k for k in range(2000)]
    legs = "in r, r, r_, r, r_, out r r_"
    tensors = [torch.ones([2] * len(term.split())) for term in legs.split(", ")]
    found = Network(legs, tensors, ["in", "out"]).names
    assert found == ("in_r", "r", "r_", "r__", "r___", "out_r_r_")


# --- the cheapest cut -----------------------------------------------------------------------------


@st.composite
def divisible(draw):
    """Any parameters with in and out, of few sizes, so that products are often equal."""
    number = draw(st.integers(2, 7))
    terms = [[] for _ in range(number)]
    place = st.integers(0, number - 1)
    for leg in ("in", "out"):
        terms[draw(place)].append(leg)
    for leg in ("head", "layer", *"abcdefgh"[: draw(st.integers(0, 8))]):
        for k in draw(st.sets(place, max_size=4)):
            terms[k].append(leg)
    sizes = {leg: draw(st.sampled_from([1, 1, 2, 3, 4, 6, 8, 12])) for leg in "abcdefgh"}
    terms = tuple(tuple(draw(st.permutations(term))) for term in terms)
    return terms, {**sizes, "in": 5, "out": 4, "head": 3, "layer": 2}


@examples(500)
@given(divisible())
def test_the_cut_is_the_one_that_trying_all_divisions_finds(case):
    terms, sizes = case
    asked = ("head", "out"), ("layer",)
    found = cheapest_cut(terms, tuple(sizes.items()), *asked)
    assert tuple(found) == reference.cheapest_division(terms, sizes, *asked)


@pytest.mark.parametrize("name", FORMATS)
@examples(10)
@given(data=st.data())
def test_the_cut_of_a_format_is_the_one_of_all_divisions(name, data):
    modes = data.draw(st.sampled_from(mode_sets(name)))
    legs = formats[name].legs(dict.fromkeys(modes, 2))
    sizes = {leg: data.draw(st.sampled_from([1, 2, 3, 4, 8])) for leg in legs.carriers}
    terms = tuple(term.legs for term in legs.terms)
    batch = tuple(mode for mode in modes if mode not in ("in", "head", "out"))
    asked = tuple(mode for mode in ("head", "out") if mode in modes), batch
    found = cheapest_cut(terms, tuple(sizes.items()), *asked)
    assert tuple(found) == reference.cheapest_division(terms, sizes, *asked)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("pairs", [22, 30])
def test_pairs_of_parameters_are_cut_at_once(pairs, size):
    line = ", ".join(["in p, out p", *(f"{name}, {name}" for name in names(pairs))])
    tensors = [torch.ones(3, 2), torch.ones(4, 2), *[torch.ones(size)] * (2 * pairs)]
    net = Network(line, tensors, ["in", "out"])
    assert (
        seconds(net.cut_plan) < 0.5
    )  # a few hundredths of a second; the other machine may be slow
    a, b = net.cut()
    assert a.shape == (2, 3)
    torch.testing.assert_close((b @ a), torch.full((4, 3), 2.0 * size**pairs))


def test_a_network_as_large_as_one_can_be_is_cut_at_once():
    random = torch.Generator().manual_seed(0)
    terms = [["in"], ["out"], *([] for _ in range(62))]
    sizes = {"in": 4, "out": 4}
    for bond in names(50):
        sizes[bond] = int(torch.randint(1, 10**9, (), generator=random))
        for k in torch.randperm(64, generator=random)[: 2 + len(sizes) % 5].tolist():
            terms[k].append(bond)
    terms = tuple(map(tuple, terms))
    assert seconds(lambda: cheapest_cut(terms, tuple(sizes.items()), ("out",), ())) < 1


@examples(200)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.data())
def test_sums_of_logarithms_compare_as_products(numbers, data):
    log = exact_logarithms(numbers)
    sides = [data.draw(st.lists(st.sampled_from(numbers), unique=True)) for _ in range(2)]
    one, other = (math.prod(side) for side in sides)
    low, high = (sum(log[n] for n in side) for side in sides)
    assert (one < other, one == other) == (low < high, low == high)


def test_neighbouring_products_are_told_apart():
    large = 10**40
    log = exact_logarithms([large - 1, large, large + 1])
    assert log[large - 1] < log[large] < log[large + 1]
    assert log[large - 1] + log[large + 1] < 2 * log[large]
