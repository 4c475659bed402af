"""The registry: published parameter counts, names, and construction."""

import warnings

import numpy as np
import pytest
import reference
import torch
from strategies import FORMATS, generator, small

from lortalib import decomp
from lortalib.decomp import (
    Format,
    Legs,
    LegsError,
    Shape,
    cp,
    formats,
    get_format,
    network,
    register_format,
    tt,
    tucker,
)

SHAPE = Shape((3, 2, 4, 6, 5))

# --- published parameter counts -------------------------------------------------------------------

BASE, LARGE = (12, 12, 2, 768, 64), (24, 16, 2, 1024, 64)  # RoBERTa, query and value
LLAMA_7B, LLAMA_13B = (32, 32, 4, 4096, 128), (40, 40, 4, 5120, 128)
LLAMA_3B = [(28, 24, 1, 3072, 128), (28, 8, 1, 3072, 128)]  # query; value with 8 key/value heads
XS_LARGE = {"layer": 24, "matrix": 4, "in": 1024, "out": 1024}
XS_MISTRAL = {"layer": 32, "matrix": 7, "in": 4096, "out": 4096}
VIT = {"layer": 12, "matrix": 12, "in": 768, "out": 768}

COUNTS = [
    ("lorta", (12, 12, 4, 768, 64), {4: 3_440}),
    ("lorta", (24, 16, 4, 1024, 64), {8: 9_056}),
    ("lorta", LLAMA_7B, {1: 4_292, 12: 51_504, 48: 206_016, 128: 549_376, 192: 824_064}),
    ("lorta", LLAMA_7B, {256: 1_098_752, 768: 3_296_256, 32: 137_344}),
    ("lorta", LLAMA_13B, {6: 31_992, 768: 4_094_976}),
    ("lora", LLAMA_7B, {32: 33_554_432, 1: 1_048_576}),
    ("lora", BASE, {8: 294_912, 1: 36_864, 2: 73_728, 4: 147_456, 16: 589_824, 32: 1_179_648}),
    ("lora", LARGE, {8: 786_432}),
    ("lora", (48, 24, 2, 1536, 64), {16: 4_718_592}),
    ("lora", (32, 32, 2, 4096, 128), {8: 4_194_304}),
    ("lora", LLAMA_3B, {32: 9_175_040, 64: 18_350_080}),
    ("lotr", BASE, {1: 1_560, 2: 3_168, 4: 6_528, 8: 13_824, 16: 30_720, 32: 73_728}),
    ("lotr", LARGE, {64: 327_680}),
    ("vera", BASE, {1024: 43_008 - 24 * 768}),  # without its output vector
    ("vera", LARGE, {256: 61_440 - 48 * 1024}),
    ("vera", LLAMA_3B, {256: 129_024 - 28 * (3072 + 1024)}),
    ("lora-xs", XS_LARGE, {4: 1_536, 8: 6_144, 12: 13_824, 16: 24_576, 20: 38_400, 25: 60_000}),
    ("lora-xs", XS_MISTRAL, {16: 57_344, 32: 229_376, 64: 917_504}),
    ("metatt-4d", BASE, {8: 13_184, 24: 44_928}),
    ("metatt-4d", LARGE, {16: 39_424, 32: 92_160}),
    ("metatt-5d", BASE, {16: 19_968, 64: 159_744}),
    ("metatt-5d", LARGE, {16: 28_160, 64: 241_664}),
    ("fact-tt", VIT, {4: 8_448, 8: 21_504, 16: 61_440}),
    ("fact-tk", VIT, {8: 13_952, 16: 30_976, 32: 86_528}),
    ("cara", (12, 12, 3, 768, 64), {16: 14_080}),  # its attention part, r (3L + d + H + d_h)
]


@pytest.mark.parametrize(
    ("name", "shape", "rank", "count"),
    [(name, shape, r, n) for name, shape, counts in COUNTS for r, n in counts.items()],
)
def test_published_parameter_counts(name, shape, rank, count):
    shapes = shape if isinstance(shape, list) else [shape]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of these ranks is too large
        nets = [get_format(name)(each, rank, device="meta") for each in shapes]
    assert sum(net.count() for net in nets) == count


# --- names ----------------------------------------------------------------------------------------


