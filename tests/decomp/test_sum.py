"""Sums of networks: exact, with the ranks added up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, build, examples, generator, ranks_of, registered_shapes, seeds, small

from lortalib.decomp import Legs, Network, direct_sum, formats

FORMATS = [kind for kind in KINDS if kind in formats]
WEIGHTS = st.lists(st.floats(-3, 3, allow_nan=False), min_size=1, max_size=3)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@examples(15)
def test_the_sum_is_the_sum(name, data):
    shape = data.draw(registered_shapes(name))
    bonds = formats[name].legs(shape).bonds(shape.modes)
    weights = data.draw(WEIGHTS)
    parts = [
        build(name, shape, data.draw(ranks_of(name, shape)), generator=generator(data.draw(seeds)))
        for _ in weights
    ]
    if len(parts) > 1 and not bonds:
        return
    total = direct_sum(parts, weights)
    expected = sum(w * part.dense() for w, part in zip(weights, parts))
    scale = max(1.0, *(part.dense().abs().max().item() for part in parts))
    assert (total.dense() - expected).abs().max() <= 1e-10 * scale
    assert total.ranks == {b: sum(part.ranks[b] for part in parts) for b in total.ranks}
    assert str(total.legs) == str(parts[0].legs.unhashed)


def test_the_summands_are_left_alone():
    one = small("cp")
    before = [tensor.detach().clone() for tensor in one.tensors]
    total = direct_sum([one, one], [2.0, -1.0])
    with torch.no_grad():
        for tensor in total.tensors:
            tensor.zero_()
    assert all(map(torch.equal, before, one.tensors))


def test_frozen_parameters_stay_frozen_and_keep_their_numbers():
    one, two = small("vera"), small("vera", generator=generator(1))
    total = direct_sum([one, two], [3.0, 0.5])
    frozen = [term.frozen for term in total.legs.terms]
    assert frozen == [not p.requires_grad for p in total.tensors]
    at = frozen.index(True)
    axis = total.legs.terms[at].legs.index("r")
    assert torch.equal(total.tensors[at].narrow(axis, 0, 2), one.tensors[at])


def test_what_cannot_be_added_is_refused():
    cp, tucker = small("cp"), small("tucker")
    with pytest.raises(ValueError, match="at least one"):
        direct_sum([])
    with pytest.raises(ValueError, match="2 networks and 1 weights"):
        direct_sum([cp, cp], [1.0])
    with pytest.raises(ValueError, match="same legs and shape"):
        direct_sum([cp, tucker])


@pytest.mark.parametrize(
    "line",
    [
        "in, out",
        "layer, in r, out r",
        "in r, layer, out r",
        "in r, out r, layer",
        "layer in, layer out",
    ],
)
def test_pieces_without_a_common_bond_cannot_be_added(line):
    legs = Legs.parse(line)
    sizes = {"in": 3, "out": 4, "layer": 2, "r": 2}
    tensors = [torch.ones([sizes[leg] for leg in term.legs]) for term in legs.terms]
    pieces = Network(legs, tensors, [leg for leg in legs.carriers if leg != "r"])
    with pytest.raises(ValueError, match="falls apart"):
        direct_sum([pieces, pieces])
