"""Defines the command ``sites``, which lists what would be adapted in a model."""

from __future__ import annotations

from argparse import Namespace

from .. import nn as lnn
from ..nn.door import SiteList, choose_sites, find_candidates
from ._models import base_of, shape_of
from ._output import Output


def sites(options: Namespace, output: Output) -> bool:
    """List the projections that an adapter would update in a model: ``sites MODEL``."""
    model = shape_of(base_of(options, options.model))
    chosen = choose_sites(find_candidates(model, options.targets, ()), options.targets, None)
    each = [
        {
            "stack": site.stack,
            "layer": site.layer,
            "role": site.role,
            "module": site.path,
            "heads": site.heads,
            "head_dim": site.head_dim,
            "width": site.width,
            "why": reason(site),
        }
        for site in chosen
    ]
    findings = {"model": options.model, "class": type(model).__name__, "sites": each}
    output.show(findings, each if options.all else SiteList(chosen).rows())
    return True


def reason(site: lnn.Site) -> str:
    """Explain in words how a site is read."""
    side = "writes the residual stream" if site.writer else "reads the residual stream"
    words = [f"{site.heads} heads of {site.head_dim}, {side} of width {site.width}"]
    if site.heads != site.query_heads:
        words.append(f"{site.query_heads // site.heads} query heads share one of its heads")
    if site.rows is not None:
        words.append(f"rows {site.rows} of a fused projection of {site.fused}")
    if site.transposed:
        words.append("weight stored (in, out)")
    if site.experts:
        words.append(f"{site.experts} experts in one parameter")
    if site.weight_read_directly:
        words.append("its weight is read directly, so the update is added when it is read")
    if site.tied_paths:
        words.append(f"tied to {', '.join(site.tied_paths)}")
    return "; ".join(words)
