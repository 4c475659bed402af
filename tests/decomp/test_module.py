"""A network is an ordinary module: it copies, moves, saves, compiles and prints."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FORMATS, KINDS, examples, generator, lines, networks, seeds, small

from lortalib.decomp import Network, network

over_kinds = pytest.mark.parametrize("kind", KINDS)
over_formats = pytest.mark.parametrize("name", FORMATS)


def site(net):
    """Position 1 of every mode but those that a cut keeps."""
    return {mode: 1 for mode in net.modes if mode not in ("head", "in", "out")}


@over_kinds
@examples(5)
@given(data=st.data())
def test_pickle_and_deepcopy_follow_everything(kind, data):
    net = data.draw(networks(kind))
    for twin in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        assert (twin.legs, twin.modes, twin.sizes) == (net.legs, net.modes, net.sizes)
        assert [p.requires_grad for p in twin.tensors] == [p.requires_grad for p in net.tensors]
        assert twin.dense().equal(net.dense())
        assert not {p.data_ptr() for p in twin.stored} & {p.data_ptr() for p in net.stored}


@over_kinds
@examples(5)
@given(data=st.data())
def test_state_dict_roundtrip(kind, data):
    net = data.draw(networks(kind))
    zeros = [torch.zeros_like(p) for p in net.stored]
    twin = Network(str(net.legs), zeros, net.modes, sizes=net.sizes)
    assert set(net.state_dict()) == set(net.names)
    twin.load_state_dict(net.state_dict())
    assert twin.dense().equal(net.dense())


@over_formats
def test_dtype_and_meta_device(name):
    net = small(name).to(torch.float32)
    assert {net.dense().dtype, *(p.dtype for p in net.tensors)} == {torch.float32}
    meta = small(name, device="meta", generator=None)
    assert meta.dense().is_meta
    a, b = meta.to(torch.bfloat16).select(**site(meta)).cut()
    assert (a.is_meta, b.is_meta, a.dtype) == (True, True, torch.bfloat16)
    assert meta.count() == net.count()


@pytest.mark.parametrize("name", ["cp", "tucker", "tt", "lora"])
def test_compiled_dense_and_cut_agree(name):
    net = small(name)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager")(), net.dense())
    fast = torch.compile(
        lambda: net.select(layer=1, matrix=2).cut(), fullgraph=True, backend="aot_eager"
    )
    for found, expected in zip(fast(), net.select(layer=1, matrix=2).cut()):
        torch.testing.assert_close(found, expected)


@over_formats
def test_tracing_has_no_graph_break(name):
    torch.compiler.reset()  # one lambda, many formats: each is a recompilation
    net = small(name)
    index = site(net)
    traced = torch.compile(lambda: net.select(**index).cut(), fullgraph=True, backend="eager")
    for found, expected in zip(traced(), net.select(**index).cut()):
        torch.testing.assert_close(found, expected)


@over_formats
def test_repr_is_a_table(name):
    net = small(name)
    title, header, *rows, total = repr(net).splitlines()
    assert title.startswith(f"Network({net.modes[0]}=2, ")
    assert title.endswith(f"{net.count():,} trainable parameters")
    assert header.split() == ["parameter", "legs", "sizes", "parameters"]
    assert len({len(line) for line in (header, *rows, total)}) == 1
    for k, (row, parameter, term, tensor) in enumerate(
        zip(rows, net.names, net.legs.terms, net.tensors, strict=True)
    ):
        assert row.split()[0] == parameter
        assert str(term) in row
        assert " x ".join(map(str, tensor.shape)) in row
        is_again = net.legs.holders[k] < k
        assert is_again or row.endswith(f" {net.stored[k].numel():,}")
    assert total.split() == ["total", f"{net.count(trainable_only=False):,}"]


@examples(40)
@given(line=lines(), seed=seeds)
def test_every_parameter_is_found_under_its_name(line, seed):
    text, modes = line
    net = network(text, dict.fromkeys(modes, 2), 1, generator=generator(seed))
    assert len(set(net.names)) == len(net.names)
    assert all(net.get_parameter(name) is p for name, p in zip(net.names, net.tensors))
    assert callable(net.dense)
    assert callable(net.train)
