"""The product of a target with one parameter, which the updates of several parameters share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, generator, random_networks, seeds

from lortalib import decomp
from lortalib.decomp import _kept_product, fit
from lortalib.decomp._als import Sweeper
from lortalib.decomp._kept_product import KeptProduct
from lortalib.decomp._objective import Objective
from lortalib.decomp._pieces import Pieces, joined, pieces_of


@examples(40)
@given(net=random_networks(), seed=seeds, order=st.lists(st.integers(0, 3), max_size=8))
def test_it_is_the_whole_contraction(net, seed, order):
    """In any order of the parameters, also where parameters are replaced on the way."""
    source = generator(seed)
    dense = torch.randn(net.dense().shape, generator=source, dtype=torch.float64)
    pieces = pieces_of(net)
    sizes = [net.sizes[leg] for leg in net.open_legs]
    kept = KeptProduct(dense.reshape(sizes), net.open_legs)
    for k in order:
        k = k % len(pieces.terms)
        found = kept.contract(pieces.without(k), pieces.terms[k])
        expected = joined(kept.large, pieces.without(k)).contract(pieces.terms[k])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        fresh = torch.randn(pieces.tensors[k].shape, generator=source, dtype=torch.float64)
        pieces = Pieces(pieces.terms, (*pieces.tensors[:k], fresh, *pieces.tensors[k + 1 :]))


@pytest.mark.parametrize("number", [3, 4, 5])
def test_a_sweep_of_cp_makes_two_large_products(number, monkeypatch):
    shape = {f"m{k}": 6 for k in range(number)}
    dense = torch.randn(*shape.values(), generator=generator(), dtype=torch.float64)
    made = []

    def counted(*several):
        made.append(any(one.terms == (tuple(shape),) for one in several))
        return joined(*several)

    monkeypatch.setattr(_kept_product, "joined", counted)
    net = decomp.cp(shape, 2, init="normal", generator=generator(), dtype=torch.float64)
    objective = Objective([Pieces((tuple(shape),), (dense / dense.norm(),))], tuple(shape))
    sweeper = Sweeper(net.legs, [t.detach() for t in net.tensors], objective, 0.0)
    sweeper.sweep()
    made.clear()
    sweeper.sweep()
    assert sum(made) == 2


@pytest.mark.parametrize("noise", [0.3, 1e-5])
def test_far_from_the_target_and_near_it_a_fit_ends_at_the_same_error(noise, monkeypatch):
    shape = {"layer": 4, "in": 6, "out": 5}
    truth = decomp.cp(shape, 2, init="normal", generator=generator(), dtype=torch.float64)
    extra = torch.randn(4, 6, 5, generator=generator(1), dtype=torch.float64)
    pure = truth.dense().detach()
    dense = pure + noise * pure.norm() / extra.norm() * extra
    ends = []
    for near in (0.0, 1e-3, 2.0):  # never by the residual, as it is, always
        monkeypatch.setattr("lortalib.decomp._als.NEAR", near)
        ends.append(fit(dense, "cp", 2, modes=tuple(shape), start=truth, tolerance=1e-14).error)
    assert ends == pytest.approx([ends[-1]] * 3, rel=1e-7)
