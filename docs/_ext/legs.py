"""The directive ``legs``: the diagram of a registered format, drawn from its line of legs.

    ```{legs} tucker
    ```

`lortalib.decomp.draw` draws it. Nothing here knows a format: the line, the cut and the frozen parameters are
asked of the library.
"""

from __future__ import annotations

import warnings
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lortalib import decomp
from lortalib.decomp import _formats

SHAPE = {"layer": 12, "head": 12, "matrix": 4, "in": 768, "out": 64}
RANK = 4


def division_of(net: decomp.Network) -> Any:
    """Where a projection's share is cut."""
    return net.cut_plan(*(mode for mode in net.modes if mode not in ("in", "head", "out")))


def example(name: str) -> decomp.Network:
    """A network of a format or line, of the usual shape, without memory."""
    known = decomp.get_format(name)
    modes = str(known.line) if isinstance(known.line, str) else ""
    shape = {"task": 3, **SHAPE} if "task" in modes.split() else SHAPE
    if known.symmetric:  # a tensor on the stream: no heads, in and out of one size
        shape = {**{mode: n for mode, n in SHAPE.items() if mode != "head"}, "out": SHAPE["in"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return known(shape, RANK, device="meta")


def caption(net: decomp.Network) -> str:
    """What the picture shows, in one sentence for each fact."""
    division = division_of(net)
    bonds = " and ".join(f"<i>{bond}</i>" for bond in division.partition.bonds)
    frozen = net.count(trainable_only=False) - net.count()
    shape = ", ".join(f"{mode} {size}" for mode, size in net.shape.items())
    blue, orange = (
        "parameter makes" if len(side) == 1 else "parameters make"
        for side in (division.partition.in_side, division.partition.out_side)
    )
    parts = [
        f"For {shape} and rank {RANK}: {net.count():,} trainable parameters"
        + (f", {frozen:,} are frozen." if frozen else "."),
        f"The cut crosses {bonds}, its rank is {division.rank}; the blue {blue} A, the orange {orange} B.",
        "0 marks the parameter that starts at zero.",
    ]
    if any(term.tied for term in net.legs.terms):
        parts.append("A tied parameter is drawn at each of its places.")
    return " ".join(parts)


class LegsDiagram(SphinxDirective):
    """``{legs} name``: the line of a format, its diagram, and what can be counted on it."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The figure."""
        self.env.note_dependency(str(_formats.__file__))
        net = example(self.arguments[0])
        line = nodes.literal_block(str(net.legs), str(net.legs), language="text")
        drawing, words = decomp.draw(net).svg, f"<figcaption>{caption(net)}</figcaption>"
        figure = f'<figure class="legs-figure">{drawing}{words}</figure>'
        return [line, nodes.raw("", figure, format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("legs", LegsDiagram)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
