"""Joint diagonalisation of LoRAs (arXiv 2407.00066) against its alternating algorithms, written out."""

import pytest
import torch
from strategies import generator

from lortalib import decomp

N, D, OUT, R = 6, 14, 12, 2  # adapters, in, out, rank of each LoRA


def loras(seed):
    """LoRAs with normal factors, as a network, and their updates B A as (adapter, out, in)."""
    source = generator(seed)
    A, B = (torch.randn(N, size, R, generator=source, dtype=torch.float64) for size in (D, OUT))
    shape = ("adapter", "in", "out")
    return decomp.Network("adapter in r, adapter out r", [A, B], shape), B @ A.mT


def first_side(rank, source):
    return torch.linalg.qr(torch.randn(D, rank, generator=source, dtype=torch.float64)).Q


def jd_full(updates, rank, source, rounds=300):
    """JD-Full: with V fixed, the best orthonormal U has the leading eigenvectors of the sum of X X^T over
    the updates X = D V, and the other way around; the cores are U^T D V."""
    V = first_side(rank, source)
    for _ in range(rounds):
        X = updates @ V
        U = torch.linalg.eigh((X @ X.mT).sum(0)).eigenvectors[:, -rank:]
        Y = updates.mT @ U
        V = torch.linalg.eigh((Y @ Y.mT).sum(0)).eigenvectors[:, -rank:]
    found = U @ (U.T @ updates @ V) @ V.T
    return ((updates - found).norm() / updates.norm()).item()


def jd_diag_errors(updates, V, cores, U, rounds):
    """JD-Diag: least squares in V, in the diagonals of the cores, and in U, entry by entry."""
    found = []
    for _ in range(rounds):
        # every row of a side is a regression on the columns U diag(c) of all updates
        design = torch.cat([U * c for c in cores])  # (adapter out, rank)
        V = torch.linalg.lstsq(design, updates.reshape(N * OUT, D)).solution.T
        design = torch.stack(
            [torch.outer(U[:, k], V[:, k]).flatten() for k in range(U.shape[1])], 1
        )
        cores = torch.stack([torch.linalg.lstsq(design, d.flatten()).solution for d in updates])
        design = torch.cat([V * c for c in cores])
        U = torch.linalg.lstsq(design, updates.mT.reshape(N * D, OUT)).solution.T
        gap = updates - torch.stack([U * c @ V.T for c in cores])
        found.append((gap.norm() / updates.norm()).item())
    return found


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_jd_is_as_near_as_the_published_algorithm(rank, seed):
    nets, updates = loras(seed)
    published = min(jd_full(updates, rank, generator(k)) for k in range(5))
    ends = []
    for k in range(5):  # the same starts; what lies behind them are local minima
        V = first_side(rank, generator(k))
        X = updates @ V
        U = torch.linalg.eigh((X @ X.mT).sum(0)).eigenvectors[:, -rank:]
        start = decomp.jd(nets.shape, rank, init="normal", dtype=torch.float64)
        start = start.like([V, (U.T @ X).mT.contiguous(), U])
        ends.append(decomp.fit(nets, "jd", rank, start=start, tolerance=1e-12).error)
    assert min(ends) <= published + 1e-7


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_jd_diag_goes_the_way_of_the_published_algorithm(rank):
    nets, updates = loras(0)
    start = decomp.jd_diag(
        nets.shape, rank, init="normal", generator=generator(3), dtype=torch.float64
    )
    published = jd_diag_errors(updates, *(t.detach() for t in start.tensors), rounds=8)
    found = decomp.fit(nets, "jd_diag", rank, start=start, sweeps=8, tolerance=0)
    assert found.errors == pytest.approx(published, abs=1e-7)


def test_normalised_loras_are_a_fit_with_weights():
    """The paper divides each LoRA by its norm first, so that small ones count as much as large ones."""
    nets, updates = loras(2)
    sizes = torch.logspace(-1, 1, N, dtype=torch.float64)
    uneven = nets.like([nets.tensors[0] * sizes[:, None, None], nets.tensors[1]])
    norms = decomp.norm(uneven, over="adapter").detach()
    weights = decomp.Network("adapter", [norms**-2], ("adapter",))
    found = decomp.fit(uneven, "jd", 4, weights=weights, restarts=9, tolerance=1e-12)
    even = updates / updates.flatten(1).norm(dim=1)[:, None, None]
    assert found.error <= min(jd_full(even, 4, generator(k)) for k in range(5)) + 1e-7


@pytest.mark.parametrize(("name", "core"), [("jd", 16**2), ("jd_diag", 16)])
def test_the_published_counts(name, core):
    """Shared sides of rank 16 for each weight, and a core for each of 1,000 adapters and weights."""
    shape = {"adapter": 1000, "layer": 32, "matrix": 3, "in": 4096, "out": 4096}
    net = decomp.get_format(name)(shape, 16, device="meta")
    assert net.count() == 96 * (16 * (4096 + 4096) + 1000 * core)
    assert net.select(adapter=0, layer=0, matrix=0).cut_plan().rank == 16


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("jd_full", "layer matrix in p, adapter layer matrix p q, layer matrix head out q"),
        ("jd_diag", "layer matrix in r, adapter layer matrix r, layer matrix head out r"),
    ],
)
def test_all_modes_but_those_of_a_weight_are_the_cores_own(name, line):
    shape = {"adapter": 3, "layer": 2, "head": 2, "matrix": 2, "in": 4, "out": 2}
    assert str(decomp.get_format(name).legs(shape)) == line
    own = {"task": 2, **shape}
    assert "task adapter layer matrix" in str(decomp.get_format(name).legs(own))
