"""Measures how far compressed adapters are from the originals, for each head of each site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..._columns import aligned
from ...decomp import Cut, NetworkView
from .._adapter import Adapter
from .._anatomy import Site
from .._files import Lora, LowRank, residual_pair

#: What the errors can be summed up by.
KINDS = ("adapter", "layer", "matrix", "head")

#: The projections of attention, whose heads are the same heads unless there are fewer of them.
_HEADED = ("q", "k", "v", "o")


@dataclass(frozen=True)
class SiteError:
    """The error of one adapter at one projection.

    Attributes:
        adapter: the name of the adapter.
        site: the projection.
        norms: for each head, the Frobenius norm of the original update.
        errors: for each head, the Frobenius norm of the difference between the original and the
            compressed update. Errors below 1e-7 of the norm are rounding errors.

    Example:
        >>> import lortalib, tempfile
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2, init="normal", name="ann")
        >>> folder = adapter.save(tempfile.mkdtemp())
        >>> error = lortalib.nn.compress(model, {"ann": folder}, "cp", rank=4).errors[0]
        >>> error.adapter, error.site.role, len(error.norms), max(error.errors) < 1e-3 * max(error.norms)
        ('ann', 'q', 4, True)
    """

    adapter: str
    site: Site
    norms: tuple[float, ...]
    errors: tuple[float, ...]

    def named(self, kind: str) -> Iterator[tuple[str, float, float]]:
        """Name what this error belongs to, each with norm and error.

        Args:
            kind: ``"adapter"``, ``"layer"``, ``"matrix"`` or ``"head"``.
        """
        site = self.site
        if kind == "head":
            has_query_heads = site.role in _HEADED and site.heads == site.query_heads
            role = "" if has_query_heads else f"{site.role} "
            for head, numbers in enumerate(zip(self.norms, self.errors)):
                yield (f"{site.stack} {role}{head}", *numbers)
        else:
            names = {"adapter": self.adapter, "layer": site.layer, "matrix": site.role}
            own = "" if kind == "adapter" else f"{site.stack} "
            yield f"{own}{names[kind]}", _root(self.norms), _root(self.errors)


def measure(adapters: Iterable[Adapter], originals: Mapping[str, Lora]) -> list[SiteError]:
    """Measure the error of each adapter at each of its sites, from the low-rank pairs alone.

    Args:
        adapters: the compressed adapters.
        originals: the pairs of the originals by name.
    """
    found = []
    for adapter in adapters:
        pairs = originals[adapter.name].pairs
        for group in adapter.groups:
            own_network = adapter.network(group)
            # Contracted in float64: large terms of a fit may cancel, and errors are differences.
            tensors = [tensor.detach().double() for tensor in own_network.tensors]
            network = NetworkView(own_network.legs, tensors, own_network.modes)
            for site in group.sites:
                own = LowRank(*group.pair(network, site))
                wanted = _original(site, pairs.get(site.path))
                gap = Cut(torch.cat([wanted.a, own.a]), torch.cat([wanted.b, -own.b], -1))
                norms = _head_norms(Cut(*wanted), site.heads), _head_norms(gap, site.heads)
                found.append(SiteError(adapter.name, site, *norms))
    return found


def _original(site: Site, pair: LowRank | None) -> LowRank:
    """Return the pair of a site in float64; a module without a pair has the update zero."""
    if pair is None:
        sides = torch.zeros(1, site.width), torch.zeros(site.features, 1)
    else:
        sides = residual_pair(site, pair)
    return LowRank(*(tensor.double() for tensor in sides))


def _head_norms(pair: Cut, heads: int) -> tuple[float, ...]:
    """Compute the norm of each head's rows of ``B @ A`` without forming it.

    With A = Rᵀ Qᵀ it is the norm of B Rᵀ, which keeps the digits that the Gram matrix A Aᵀ would lose where
    large terms cancel.
    """
    triangle = torch.linalg.qr(pair.A.mT, mode="r").R
    rows = (pair.B @ triangle.mT).unflatten(0, (heads, -1))
    return tuple(torch.linalg.vector_norm(rows, dim=(1, 2)).tolist())


def _root(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).norm())


def table(errors: Iterable[SiteError], kind: str) -> list[dict[str, Any]]:
    """Sum errors up over all that is not ``kind``.

    Args:
        errors: the errors.
        kind: one of `KINDS`.

    Raises:
        ValueError: another kind.

    Returns:
        Rows with the name, the norm of the original update, the norm of the difference, and the second
        over the first; None where the original update is zero.
    """
    if kind not in KINDS:
        raise ValueError(f"errors are summed up by {', '.join(KINDS)}; found {kind!r}")
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for each in errors:
        for name, norm, error in each.named(kind):
            found[name].append((norm, error))
    rows = []
    for name, pairs in found.items():
        norm, error = (_root(values) for values in zip(*pairs))
        rows.append({kind: name, "norm": norm, "error": error, "relative": ratio(error, norm)})
    return rows


def ratio(error: float, norm: float) -> float | None:
    """Return the relative error; None where there is nothing to be relative to."""
    return error / norm if norm else None


def total(errors: Sequence[SiteError]) -> float:
    """Compute the relative error over everything; zero where all updates are zero."""
    norm = _root(value for each in errors for value in each.norms)
    error = _root(value for each in errors for value in each.errors)
    return ratio(error, norm) or 0.0


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table as text, its headings first."""
    cells = [list(rows[0])] if rows else []
    for row in rows:
        cells.append([f"{v:.3g}" if isinstance(v, float) else str(v or "-") for v in row.values()])
    return ["  " + line for line in aligned(cells)]
