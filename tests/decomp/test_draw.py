"""Drawings show every parameter, mode and bond of a network, whatever its line."""

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, examples, networks

from lortalib import decomp

SVG = "{http://www.w3.org/2000/svg}"
SHAPE = {"layer": 3, "head": 2, "matrix": 4, "in": 8, "out": 8}


def elements(drawing, tag):
    return list(ElementTree.fromstring(drawing.svg).iter(SVG + tag))


def number(element, name):
    return float(element.get(name))


def check(net):
    drawing = decomp.draw(net)
    terms = net.legs.terms
    boxes = elements(drawing, "rect")
    assert len(boxes) == len(terms)
    words = [e.text for e in elements(drawing, "text") if "legs-word" not in e.get("class")]
    modes = [leg for term in terms for leg in term.legs if leg in net.open_legs]
    assert sorted(words) == sorted([*modes, *net.ranks])
    # No two boxes overlap, and all lie within the picture.
    width, height = map(float, elements(drawing, "svg")[0].get("viewBox").split()[2:])
    spans = [[number(b, n) for n in ("x", "y", "width", "height")] for b in boxes]
    for k, (x, y, w, h) in enumerate(spans):
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        for x2, y2, w2, h2 in spans[:k]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    _, names, *bonds = drawing.text.splitlines()
    assert names.split() == [net.names[owner] for owner in net.legs.owners]
    assert len(bonds) == len(net.ranks)
    for row, (bond, size) in zip(bonds, net.ranks.items()):
        assert row.endswith(f" {bond} {size}")
        assert row.count("*") == sum(bond in term.legs for term in terms)


@pytest.mark.parametrize("kind", KINDS)
@examples(10)
@given(data=st.data())
def test_every_format_and_any_line(kind, data):
    check(data.draw(networks(kind)))


def test_sides_of_the_cut_zero_and_frozen_parameters_are_marked():
    net = decomp.network("in p (frozen), head out q (zero), layer matrix p q", SHAPE, 2)
    drawing = decomp.draw(net)
    kinds = [e.get("class").split() for e in elements(drawing, "rect")]
    assert kinds[0] == ["legs-box", "legs-near", "legs-frozen"]
    assert kinds[1] == ["legs-box", "legs-far"]
    words = [e.text for e in elements(drawing, "text") if e.get("class") == "legs-word"]
    assert words == ["frozen", "0"]


def test_without_in_and_out_no_side_is_marked():
    net = decomp.network("a r, b r", {"a": 3, "b": 4}, 2)
    assert {e.get("class") for e in elements(decomp.draw(net), "rect")} == {"legs-box"}


def test_a_network_without_modes():
    net = decomp.network("in r, out r", {"in": 4, "out": 3}, 2).select({"in": 0}, out=1)
    check(net)