def test_the_registry_holds_the_published_formats():
    listed = "cp cp_matrix tucker tt ring lotr fact_tk cara lora lora_xs vera block_term metatt_4d metatt_41d"
    assert set(listed.split()) <= set(formats)
    for name, entry in formats.items():
        assert isinstance(entry, Format)
        assert entry.name == name
        assert entry.about


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cp", "in r, out r, head r, layer r, matrix r"),
        ("cp_matrix", "matrix in r, matrix out r, matrix head r, matrix layer r"),
        ("tucker", "in p, out q, head s, layer t, matrix u, p q s t u"),
        ("tt", "in a, layer a b, matrix b c, head c d, out d"),
        ("metatt_4d", "in a, layer a b, matrix b c, head out c"),
        ("metatt_41d", "in a, layer a b, task b c, matrix c d, head out d"),
        ("ring", "in e a, layer a b, matrix b c, head c d, out d e"),
        ("lotr", "in p, layer matrix p q, head out q"),
        ("fact_tk", "in p, head out q, layer matrix s, p q s"),
        ("cara", "in r, out r, head r, layer matrix r"),
        ("lora", "layer matrix in r, layer matrix head out r"),
        (
            "lora_xs",
            "layer matrix in p (frozen), layer matrix p q, layer matrix head out q (frozen)",
        ),
        ("vera", "in r (frozen), head out r (frozen), layer matrix r"),
    ],
)
def test_a_format_is_its_line(name, line):
    found, expected = small(name).legs.terms, Legs.parse(line).terms
    assert {(*sorted(t.legs), t.frozen) for t in found} == {
        (*sorted(t.legs), t.frozen) for t in expected
    }


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("LoRTA", "cp"),
        ("parafac", "cp"),
        ("CANDECOMP", "cp"),
        ("MetaTT-5D", "tt"),
        ("tensor-train", "tt"),
        ("Tensor_Ring", "ring"),
        ("FacT-TT", "lotr"),
        ("FacT-TK", "fact_tk"),
        (" LoRA-XS ", "lora_xs"),
        ("MetaTT-41D", "metatt_41d"),
        ("btd", "block_term"),
        ("UniLoRA", "uni_lora"),
    ],
)
def test_aliases_hyphens_and_capitals(alias, name):
    assert get_format(alias) is formats[name]


def test_an_unknown_name_has_a_hint():
    with pytest.raises(
        ValueError, match=r"unknown decomposition 'tuker' \(did you mean 'tucker'\?\)"
    ):
        get_format("tuker")
    with pytest.raises(
        ValueError, match=r"the names are .*cp, .* Or give a line of legs"
    ) as caught:
        get_format("zzz")
    assert "did you mean" not in str(caught.value)


def test_a_line_stands_for_a_format():
    line = "in p, layer matrix p q, out head q"
    named, nameless = get_format("lotr"), get_format(line)
    assert (nameless.name, nameless.line) == ("", line)
    assert nameless(SHAPE, 2).count() == named(SHAPE, 2).count()
    with pytest.raises(LegsError, match="'r' stands twice"):
        get_format("in r r, out r")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("lora", "layer matrix in r, layer matrix out r"),
        ("metatt_4d", "in a, layer a b, matrix b c, out c"),
        ("vera", "in r (frozen), out r (frozen), layer matrix r"),
    ],
)
def test_heads_are_left_out_of_a_line_where_the_tensor_has_none(name, line):
    shape = {"layer": 2, "matrix": 2, "in": 4, "out": 4}
    assert str(formats[name](shape, 2).legs) == line


@pytest.mark.parametrize("taken", ["cp", "LoRTA", "Lora-XS", "Block-Term"])
def test_a_taken_name_is_refused(taken):
    with pytest.raises(ValueError, match=f"the format name '{taken}' is taken"):
        register_format(taken, "in r, out r")


def test_register_and_unregister():
    with pytest.raises(LegsError, match="a parameter without legs"):
        register_format("broken", "in r,, out r")
    assert "broken" not in formats
    entry = register_format(
        "Test-Layerwise", "layer in r, layer matrix head out r", "one A per layer"
    )
    try:
        assert get_format("test_layerwise") is entry is formats["test_layerwise"]
        assert entry(SHAPE, 2).count() == 3 * 6 * 2 + 3 * 4 * 2 * 5 * 2
    finally:
        del formats["test_layerwise"]
    with pytest.raises(ValueError, match="unknown decomposition"):
        get_format("test-layerwise")


def test_modes_beyond_the_reserved_ones():
    shape = {"adapter": 3, "r": 2, "p": 2, "in": 4, "a": 2, "out": 4}
    for make in (cp, tucker, tt):
        net = make(shape, 2, init="normal", dtype=torch.float64)
        assert net.modes == tuple(shape)
        np.testing.assert_allclose(net.dense().detach(), reference.dense(net), atol=1e-9)


