"""Plots of time and memory of a training step against rank and number of tokens.

Reads what `training` and `memory` wrote beside themselves.

    python benchmarks/speed/plots.py            writes docs/_static/performance-*.svg
    python benchmarks/speed/plots.py --quick   from the quick runs in runs/, and into it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cells import MIDDLE
from measure import MIB, QUICK_FOLDER, arguments
from subjects import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BENCHMARKS = Path(__file__).parent
FIGURES = BENCHMARKS.parents[1] / "docs" / "_static"
#: Colours that are told apart in every kind of colour vision (Okabe and Ito), and a marker each.
STYLES = {
    "floor": ("#000000", ","),
    "cp": ("#0072B2", "o"),
    "tucker": ("#56B4E9", "s"),
    "tt": ("#009E73", "^"),
    "lora": ("#D55E00", "D"),
    "vera": ("#CC79A7", "v"),
    "dense": ("#E69F00", "X"),
}

Entry = Mapping[str, Any]


class Figure(NamedTuple):
    """What one figure shows: the quantity as (middle, low, high) of an entry."""

    name: str
    source: str
    title: str
    value: Callable[[Entry], Sequence[float]]


def same(value: float) -> tuple[float, float, float]:
    """A count, which does not vary."""
    return value, value, value


TIME = Figure("time", "training", "time of a step / floor", lambda e: e["to_floor"])
PEAK = Figure(
    "peak", "memory", "peak above floor, MiB", lambda e: same(e["peak_above_floor"] / MIB)
)
SAVED = Figure(
    "saved", "memory", "saved above floor, MiB", lambda e: same(e["saved_above_floor"] / MIB)
)


def draw(figure: Figure, entries: Sequence[Entry], target: Path) -> None:
    """One column for each model: against rank above, against number of tokens below."""
    from matplotlib import pyplot

    models = list(dict.fromkeys(entry["model"] for entry in entries))
    canvas, axes = pyplot.subplots(
        2, len(models), figsize=(3.6 * len(models), 6.2), squeeze=False, layout="constrained"
    )
    for column, model in enumerate(models):
        own = [e for e in entries if e["model"] == model and e["kind"] != "floor"]
        tokens = min(e["tokens"] for e in own)
        upper, lower = axes[0, column], axes[1, column]
        curves(upper, figure, [e for e in own if e["tokens"] == tokens], "rank")
        curves(lower, figure, [e for e in own if e["rank"] == MIDDLE], "tokens")
        upper.set_title(f"{model}\n{tokens} tokens", fontsize=9)
        lower.set_title(f"rank {MIDDLE}", fontsize=9)
    for row in axes:
        row[0].set_ylabel(figure.title)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    canvas.savefig(target, metadata={"Date": None})
    pyplot.close(canvas)
    print(f"wrote {target.parent.name}/{target.name}")


def curves(axes: Axes, figure: Figure, entries: Sequence[Entry], against: str) -> None:
    """A curve for each contender, with bars from the smallest to the largest of the rounds."""
    for kind in LABELS:
        own = sorted((e for e in entries if e["kind"] == kind), key=lambda e: e[against])
        if not own:
            continue
        colour, marker = STYLES[kind]
        middles, lows, highs = zip(*(figure.value(entry) for entry in own))
        below = [middle - low for middle, low in zip(middles, lows)]
        above = [high - middle for middle, high in zip(middles, highs)]
        places = [entry[against] for entry in own]
        bars = [below, above] if any(below + above) else None
        axes.errorbar(
            places,
            middles,
            bars,
            color=colour,
            marker=marker,
            label=LABELS[kind],
            capsize=2,
            lw=1.2,
        )
    axes.axhline(1.0 if figure is TIME else 0.0, color=STYLES["floor"][0], lw=0.8, ls=":")
    values = sorted({entry[against] for entry in entries})
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel("rank" if against == "rank" else "tokens in the batch")
    axes.grid(alpha=0.3)


def main() -> None:
    """Draw every figure."""
    options = arguments(__doc__, repetitions=1)
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib: pip install -c constraints.txt -e '.[plots]'")
    matplotlib.use("svg")
    # The same file from the same numbers, and text that stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "lortalib", "svg.fonttype": "none"})
    folder, end = (QUICK_FOLDER, "-quick.json") if options.quick else (BENCHMARKS, ".json")
    target = QUICK_FOLDER if options.quick else FIGURES
    target.mkdir(parents=True, exist_ok=True)
    for figure in (TIME, PEAK, SAVED):
        source = folder / f"{figure.source}{end}"
        if not source.exists():
            sys.exit(f"{source.name} is missing: run benchmarks/speed/{figure.source}.py first")
        entries = json.loads(source.read_text(encoding="utf-8"))["cells"]
        draw(figure, entries, target / f"performance-{figure.name}.svg")


if __name__ == "__main__":
    main()
