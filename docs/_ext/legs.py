"""The directive ``legs``: the diagram of a registered format, drawn from its line of legs.

    ```{legs} tucker
    ```

Boxes are parameters, lines between them bonds, lines that hang down modes. Nothing here knows a format: the
line, the cut, the frozen parameters and the one that starts at zero are asked of the library.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from html import escape
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lortalib import decomp
from lortalib.decomp import _formats

SHAPE = {"layer": 12, "head": 12, "matrix": 4, "in": 768, "out": 64}
RANK = 4

# Sizes in the units of the picture: height of a box, length of a leg, steps between legs, ports and rails,
# room for lines that climb to a core, margin.
_BOX, _LEG, _STEP, _PORT, _RAIL, _CLIMB, _TOP = 34, 24, 52, 30, 26, 54, 8


class Box:
    """A parameter in the picture."""

    def __init__(self, legs: tuple[str, ...], modes: tuple[str, ...]) -> None:
        self.modes = [leg for leg in legs if leg in modes]
        self.bonds = [leg for leg in legs if leg not in modes]
        self.ports: list[str] = []  # bonds that leave at the side of the other row
        self.x = self.y = self.width = 0.0

    @property
    def middle(self) -> float:
        """Its centre along the row."""
        return self.x + self.width / 2

    def port(self, bond: str) -> float:
        """Where a bond leaves the box."""
        return self.x + self.width * (self.ports.index(bond) + 1) / (len(self.ports) + 1)


class Picture:
    """Where everything stands: parameters with modes in a row, those without (cores) above it.

    A bond is a line between neighbours of the row, a line from the row up to a core, or else a rail above
    all that it joins.
    """

    def __init__(self, net: decomp.Network) -> None:
        self.boxes = [Box(term.legs, net.open_legs) for term in net.legs.terms]
        self.row = [box for box in self.boxes if box.modes]
        self.cores = [box for box in self.boxes if not box.modes]
        self.beside: dict[str, list[Box]] = {}
        self.upward: dict[str, list[Box]] = {}
        self.rails: dict[str, list[Box]] = {}
        for bond in net.ranks:
            self._sort(bond, [box for box in self.boxes if bond in box.bonds])
        self._place_row()
        self._place_cores()

    def _sort(self, bond: str, ends: list[Box]) -> None:
        places = [self.row.index(box) for box in ends if box in self.row]
        if len(ends) == 2 and len(places) == 2 and abs(places[0] - places[1]) == 1:
            self.beside[bond] = sorted(ends, key=self.row.index)
            return
        (self.upward if len(ends) == 2 and len(places) == 1 else self.rails)[bond] = ends
        for box in ends:
            box.ports.append(bond)

    def _place_row(self) -> None:
        above = _TOP + _BOX + _CLIMB if self.cores else _TOP
        self.level = above + _RAIL * len(self.rails) + (_TOP if self.rails else 0)
        x = 44.0 if self.rails else 10.0
        for box in self.row:
            box.x, box.y = x, self.level
            box.width = max(_BOX + 22, _STEP * len(box.modes) + 4, _PORT * len(box.ports))
            bound = any(box is left for left, _ in self.beside.values())
            x += box.width + (50 if bound else 24)
        self.width = x - 14
        self.height = self.level + _BOX + _LEG + 24

    def _place_cores(self) -> None:
        middle = (self.row[0].x + self.row[-1].x + self.row[-1].width) / 2
        for box in self.row:  # a line that climbs leaves at the side of the core
            left = box.middle < middle
            box.ports.sort(key=lambda bond: (bond in self.upward) == left)
        for core in self.cores:
            core.width = max(_BOX + 22, _PORT * len(core.ports) + 10)
            core.ports.sort(key=self._origin)
        x = middle - (sum(core.width for core in self.cores) + 24 * (len(self.cores) - 1)) / 2
        for core in self.cores:
            core.x, core.y = x, _TOP
            x += core.width + 24

    def _origin(self, bond: str) -> float:
        """Where along the row a bond of a core comes from; a rail comes from the middle."""
        if bond in self.rails:
            return (len(self.row) - 1) / 2 + 0.1
        return float(min(k for k, box in enumerate(self.row) if bond in box.bonds))

    def bonds(self) -> Iterator[str]:
        """Every bond as SVG, with its name."""
        done: Counter[tuple[int, int]] = Counter()
        for bond, (left, right) in self.beside.items():
            done[id(left), id(right)] += 1  # a second bond of the same two runs below the first
            start, y = left.x + left.width, left.y + 17 * done[id(left), id(right)]
            yield _line(f"M{start:g} {y:g}H{right.x:g}")
            yield _text((start + right.x) / 2, y - 5, bond, "legs-name")
        for bond, ends in self.upward.items():
            low, core = sorted(ends, key=lambda box: -box.y)
            x1, x2, under = low.port(bond), core.port(bond), core.y + _BOX
            yield _line(f"M{x1:g} {low.y:g}L{x2:g} {under:g}")
            x, y = x2 + 0.45 * (x1 - x2), under + 0.45 * (low.y - under)
            yield _text(x, y + 4.5, bond, "legs-name legs-halo")
        for k, (bond, ends) in enumerate(self.rails.items()):
            yield from self._rail(bond, ends, self.level - _RAIL * (len(self.rails) - k))

    def _rail(self, bond: str, ends: list[Box], y: float) -> Iterator[str]:
        many = len(ends) > 2
        xs = sorted(box.port(bond) for box in ends)
        start = xs[0] - 20 if many else xs[0]
        yield _line(f"M{start:g} {y:g}H{xs[-1]:g}")
        for box in ends:
            x, end = box.port(bond), box.y + (_BOX if box in self.cores else 0)
            yield _line(f"M{x:g} {y:g}V{end:g}")
            if many:
                yield f'<circle class="legs-dot" cx="{x:g}" cy="{y:g}" r="3.5"/>'
        yield _text(
            start - 10 if many else (xs[0] + xs[-1]) / 2, y + (4 if many else -6), bond, "legs-name"
        )


def parameter(box: Box, kind: str, word: str) -> Iterator[str]:
    """A parameter as SVG, with the modes that hang from it."""
    yield (
        f'<rect class="legs-box {kind}" x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" '
        f'height="{_BOX}" rx="5"/>'
    )
    if word:
        yield _text(box.middle, box.y + _BOX / 2 + 4.5, word, "legs-word")
    for j, mode in enumerate(box.modes):
        x, y = box.middle + (j - (len(box.modes) - 1) / 2) * _STEP, box.y + _BOX
        yield _line(f"M{x:g} {y:g}v{_LEG}")
        yield _text(x, y + _LEG + 15, mode, "legs-mode")


def draw(net: decomp.Network) -> str:
    """The diagram of a network as SVG; its colours are in ``_static/lortalib.css``."""
    picture = Picture(net)
    near = division_of(net).partition.in_side
    zero = net.legs.zero
    parts = [*picture.bonds()]
    for k, (box, term) in enumerate(zip(picture.boxes, net.legs.terms)):
        kind = ("legs-near" if k in near else "legs-far") + " legs-frozen" * term.frozen
        parts += parameter(box, kind, "0" if k == zero else "frozen" * term.frozen)
    width, height = f"{picture.width:g}", f"{picture.height:g}"
    return (
        f'<svg class="legs" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(str(net.legs))}">{"".join(parts)}</svg>'
    )


def _line(path: str) -> str:
    return f'<path class="legs-line" d="{path}"/>'


def _text(x: float, y: float, word: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(word)}</text>'


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
        figure = f'<figure class="legs-figure">{draw(net)}<figcaption>{caption(net)}</figcaption></figure>'
        return [line, nodes.raw("", figure, format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("legs", LegsDiagram)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
