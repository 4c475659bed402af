"""The notation: reading, printing, and errors that point at the leg."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, lines

from lortalib.decomp import Legs, LegsError, Network, network

SHAPE = {"layer": 2, "in": 3, "out": 4}


def raised_at(call, line, column, length=1):
    """The message of the error that ``call`` raises; it must repeat the line, and point there."""
    with pytest.raises(LegsError) as caught:
        call()
    message, shown, caret = str(caught.value).rsplit("\n", 2)
    assert shown == "    " + line
    assert caret == "    " + " " * column + "^" * length
    return message


def raised_in(call, line):
    """The message of an error about the line as a whole, which it must repeat at its end."""
    with pytest.raises(LegsError) as caught:
        call()
    message, shown = str(caught.value).rsplit("\n", 1)
    assert shown == "    " + line
    return message


# --- read and print -------------------------------------------------------------------------------

gaps = st.sampled_from([" ", "  ", "   "])


@st.composite
def texts(draw):
    """A legal line with marks, written with any spacing, and what it says."""
    line, modes = draw(lines())
    terms, said = [], []
    zero = draw(st.integers(-1, 3))
    for k, text in enumerate(line.split(",")):
        legs = text.replace("(frozen)", "").split()
        marks = (["frozen"] if "(frozen)" in text else []) + (["zero"] if k == zero else [])
        marks = draw(st.permutations(marks))
        written = [
            f"({draw(gaps)}{mark} )" if draw(st.booleans()) else f"({mark})" for mark in marks
        ]
        terms.append(draw(gaps).join([*legs, *written]) + draw(st.sampled_from(["", " "])))
        said.append((tuple(legs), "frozen" in marks, "zero" in marks))
    return draw(st.sampled_from([",", ", ", " ,  "])).join(terms), said, modes


@examples(200)
@given(texts())
def test_parse_reads_legs_and_marks_and_print_is_read_again(case):
    line, said, modes = case
    legs = Legs.parse(line)
    assert [(term.legs, term.frozen, term.zero) for term in legs.terms] == said
    again = Legs.parse(str(legs))
    assert again == legs
    assert hash(again) == hash(legs)
    assert str(again) == str(legs)
    named = [leg for names, _, _ in said for leg in names]
    assert legs.bonds(modes) == tuple(dict.fromkeys(leg for leg in named if leg not in modes))


def test_print_has_one_form():
    assert str(Legs.parse(" in  r (zero)( frozen ) ,out r")) == "in r (frozen) (zero), out r"


@examples(60)
@given(lines())
def test_a_legal_line_is_accepted(case):
    line, modes = case
    Legs.parse(line).check(modes)
    assert network(line, dict.fromkeys(modes, 1), 1).modes == modes


@pytest.mark.parametrize(
    ("line", "at", "says"),
    [
        ("in r,, out r", 5, "a parameter without legs"),
        (", in r, out r", 0, "a parameter without legs"),
        ("in r, out r,", 12, "a parameter without legs"),
        ("in r, (frozen), out r", 14, "a parameter without legs"),
        ("in r, out  r r", 13, "leg 'r' stands twice on one parameter"),
        ("layer in layer r, out r", 9, "leg 'layer' stands twice on one parameter"),
        ("in r (frosen), out r", 5, r"unknown mark (frosen); .* (frozen) or (zero)"),
        ("in r (), out r", 5, "unknown mark ()"),
        ("in r, (frozen) out r", 15, "'out' is a leg behind a mark"),
        ("in r, out (zero) r", 17, "'r' is a leg behind a mark"),
        ("in r, out-side r", 6, "'out-side' is no leg name"),
        ("in 2r, out r", 3, "'2r' is no leg name"),
        ("in r; out r", 3, "'r;' is no leg name"),
        ("in r (frozen, out r", 5, "'(' is no leg name"),
        ("in r frozen), out r", 11, "')' is no leg name"),
    ],
)
def test_an_unreadable_line_is_shown_with_the_place(line, at, says):
    found = re.match(r"\([^()]*\)|[^\s,()]+|.|\Z", line[at:])
    length = max(1, len(found[0]))
    message = raised_at(lambda: Legs.parse(line), line, at, length)
    pattern = ".*".join(re.escape(part) for part in says.split(".*"))
    assert re.search(pattern, message)


@examples(60)
@given(texts(), st.data())
def test_a_leg_that_joins_nothing_is_pointed_at(case, data):
    line, _, modes = case
    starts = [m.start() for m in re.finditer(r"(?:(?<=^)|(?<=,))\s*(?=\w)", line)]
    at = data.draw(st.sampled_from(starts))
    broken = f"{line[:at]} lonely {line[at:]}"
    shape = dict.fromkeys(modes, 2)
    message = raised_at(lambda: network(broken, shape, 1), broken, at + 1, len("lonely"))
    assert "unknown leg 'lonely'" in message
    assert ", ".join(modes) in message


# --- the line against the shape -------------------------------------------------------------------


def test_unknown_leg_has_a_hint():
    line = "in r, out r, layr r"
    message = raised_at(lambda: network(line, SHAPE, 2), line, line.index("layr"), 4)
    assert "unknown leg 'layr' (did you mean 'layer'?)" in message
    assert "(layer, in, out)" in message


def test_bond_on_one_parameter():
    line = "in r, out  r zz, layer r"
    message = raised_at(lambda: network(line, SHAPE, 2), line, line.index("zz"), 2)
    assert "unknown leg 'zz': " in message
    assert "as a bond it needs a second parameter" in message


@pytest.mark.parametrize("mode", ["head", "task", "expert", "matrix"])
def test_reserved_mode_that_the_shape_has_not(mode):
    line = f"in r, layer r, {mode} r, {mode} out r"
    message = raised_at(lambda: network(line, SHAPE, 2), line, line.index(mode), len(mode))
    assert f"unknown leg {mode!r}: it names a mode" in message
    assert "layer, in, out" in message


def test_mode_that_no_parameter_carries():
    line = "in  r, out r"
    message = raised_in(lambda: network(line, SHAPE, 2), line)
    assert "no parameter carries the mode 'layer' of the tensor" in message
    message = raised_in(lambda: network(line, {**SHAPE, "head": 2}, 2), line)
    assert "'layer', 'head'" in message


def test_in_on_several_parameters():
    line = "in r, layer  in r, out r"
    message = raised_at(lambda: network(line, SHAPE, 2), line, line.rindex("in"), 2)
    assert "'in' stands on several parameters" in message


@pytest.mark.parametrize(
    "line", ["in r (zero), layer r, out r (zero)", "in r, layer r, out r (frozen)(zero)"]
)
def test_one_trainable_parameter_is_zero(line):
    message = raised_in(lambda: network(line, SHAPE, 2), line)
    assert "one trainable parameter can be marked (zero)" in message


def test_everything_frozen():
    line = "in r (frozen), layer out r (frozen)"
    with pytest.raises(ValueError, match="every parameter is frozen") as caught:
        network(line, SHAPE, 2)
    assert str(caught.value).endswith(line)


# --- the line against tensors ---------------------------------------------------------------------


def ones(*sizes):
    return [torch.ones(size) for size in sizes]


def test_sizes_that_disagree():
    line, modes = "in r, out  r, layer r", tuple(SHAPE)
    tensors = ones((3, 2), (4, 5), (2, 2))
    column = line.index("out  r") + 5
    message = raised_at(lambda: Network(line, tensors, modes), line, column)
    assert "leg 'r' has size 5 here but 2 on an earlier parameter" in message
    line = "layer in r, layer out r"
    tensors = ones((2, 3, 2), (3, 4, 2))
    message = raised_at(lambda: Network(line, tensors, modes), line, line.rindex("layer"), 5)
    assert "leg 'layer' has size 3 here but 2" in message


def test_another_number_of_axes_than_legs():
    line = "in r, layer  r, out r"
    tensors = ones((3, 2), (2,), (4, 2))
    message = raised_at(lambda: Network(line, tensors, SHAPE), line, line.index("layer"), 5)
    assert "parameter 1 (layer r) has 2 legs but its tensor has shape (2,)" in message


def test_another_number_of_tensors_than_parameters():
    line = "in r, layer r, out r"
    message = raised_in(lambda: Network(line, ones((3, 2), (4, 2)), SHAPE), line)
    assert "3 parameters are named but 2 tensors were given" in message


def test_errors_of_a_line_that_was_parsed_before_show_it_too():
    legs = Legs.parse("in r,  out r, layr r")
    raised_at(lambda: network(legs, SHAPE, 2), legs.line, legs.line.index("layr"), 4)
    assert issubclass(LegsError, ValueError)
