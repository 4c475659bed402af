"""Places the parameters, bonds and modes of a network on a plane, for its drawing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ._tensor_network import TensorNetwork

# In units of the drawing: height of a box; length of the line of a mode; steps between modes, between bonds
# at one side of a box and between rails; room for lines that climb to a core; margin.
BOX, LEG, STEP, PORT, RAIL, CLIMB, TOP = 34, 24, 52, 30, 26, 54, 8


class Box:
    """The rectangle of one parameter."""

    def __init__(self, legs: tuple[str, ...], modes: tuple[str, ...]) -> None:
        self.modes = [leg for leg in legs if leg in modes]
        self.bonds = [leg for leg in legs if leg not in modes]
        # Bonds that leave at the upper side, or at the lower side of a core.
        self.ports: list[str] = []
        self.x = self.y = self.width = 0.0

    @property
    def middle(self) -> float:
        """The centre along the row."""
        return self.x + self.width / 2

    def port(self, bond: str) -> float:
        """Return where a bond leaves the box, along the row."""
        return self.x + self.width * (self.ports.index(bond) + 1) / (len(self.ports) + 1)


class Stroke(NamedTuple):
    """The lines of one bond.

    Attributes:
        bond: its name.
        lines: (x1, y1, x2, y2) of each line.
        dots: (x, y) of each branch; only a bond of more than two parameters has some.
        name_at: (x, y) of its name.
        over_lines: whether the name stands on a line and needs a clear ground.
    """

    bond: str
    lines: list[tuple[float, float, float, float]]
    dots: list[tuple[float, float]]
    name_at: tuple[float, float]
    over_lines: bool = False


class Layout:
    """The places of a network's parts: parameters with modes form a row, those without (cores) lie above.

    A bond is a line between neighbours in the row, a line from the row up to a core, or else a rail above
    all parameters that it joins.

    Args:
        net: the network.
    """

    def __init__(self, net: TensorNetwork) -> None:
        self.boxes = [Box(term.legs, net.open_legs) for term in net.legs.terms]
        self.row = [box for box in self.boxes if box.modes] or self.boxes
        self.cores = [box for box in self.boxes if box not in self.row]
        self._neighbours: dict[str, list[Box]] = {}
        self._upward: dict[str, list[Box]] = {}
        self._rails: dict[str, list[Box]] = {}
        for bond in net.ranks:
            self._sort(bond, [box for box in self.boxes if bond in box.bonds])
        self._place_row()
        self._place_cores()

    def _sort(self, bond: str, ends: list[Box]) -> None:
        places = [self.row.index(box) for box in ends if box in self.row]
        if len(ends) == 2 and len(places) == 2 and abs(places[0] - places[1]) == 1:
            self._neighbours[bond] = sorted(ends, key=self.row.index)
            return
        (self._upward if len(ends) == 2 and len(places) == 1 else self._rails)[bond] = ends
        for box in ends:
            box.ports.append(bond)

    def _place_row(self) -> None:
        above = TOP + BOX + CLIMB if self.cores else TOP
        self._level = above + RAIL * len(self._rails) + (TOP if self._rails else 0)
        x = 44.0 if self._rails else 10.0
        for box in self.row:
            box.x, box.y = x, self._level
            box.width = max(BOX + 22, STEP * len(box.modes) + 4, PORT * len(box.ports))
            joined = any(box is left for left, _ in self._neighbours.values())
            x += box.width + (50 if joined else 24)
        self.height = self._level + BOX + LEG + 24

    def _place_cores(self) -> None:
        middle = (self.row[0].x + self.row[-1].x + self.row[-1].width) / 2
        for box in self.row:  # a line that climbs leaves at the side of the core
            left = box.middle < middle
            box.ports.sort(key=lambda bond: (bond in self._upward) == left)
        for core in self.cores:
            core.width = max(BOX + 22, PORT * len(core.ports) + 10)
            core.ports.sort(key=self._origin)
        x = middle - (sum(core.width for core in self.cores) + 24 * (len(self.cores) - 1)) / 2
        for core in self.cores:
            core.x, core.y = x, TOP
            x += core.width + 24
        aside = max(0.0, 10 - min(box.x for box in self.boxes))  # cores can be wider than the row
        for box in self.boxes:
            box.x += aside
        self.width = max(box.x + box.width for box in self.boxes) + 10

    def _origin(self, bond: str) -> float:
        """Return where in the row a bond of a core comes from; a rail comes from the middle."""
        if bond in self._rails:
            return (len(self.row) - 1) / 2 + 0.1
        return float(min(k for k, box in enumerate(self.row) if bond in box.bonds))

    def strokes(self) -> Iterator[Stroke]:
        """Yield the lines of every bond."""
        done: Counter[tuple[int, int]] = Counter()
        for bond, (left, right) in self._neighbours.items():
            done[id(left), id(right)] += 1  # a second bond of the same two runs below the first
            start, y = left.x + left.width, left.y + 17 * done[id(left), id(right)]
            yield Stroke(bond, [(start, y, right.x, y)], [], ((start + right.x) / 2, y - 5))
        for bond, ends in self._upward.items():
            low, core = sorted(ends, key=lambda box: -box.y)
            x1, x2, under = low.port(bond), core.port(bond), core.y + BOX
            at = x2 + 0.45 * (x1 - x2), under + 0.45 * (low.y - under) + 4.5
            yield Stroke(bond, [(x1, low.y, x2, under)], [], at, over_lines=True)
        for k, (bond, ends) in enumerate(self._rails.items()):
            yield self._rail(bond, ends, self._level - RAIL * (len(self._rails) - k))

    def _rail(self, bond: str, ends: list[Box], y: float) -> Stroke:
        many = len(ends) > 2
        xs = sorted(box.port(bond) for box in ends)
        start = xs[0] - 20 if many else xs[0]
        lines = [(start, y, xs[-1], y)]
        lines += [
            (box.port(bond), y, box.port(bond), box.y + (BOX if box in self.cores else 0))
            for box in ends
        ]
        name_at = (start - 10, y + 4) if many else ((xs[0] + xs[-1]) / 2, y - 6)
        return Stroke(bond, lines, [(x, y) for x in xs] if many else [], name_at)
