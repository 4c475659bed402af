"""Tables and plots of the study, from what results.jsonl has.

python benchmarks/quality/tables.py     writes quality.md beside itself and docs/_static/quality.svg
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from plan import METHODS, PLAN
from study import Record, chosen, following, quality, records, scored
from tasks import TASKS, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
FIGURE = HERE.parents[1] / "docs" / "_static" / "quality.svg"
LIBRARIES = {"lortalib": ("#0072B2", "o"), "peft": ("#D55E00", "D")}
#: Seeds; a third one comes where it is cheap.
SHOWN_FROM = 2
BASE, RULER = "frozen base", "PEFT LoRA r8"


class Entry(NamedTuple):
    """A method on a task, at the learning rate that validation chose.

    Attributes:
        label: of the method.
        library: whose it is.
        parameters: how many train.
        scores: on the test rows, one for each seed.
        exponent: k of the learning rate 10^(k/2).
        losses: on the validation rows with seed 0, by exponent.
    """

    label: str
    library: str
    parameters: int
    scores: tuple[float, ...]
    exponent: int
    losses: dict[int, float]

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return statistics.fmean(self.scores)


def entries(task: Task) -> list[Entry]:
    """What is known of a task, by trainable parameters."""
    methods = {method.label: method for method in METHODS}
    by_method: dict[str, list[Record]] = defaultdict(list)
    for record in records():
        if record["task"] == task.name and record["method"] in methods:
            by_method[record["method"]].append(record)
    found = []
    for label, own in by_method.items():
        method = methods[label]
        rate = method.library != "frozen"
        if following(own, method.start, SHOWN_FROM, rate, below=task.looks > 0) is not None:
            continue  # a search that has not ended says nothing yet
        best = chosen(own)
        scores = tuple(r["test"][task.metric] for r in scored(own, best).values())
        if scores:
            losses = {r["exponent"]: quality(r) for r in own if r["seed"] == 0}
            found.append(Entry(label, method.library, own[0]["parameters"], scores, best, losses))
    return sorted(found, key=lambda entry: (entry.parameters, entry.label))


def share(own: int, whole: int) -> str:
    """How many of `whole` parameters, as 1/21.2 or, above it, as 157 times."""
    if not own:
        return ""
    return f"1/{whole / own:.1f}" if own <= whole else f"{own / whole:,.1f} times"


def usable(entry: Entry, base: Entry) -> str:
    """The rates of the search at which a method keeps nine tenths of its gain in validation loss.

    Args:
        entry: the method.
        base: the frozen base.
    """
    (start,) = base.losses.values()
    best = min(entry.losses.values())
    kept = [k for k, loss in entry.losses.items() if start - loss >= 0.9 * (start - best) > 0]
    if not kept:
        return ""
    low, high = (f"10^{k / 2:g}" for k in (min(kept), max(kept)))
    return low if low == high else f"{low} to {high}"


def table(task: Task, found: list[Entry]) -> str:
    """A table of one task."""
    by_label = {entry.label: entry for entry in found}
    low = by_label[BASE].mean
    ruler = by_label[RULER]
    missing = [label for name, label in PLAN if name == task.name and label not in by_label]
    lines = [
        f"### {task.title}",
        "",
        f"{task.steps} steps of {task.batch} rows; {len(task.divided()['test']):,} test rows; "
        f"{task.metric}, {'higher' if task.better > 0 else 'lower'} is better.",
        "",
        f"| method | trainable parameters | of LoRA r8's | {task.metric} | lowest to highest "
        "| gain / LoRA r8's | rate | usable rates |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in found:
        part = share(entry.parameters, ruler.parameters)
        gain = (entry.mean - low) / (ruler.mean - low) + 0.0  # never -0 %
        name = f"**{entry.label}**" if entry.library == "lortalib" else entry.label
        rate = "" if entry.label == BASE else f"10^{entry.exponent / 2:g}"
        spread = f"{min(entry.scores):.3f} to {max(entry.scores):.3f} ({len(entry.scores)})"
        lines.append(
            f"| {name} | {entry.parameters:,} | {part} | {entry.mean:.3f} | {spread} "
            f"| {gain:.0%} | {rate} | {usable(entry, by_label[BASE])} |"
        )
    if missing:
        lines += ["", f"Planned and not there (failed or not yet run): {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def short(label: str) -> str:
    """A method's name for the figure."""
    name, _, rest = label.removeprefix("PEFT ").removeprefix("lortalib ").partition(":")
    return name.replace("CP", "cp_matrix") if rest == " a tensor for each matrix" else name


