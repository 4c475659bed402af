"""The figure of the README: what a twentieth of LoRA's trainable parameters gains, from results.jsonl.

python benchmarks/quality/summary.py     writes docs/_static/gain.svg
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tables import BASE, FIGURE, RULER, Entry, entries
from tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, RIVAL = "lortalib stream INDSCAL", "PEFT LoRA r1"
NAMES = {
    "reviews": "film reviews\n(encoder)",
    "peptides": "peptides\n(protein model)",
    "answers": "answers\n(language model)",
    "preferences": "preferences\n(language model)",
}


class Gain(NamedTuple):
    """What a method gains over the frozen base, as a part of what LoRA of rank 8 gains.

    Attributes:
        mean: of the seeds.
        low: of the seed with the lowest score.
        high: of the seed with the highest score.
    """

    mean: float
    low: float
    high: float


def gain(found: list[Entry], method: str) -> Gain:
    """The gain of the method of this name, at its only rank."""
    by_label = {entry.label: entry for entry in found}
    base, ruler = by_label[BASE].mean, by_label[RULER].mean
    (entry,) = (e for e in found if e.label == method or e.label.startswith(f"{method} r"))
    parts = sorted((score - base) / (ruler - base) for score in entry.scores)
    return Gain((entry.mean - base) / (ruler - base), parts[0], parts[-1])


def bars(axes: Axes, place: float, gains: list[Gain], colour: str, label: str) -> None:
    """Draw the bars of one method, with the figure in each."""
    for task, each in enumerate(gains):
        error = [[each.mean - each.low], [each.high - each.mean]]
        named = label if task == 0 else None
        axes.bar(task + place, each.mean, 0.38, color=colour, label=named)
        axes.errorbar(task + place, each.mean, error, color="#333333", lw=1, capsize=3)
        axes.text(task + place, 0.03, f"{each.mean:.0%}", color="white", ha="center", fontsize=12)


def main() -> None:
    """Draw the figure."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "lortalib", "svg.fonttype": "none"})
    from matplotlib import pyplot

    found = {name: entries(TASKS[name]) for name in NAMES}
    canvas, axes = pyplot.subplots(figsize=(8.6, 4.2), layout="constrained")
    ours, rival = ([gain(own, method) for own in found.values()] for method in (OURS, RIVAL))
    bars(
        axes,
        -0.2,
        ours,
        "#0072B2",
        "default format of lortalib, 1/20 of LoRA r8's trainable parameters",
    )
    bars(axes, 0.2, rival, "#B44A00", "LoRA r1, 1/8 of LoRA r8's trainable parameters")
    axes.axhline(1, color="#333333", lw=1, ls="--", label="LoRA r8")
    axes.set_xticks(range(len(NAMES)), list(NAMES.values()), fontsize=12)
    axes.set_ylabel("gain over the frozen base", fontsize=12)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(0, 1.62)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(fontsize=11, loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(FIGURE.with_name("gain.svg"), metadata={"Date": None})
    print({name: [f"{g.mean:.0%}" for g in pair] for name, *pair in zip(NAMES, ours, rival)})


if __name__ == "__main__":
    main()
