"""Draws a network of legs, as SVG and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from ._arguments import takes_network
from ._layout import BOX, LEG, STEP, Box, Layout
from ._notation import LegsError, Term
from ._tensor_network import TensorNetwork

#: Colours, each of which a page can set as a variable, in light and dark.
_LIGHT = {
    "ink": "#1f2328",
    "ground": "#ffffff",
    "near": "#d6e6f6",
    "near-line": "#1c6fb8",
    "far": "#f8e3d2",
    "far-line": "#c8651b",
}
_DARK = {
    "ink": "#e4e8ec",
    "ground": "#131416",
    "near": "#17395a",
    "near-line": "#64aef0",
    "far": "#543216",
    "far-line": "#f0a05c",
}
_RULES = (
    "text{{font:13px sans-serif;fill:{ink};text-anchor:middle}}"
    ".legs-name{{font-style:italic}}"
    ".legs-halo{{paint-order:stroke;stroke:{ground};stroke-width:6px}}"
    ".legs-line{{fill:none;stroke:{ink};stroke-width:1.5}}"
    ".legs-dot{{fill:{ink}}}"
    ".legs-box{{stroke-width:1.5;fill:none;stroke:{ink}}}"
    ".legs-near{{fill:{near};stroke:{near-line}}}"
    ".legs-far{{fill:{far};stroke:{far-line}}}"
    ".legs-frozen{{stroke-dasharray:5 4}}"
)


@dataclass(frozen=True)
class Drawing:
    """A drawing of a network; notebooks show the SVG, ``print`` shows the text.

    Attributes:
        svg: a picture of its own, in light and dark. Parameters are boxes, bonds lines between them, modes
            lines that hang down. The parameters of A of the cut are blue, those of B orange; 0 marks the
            parameter that starts at zero, a dashed border a frozen one.
        text: the parameters by name in a row, their modes above them, and a line for each bond with a dot at
            every parameter that it joins.

    Example:
        >>> from lortalib.decomp import cp, draw
        >>> drawing = draw(cp({"layer": 2, "in": 8, "out": 4}, rank=2))
        >>> drawing.svg.startswith("<svg"), "in_r" in drawing.text
        (True, True)
    """

    svg: str
    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_svg_(self) -> str:
        return self.svg


@takes_network
def draw(net: TensorNetwork) -> Drawing:
    """Draw a network.

    Args:
        net: the network; only its legs and sizes are read.

    Returns:
        `Drawing`.

    Example:
        >>> from lortalib.decomp import tucker
        >>> print(draw(tucker({"layer": 3, "in": 8, "out": 4}, 2)))
         in    out    layer           modes: layer 3, in 8, out 4
        in_p  out_q  layer_t  p_q_t
         *----------------------*     p 2
                *---------------*     q 2
                        *-------*     t 2
    """
    return Drawing(_svg(net), _text_of(net))


def _text_of(net: TensorNetwork) -> str:
    modes = [" ".join(leg for leg in term.legs if leg in net.open_legs) for term in net.legs.terms]
    names = [net.names[owner] for owner in net.legs.owners]
    widths = [max(len(mode), len(name)) for mode, name in zip(modes, names)]
    shape = ", ".join(f"{mode} {size}" for mode, size in net.shape.items())
    above = "  ".join(mode.center(width) for mode, width in zip(modes, widths))
    lines = [f"{above}   modes: {shape}", "  ".join(map(str.center, names, widths))]
    middles, start = [], 0
    for width in widths:
        middles.append(start + (width - 1) // 2)
        start += width + 2
    for bond, size in net.ranks.items():
        ends = [x for x, term in zip(middles, net.legs.terms) if bond in term.legs]
        row = [" "] * len(above)
        row[ends[0] : ends[-1]] = "-" * (ends[-1] - ends[0])
        for x in ends:
            row[x] = "*"
        lines.append(f"{''.join(row)}   {bond} {size}")
    return "\n".join(line.rstrip() for line in lines)


def _svg(net: TensorNetwork) -> str:
    layout = Layout(net)
    near = _side_of_in(net)
    zero = net.legs.zero if net.legs.zeroable else None
    parts = [*_bonds(layout)]
    for k, (box, term) in enumerate(zip(layout.boxes, net.legs.terms)):
        side = "" if near is None else " legs-near" if k in near else " legs-far"
        parts += _parameter(box, side + " legs-frozen" * term.frozen, _word(term, k == zero))
    width, height = f"{layout.width:g}", f"{layout.height:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="legs" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(str(net.legs))}">'
        f"<style>{_style()}</style>{''.join(parts)}</svg>"
    )


def _style() -> str:
    """Return rules whose colours are variables of the page, or else those of the reader's scheme."""

    def rules(colours: dict[str, str]) -> str:
        named = {name: f"var(--legs-{name},{value})" for name, value in colours.items()}
        return ".legs " + _RULES.replace("}}.", "}}.legs .").format_map(named)

    return f"{rules(_LIGHT)}@media(prefers-color-scheme:dark){{{rules(_DARK)}}}"


def _side_of_in(net: TensorNetwork) -> tuple[int, ...] | None:
    """Return the parameters of A of the cut that a projection takes; None if there is no such cut."""
    try:
        plan = net.cut_plan(*(mode for mode in net.modes if mode not in ("in", "head", "out")))
    except LegsError:
        return None
    return plan.partition.in_side


def _word(term: Term, is_zero: bool) -> str:
    if is_zero:
        return "0"
    return "frozen" if term.frozen else f"of {term.of}" if term.of else ""


def _bonds(layout: Layout) -> Iterator[str]:
    for stroke in layout.strokes():
        for x1, y1, x2, y2 in stroke.lines:
            yield f'<path class="legs-line" d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/>'
        for x, y in stroke.dots:
            yield f'<circle class="legs-dot" cx="{x:g}" cy="{y:g}" r="3.5"/>'
        yield _label(*stroke.name_at, stroke.bond, "legs-name" + " legs-halo" * stroke.over_lines)


def _parameter(box: Box, kind: str, word: str) -> Iterator[str]:
    """Yield the box of a parameter, and the modes that hang from it."""
    yield (
        f'<rect class="legs-box{kind}" x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" '
        f'height="{BOX}" rx="5"/>'
    )
    if word:
        yield _label(box.middle, box.y + BOX / 2 + 4.5, word, "legs-word")
    for j, mode in enumerate(box.modes):
        x, y = box.middle + (j - (len(box.modes) - 1) / 2) * STEP, box.y + BOX
        yield f'<path class="legs-line" d="M{x:g} {y:g}v{LEG}"/>'
        yield _label(x, y + LEG + 15, mode, "legs-mode")


def _label(x: float, y: float, word: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(word)}</text>'