def frontier(task: Task, found: list[Entry]) -> list[Entry]:
    """The methods that gain more than all others with as many trainable parameters or fewer, by at least a
    thirtieth of what LoRA of rank 8 gains."""
    by_label = {entry.label: entry for entry in found}
    step = abs(by_label[RULER].mean - by_label[BASE].mean) / 30
    best: list[Entry] = []
    for entry in sorted(found, key=lambda e: (e.parameters, -task.better * e.mean)):
        if entry.library in LIBRARIES and (
            not best or task.better * (entry.mean - best[-1].mean) > step
        ):
            best.append(entry)
    return best


def panel(axes: Axes, task: Task, found: list[Entry]) -> None:
    """Draw the scores of one task against trainable parameters."""
    labelled = frontier(task, found)
    for library, (colour, marker) in LIBRARIES.items():
        own = [entry for entry in found if entry.library == library]
        for entry in own:
            low, high = min(entry.scores), max(entry.scores)
            axes.errorbar(
                entry.parameters,
                entry.mean,
                [[entry.mean - low], [high - entry.mean]],
                color=colour,
                marker=marker,
                ms=5,
                capsize=2,
                lw=0.8,
                alpha=1.0 if entry in labelled else 0.35,
            )
    for number, entry in enumerate(labelled):
        axes.annotate(
            short(entry.label),
            (entry.parameters, entry.mean),
            (4, 7 if number % 2 else -12),
            textcoords="offset points",
            fontsize=9,
            color=LIBRARIES[entry.library][0],
        )
    for entry in found:
        if entry.library in ("frozen", "full"):
            style = ":" if entry.library == "frozen" else "--"
            axes.axhline(entry.mean, color="#555555", lw=0.8, ls=style)
    axes.set_xscale("log")
    axes.set_xlim(right=3 * max(entry.parameters for entry in found if entry.library in LIBRARIES))
    low, high = (
        pick(entry.mean for entry in found if entry.label == BASE or entry in labelled)
        for pick in (min, max)
    )
    axes.set_ylim(low - 0.1 * (high - low), high + 0.15 * (high - low))
    axes.set_title(task.title, fontsize=10)
    axes.set_ylabel(task.metric, fontsize=9)
    axes.set_xlabel("trainable parameters", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if task.better < 0:
        axes.invert_yaxis()


def draw(all_entries: dict[str, list[Entry]]) -> None:
    """One panel for each task."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "lortalib", "svg.fonttype": "none"})
    from matplotlib import pyplot

    rows = math.ceil(len(all_entries) / 2)
    canvas, axes = pyplot.subplots(rows, 2, figsize=(10, 4 * rows), layout="constrained")
    for place, (name, found) in zip(axes.flat, all_entries.items()):
        panel(place, TASKS[name], found)
    for place in axes.flat[len(all_entries) :]:
        place.set_axis_off()
    canvas.savefig(FIGURE, metadata={"Date": None})
    pyplot.close(canvas)


def main() -> None:
    """Write the tables and the figure."""
    found = {name: entries(task) for name, task in TASKS.items()}
    ready = {name: own for name, own in found.items() if {BASE, RULER} <= {e.label for e in own}}
    if not ready:
        sys.exit(f"no task has {BASE} and {RULER} yet; run benchmarks/quality/study.py")
    parts = [table(TASKS[name], own) for name, own in ready.items()]
    parts += [f"Not yet run: {TASKS[name].title}.\n" for name in TASKS if name not in ready]
    (HERE / "quality.md").write_text("\n".join(parts), encoding="utf-8")
    draw(ready)


if __name__ == "__main__":
    main()