# --- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["invariant", "lorta", "normal"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_seed_gives_the_same_network(name, init):
    def state(source):
        return small(name, init=init, generator=source).state_dict().values()

    before = torch.get_rng_state()
    first, again, other = (list(state(generator(seed))) for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(before)  # a generator of one's own leaves the global one
    assert all(a.equal(b) for a, b in zip(first, again))
    assert not all(a.equal(b) for a, b in zip(first, other))
    torch.manual_seed(3)
    globally = list(state(None))
    torch.manual_seed(3)
    assert all(a.equal(b) for a, b in zip(globally, state(None)))


def test_dtype_and_device():
    assert {p.dtype for p in tucker(SHAPE, 2).parameters()} == {torch.float32}
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        net = tt(SHAPE, 2, dtype=dtype, init="normal")
        assert {net.dense().dtype, *(p.dtype for p in net.parameters())} == {dtype}
        assert net.dense().isfinite().all()
    assert cp(SHAPE, 2, device="cpu").in_r.device.type == "cpu"
    assert cp(SHAPE, 2, device="meta", generator=generator()).in_r.is_meta
    with torch.device("meta"):
        assert all(p.is_meta for p in tucker(SHAPE, 2).parameters())


def test_parameters_own_contiguous_memory():
    for name in FORMATS:
        assert all(p.is_contiguous() for p in small(name).parameters())


@pytest.mark.parametrize(
    ("shape", "error", "says"),
    [
        ((2, 2, 4, 8), ValueError, "a shape given as a tuple has 5 sizes, .* found 4"),
        ((2, 2, 0, 8, 8), ValueError, "size of mode 'matrix' must be at least 1; found 0"),
        ((2, 2, 4, 8, -1), ValueError, "size of mode 'out' must be at least 1; found -1"),
        ({"in": 2.5, "out": 2}, TypeError, "size of mode 'in' must be an integer; found 2.5"),
        ({"in": True, "out": 2}, TypeError, "size of mode 'in' must be an integer; found True"),
        ({"in": 2, "out": "2"}, TypeError, "size of mode 'out' must be an integer; found '2'"),
    ],
)
def test_shapes_that_are_refused(shape, error, says):
    with pytest.raises(error, match=says):
        cp(shape, 2)


def test_shape_is_an_ordered_mapping():
    shape = Shape((2, 3, 4, 5, 6))
    assert dict(shape) == {"layer": 2, "head": 3, "matrix": 4, "in": 5, "out": 6}
    assert (shape.numel, len(shape), shape.modes) == (720, 5, tuple(shape))
    assert shape == Shape(dict(shape)) == Shape(shape)
    assert hash(shape) == hash(Shape(dict(shape)))
    assert shape != Shape(dict(reversed(dict(shape).items())))
    assert repr(Shape({"in": 2, "out": np.int64(3)})) == "Shape({'in': 2, 'out': 3})"
    assert eval(repr(shape)) == shape


def test_an_unknown_init_is_refused_and_a_callable_used():
    with pytest.raises(
        ValueError, match="unknown init 'nope'; choose 'invariant', 'lorta', 'normal'"
    ):
        cp(SHAPE, 2, init="nope")

    def ones(legs, sizes, modes, randn):
        assert modes == SHAPE.modes
        return [torch.ones_like(randn([sizes[leg] for leg in term.legs])) for term in legs.terms]

    assert network("in r, layer matrix r, head out r", SHAPE, 3, init=ones).dense().eq(3).all()


@pytest.mark.parametrize("name", ["cp", "TT", "lora-xs", "tucker"])
def test_the_name_of_a_format_stands_for_its_line(name):
    shape = (3, 2, 2, 8, 4)
    made = [
        make(shape, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for make in (get_format(name), lambda *args, **more: network(name, *args, **more))
    ]
    assert str(made[0].legs) == str(made[1].legs)
    for one, two in zip(*(net.parameters() for net in made)):
        assert torch.equal(one, two)
        assert one.dtype == torch.float64


@pytest.mark.parametrize("name", ["tt", "tucker", "ring"])
def test_formats_over_many_modes(name):
    """Names of bonds do not run out."""
    shape = {**{f"m{k}": 2 for k in range(20)}, "in": 2, "out": 2}
    net = decomp.get_format(name)(shape, 1, device="meta")
    assert set(net.modes) == set(shape)
