"""Which transformers model types does `lortalib.nn` cover? One row for each registered type.

Every type is built from its default config on the meta device and its attention projections are
looked up; then a tiny one is built on the CPU, run, verified by the probe, adapted, differentiated,
merged, unmerged, saved, loaded and freed of the adapter again. Each type runs in a worker process
with a time limit, so a crash or a hang costs one row. Rows are kept in ``survey.jsonl``; a run that
was stopped goes on where it was.

    python benchmarks/survey/survey.py                    all types; writes docs/models-table.md
    python benchmarks/survey/survey.py --types bert,t5    some; --verbose prints their rows
    python benchmarks/survey/survey.py --sample 60        a fixed sample
    python benchmarks/survey/survey.py --meta-only        only the first column
    python benchmarks/survey/survey.py --fresh            forget the rows that are there
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import re
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from torch import nn
from trial import Trial, forward, shorten, state_of, tensors_of

import lortalib
from lortalib.nn import NoAttentionError, UnsupportedModelError

ROWS = Path(__file__).with_suffix(".jsonl")
TABLE = Path(__file__).parents[2] / "docs" / "models-table.md"
#: The checks of a tiny model, in the order in which they are made; each needs those before it.
CHECKS = {
    "built": "tiny model built on the CPU",
    "forward": "a forward runs",
    "verified": "the name-free probe agrees with the plan",
    "moves": "an adapter moves the output",
    "gradient": "one backward reaches every factor",
    "merged": "merged output equals adapted output",
    "unmerged": "unmerge restores every bit",
    "loaded": "saved and loaded onto a fresh model: same output",
    "removed": "remove() leaves the model as it was",
}
#: Larger tiny models are not run.
MOST_PARAMETERS = 60_000_000
#: Seconds for one type.
LIMIT = 60.0
#: Times that a worker is started before the survey gives up.
STARTS = 3


@dataclass
class Row:
    """What was found for one type.

    Attributes:
        type: the registered name.
        plan: "planned", "no attention", "refused", "not built" or "crash".
        why: the reason where it is not planned.
        model: class of the model.
        sites: how many sites were found in the default config.
        stacks: their stacks.
        size: size of the model that ran, ``"tiny"`` or ``"slim"``.
        checks: for each of ``CHECKS`` that was made "yes", or the reason why not.
        seconds: how long it took.
    """

    type: str
    plan: str = ""
    why: str = ""
    model: str = ""
    sites: int = 0
    stacks: list[str] = field(default_factory=list)
    size: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def passed(self, check: str) -> bool:
        """Whether a check was made and held."""
        return self.checks.get(check) == "yes"


def examine(
    model_type: str, *, meta_only: bool = False, report: Callable[[Row], None] | None = None
) -> Row:
    """Everything that is asked of one type, as a row; it never raises.

    Args:
        model_type: the type.
        meta_only: only plan.
        report: called with the row as soon as the plan is known, before anything is run.
    """
    torch.set_num_threads(1)
    row = Row(model_type)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _plan(row)
            if report is not None:
                report(row)
            if not meta_only and row.plan == "planned":
                _run(row)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            if row.plan == "planned":
                row.checks.setdefault("built", shorten(why))
            else:
                row.plan, row.why = "crash", shorten(why)
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _plan(row: Row) -> None:
    """The first question: which sites does the default config have?"""
    try:
        model = zoo.build(row.type)
    except zoo.CannotBuildError as error:
        row.plan, row.why = "not built", str(error)
        return
    row.model = type(model).__name__
    try:
        found = lortalib.nn.sites(model)
    except NoAttentionError:
        row.plan = "no attention"
    except UnsupportedModelError as error:
        row.plan, row.why = "refused", str(error)
    else:
        row.plan, row.sites = "planned", len(found)
        row.stacks = list(dict.fromkeys(site.stack for site in found))


def _run(row: Row) -> None:
    """The other questions, of a tiny model."""
    example = _example(row)
    if example is None:
        return
    model, inputs = example
    before = state_of(model)
    checks: dict[str, Callable[[], str]] = {}
    trial: list[Trial] = []

    def trying() -> Trial:
        if not trial:
            trial.append(Trial(lambda: zoo.build(row.type, row.size, "cpu"), model, inputs, before))
        return trial[0]

    checks["verified"] = lambda: _verified(model, inputs)
    checks["moves"] = lambda: trying().moves()
    checks["gradient"] = lambda: trying().gradient()
    checks["merged"] = lambda: trying().merged()
    checks["unmerged"] = lambda: trying().unmerged()
    checks["loaded"] = lambda: trying().loaded()
    checks["removed"] = lambda: trying().removed()
    for name, check in checks.items():
        try:
            row.checks[name] = check() or "yes"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            row.checks[name] = shorten(f"{type(error).__name__}: {error} ({place})")
        if name != "verified" and not trial:
            return  # the adapter could not be applied


def _example(row: Row) -> tuple[nn.Module, dict[str, Any]] | None:
    """A small model of the type and inputs on which it runs: of the first size where it does."""
    reasons: dict[str, str] = {}
    for size in ("tiny", "slim"):
        try:
            planned = zoo.parameters(zoo.build(row.type, size))
            if planned > MOST_PARAMETERS:
                reasons.setdefault("built", f"{planned / 1e6:.0f} M parameters even when {size}")
                continue
            model = zoo.build(row.type, size, "cpu")
        except zoo.CannotBuildError as error:
            reasons.setdefault("built", str(error))
            continue
        try:
            inputs = zoo.inputs(model, row.type)
            output = forward(model, inputs)
            if not tensors_of(output):
                raise ValueError("the output holds no floating-point tensor")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            reasons.setdefault("forward", shorten(f"{type(error).__name__}: {error} ({place})"))
            continue
        row.size = size
        row.checks = {"built": "yes", "forward": "yes"}
        return model, inputs
    row.checks["built"] = "yes" if "forward" in reasons else reasons["built"]
    if "forward" in reasons:
        row.checks["forward"] = reasons["forward"]
    return None


def _verified(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    torch.manual_seed(0)
    report = lortalib.nn.verify(model, inputs)
    if not report.ok:
        return shorten(f"disagrees: {report}")
    return "yes" if report.complete else shorten(f"in part: {report}")


def sample(number: int) -> list[str]:
    """A fixed sample that is spread over the whole registry."""
    types = sorted(zoo.model_types())
    return [types[round(k * len(types) / number)] for k in range(min(number, len(types)))]


def survey(
    types: list[str], *, meta_only: bool, workers: int, seconds: float, limit: float
) -> Iterator[Row]:
    """A row for each type as it is done, until the time is used up."""
    deadline = time.monotonic() + seconds
    todo = list(reversed(types))
    done: list[Row] = []
    lock = threading.Condition()

    def work() -> None:
        worker = Worker(meta_only)
        while True:
            with lock:
                if not todo or time.monotonic() > deadline:
                    break
                model_type = todo.pop()
            row = worker.examine(model_type, limit)
            with lock:
                done.append(row)
                lock.notify()
        worker.stop()
        with lock:
            lock.notify()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    while True:
        with lock:
            while not done and any(thread.is_alive() for thread in threads):
                lock.wait(1)
            rows, done[:] = list(done), []
        yield from rows
        if not rows and not any(thread.is_alive() for thread in threads) and not done:
            return


class Worker:
    """A process that examines types, started anew when one crashes or hangs."""

    def __init__(self, meta_only: bool) -> None:
        self.meta_only = meta_only
        self.process: Any = None
        self.pipe: Any = None

    def examine(self, model_type: str, limit: float) -> Row:
        """The row of a type, whatever happens in the process."""
        if self.process is None:
            self.start()
        self.pipe.send(model_type)
        row = Row(model_type, plan="crash")
        deadline = time.monotonic() + limit
        try:
            while self.pipe.poll(max(0.0, deadline - time.monotonic())):
                done, found = self.pipe.recv()
                row = Row(**found)
                if done:
                    return row
            why = f"took longer than {limit:.0f} s"
        except (EOFError, ConnectionError):
            why = "the process died"
        self.stop()
        row.seconds = limit
        if row.plan == "crash":
            row.why = why
        else:
            row.checks = {"built": why}  # the plan stands; a tiny one could not be tried
        return row

    def start(self) -> None:
        """Start the process; one that dies before it is asked anything says nothing of a type."""
        context = multiprocessing.get_context("spawn")
        for _ in range(STARTS):
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(
                target=_serve, args=(theirs, self.meta_only), daemon=True
            )
            self.process.start()
            theirs.close()
            with contextlib.suppress(EOFError, ConnectionError):
                self.pipe.recv()  # it has started
                return
            self.stop()
        raise RuntimeError(f"a worker process died {STARTS} times while it started")

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None


def _serve(pipe: Connection, meta_only: bool) -> None:
    pipe.send("ready")
    while True:
        try:
            model_type = pipe.recv()
        except EOFError:
            return
        row = examine(
            model_type, meta_only=meta_only, report=lambda found: pipe.send((False, asdict(found)))
        )
        pipe.send((True, asdict(row)))


# Rows and table


def read_rows() -> dict[str, Row]:
    """The rows of earlier runs."""
    if not ROWS.is_file():
        return {}
    lines = ROWS.read_text(encoding="utf-8").splitlines()
    rows = (Row(**json.loads(line)) for line in lines if line.endswith("}"))
    return {row.type: row for row in rows}


def totals(rows: list[Row]) -> list[str]:
    """The counts at the top of the table."""
    plans = Counter(row.plan for row in rows)
    built = len(rows) - plans["not built"]
    planned = [row for row in rows if row.plan == "planned"]
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}: {len(rows)} registered "
        f"model types, {built} built from their default config.",
        "",
        "| | types |",
        "|---|---|",
        f"| planned: sites found for every attention block | {plans['planned']} |",
        f"| no softmax attention | {plans['no attention']} |",
        f"| refused, with the reason | {plans['refused']} |",
        f"| crash or time limit | {plans['crash']} |",
        f"| cannot be built here | {plans['not built']} |",
    ]
    for name, meaning in CHECKS.items():
        count = sum(row.checks.get(name, "").startswith("yes") for row in planned)
        if name == "verified":
            parts = [row.checks.get(name, "") for row in planned]
            parts = [found for found in parts if found.startswith("in part")]
            missed = sum("without planned sites" in found for found in parts)
            lines += [
                f"| verified: {meaning}, in every stack | {count} |",
                f"| verified in part: nothing disagrees, at least one stack is confirmed | {len(parts)} |",
                f"| both together | {count + len(parts)} |",
                f"| of those in part: it saw attention that no planned site feeds | {missed} |",
            ]
        else:
            lines.append(f"| {name}: {meaning} | {count} |")
    return lines


def table(rows: list[Row]) -> str:
    """One line for each type."""
    lines = ["| type | model | sites | checks |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row.type):
        plan = f"{row.sites} in {len(row.stacks)}" if row.plan == "planned" else row.plan
        cells = [f"`{row.type}`", row.model, plan, _checked(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _checked(row: Row) -> str:
    """What a type passed, and the reason where it did not."""
    known = {"yes": "yes", "in ": "in part", "": "not reached"}
    marks = {name: known.get(row.checks.get(name, "")[:3], "no") for name in CHECKS}
    reasons = [row.why] if row.why else []
    for name in CHECKS:
        found = row.checks.get(name, "")
        if found not in ("", "yes"):
            reasons.append(f"{name}: {_plain(found.removeprefix('yes, but '))}")
    why = shorten(_plain("; ".join(reasons)), 160).replace("|", "\\|")
    return summary(marks, why) if row.plan == "planned" else why


def summary(marks: dict[str, str], why: str) -> str:
    """Which checks passed, in words."""
    passed = [name for name, mark in marks.items() if mark == "yes"]
    if len(passed) == len(marks):
        return f"all; {why}" if why else "all"
    if len(passed) > len(marks) / 2:
        return f"all but {why}"
    return f"{', '.join(passed) or 'none'}; {why}"


def _plain(text: str) -> str:
    """A reason without the table of a report and without folders."""
    head, _, rest = text.partition("stack sites calls heads agreed coupled")
    return re.sub(r"(?<![\w.])(?:/[\w.~-]+)+/", "", head + _findings(rest) if rest else text)


def _findings(report: str) -> str:
    """What a report says below its table."""
    names = "|".join(("NOT CONFIRMED ", " confirmed "))
    found = re.split(names, report)[-1]
    return found if ":" in found else "not every stack was reached"


def write_table(rows: list[Row]) -> None:
    """Write ``docs/models-table.md``."""
    parts = [
        "---\nhide-toc: true\n---",
        "# Every model type",
        "Made by `python benchmarks/survey/survey.py`; how to read it is in [Models](models.md).",
        "\n".join(totals(rows)),
        "Below, sites are counted over all stacks, and the checks are those of the table above.",
        "::::{container} wide filter",
        table(rows),
        "::::",
    ]
    TABLE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    """Survey the types asked for and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--types", default="", help="comma-separated types")
    parser.add_argument("--sample", type=int, default=0, help="a fixed sample of so many types")
    parser.add_argument("--seconds", type=float, default=2400, help="stop after this time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one type")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--meta-only", action="store_true", help="only look the sites up")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--verbose", action="store_true", help="print every row")
    options = parser.parse_args()
    partial = bool(options.types or options.sample or options.meta_only)
    types = options.types.split(",") if options.types else zoo.model_types()
    types = sample(options.sample) if options.sample else types
    if options.fresh and not partial:
        ROWS.unlink(missing_ok=True)
    known = {} if partial else read_rows()
    todo = [model_type for model_type in types if model_type not in known]
    rows = dict(known)
    found = survey(
        todo,
        meta_only=options.meta_only,
        workers=options.workers,
        seconds=options.seconds,
        limit=options.limit,
    )
    for row in found:
        rows[row.type] = row
        failed = {k: v for k, v in row.checks.items() if v not in ("yes", "not available")}
        if options.verbose:
            print(f"{len(rows):4d} {row.type:40s} {row.plan:12s} {row.seconds:6.1f} s  {row.why}"
                  f"{json.dumps(failed) if failed else ''}", flush=True)  # fmt: skip
        if not partial:
            with ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    print("\n".join(totals(list(rows.values()))))
    missing = [model_type for model_type in types if model_type not in rows]
    if missing:
        # A table of some types would look like one of all.
        raise SystemExit(f"{len(missing)} of {len(types)} types are left; run this again")
    if not partial:
        write_table([rows[model_type] for model_type in types])


if __name__ == "__main__":
    main()
