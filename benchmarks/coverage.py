"""Which transformers model types does `lortalib.nn` cover? One row for each registered type.

Every type is built from its default config on the meta device and its attention projections are
looked up; then a tiny one is built on the CPU, run, verified by the probe, adapted, differentiated,
merged, unmerged, saved, loaded and freed of the adapter again. Each type runs in a worker process
with a time limit, so a crash or a hang costs one row. Rows are kept in ``coverage.jsonl``; a run that
was stopped goes on where it was.

    python benchmarks/coverage.py                    all types; writes docs/models-table.md
    python benchmarks/coverage.py --types bert,t5    some; --verbose prints their rows
    python benchmarks/coverage.py --sample 60        a fixed sample
    python benchmarks/coverage.py --meta-only        only the first column
    python benchmarks/coverage.py --fresh            forget the rows that are there
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import re
import sys
import tempfile
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

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
import zoo
from torch import Tensor, nn

import lortalib
from lortalib.nn import AnatomyError, Group, Site
from lortalib.nn._share import stored_weight

ROWS = Path(__file__).with_suffix(".jsonl")
TABLE = Path(__file__).parents[1] / "docs" / "models-table.md"
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
                row.checks.setdefault("built", _shorten(why))
            else:
                row.plan, row.why = "crash", _shorten(why)
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
    except AnatomyError as error:
        message = str(error)
        row.plan = "no attention" if message.startswith("no attention") else "refused"
        row.why = "" if row.plan == "no attention" else message
    else:
        row.plan, row.sites = "planned", len(found)
        row.stacks = list(dict.fromkeys(site.stack for site in found))


def _run(row: Row) -> None:
    """The other questions, of a tiny model."""
    example = _example(row)
    if example is None:
        return
    model, inputs = example
    before = _state(model)
    checks: dict[str, Callable[[], str]] = {}
    trial: list[Trial] = []

    def trying() -> Trial:
        if not trial:
            trial.append(Trial(row, model, inputs, before))
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
            row.checks[name] = _shorten(f"{type(error).__name__}: {error} ({place})")
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
            output = _forward(model, inputs)
            if not _tensors(output):
                raise ValueError("the output holds no floating-point tensor")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            reasons.setdefault("forward", _shorten(f"{type(error).__name__}: {error} ({place})"))
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
        return _shorten(f"disagrees: {report}")
    return "yes" if report.complete else _shorten(f"in part: {report}")


class Trial:
    """One adapter on a tiny model; every method is a check and returns why it failed, or ''."""

    def __init__(
        self, row: Row, model: nn.Module, inputs: dict[str, Any], before: dict[str, Tensor]
    ) -> None:
        self.row, self.model, self.inputs, self.before = row, model, inputs, before
        self.base = _forward(model, inputs)
        generator = torch.Generator().manual_seed(0)
        self.adapter = lortalib.nn.apply(model, "cp", 4, init="normal", generator=generator)
        self._scale()
        self.adapted = _forward(model, inputs)

    def _scale(self) -> None:
        """Bring each update to a tenth of its weight's size, whatever the sizes are."""
        for group in self.adapter.groups:
            network = self.adapter.network(group)
            size = network.parameters()
            norm = max(self.adapter.delta(site).detach().square().mean().sqrt().item()
                       for site in group.sites)  # fmt: skip
            factors = list(size)
            wanted = 0.1 / math.sqrt(group.sites[0].width)
            with torch.no_grad():
                for factor in factors:
                    factor *= (wanted / max(norm, 1e-12)) ** (1 / len(factors))

    def moves(self) -> str:
        """The output differs from the base's."""
        distance = _distance(self.adapted, self.base)
        return "" if distance > 1e-6 else f"relative change {distance:.1e}"

    def gradient(self) -> str:
        """Every factor gets a gradient, in each layer, role and head where the base's weight does."""
        weights = {site: stored_weight(self.model, site) for site in self.adapter.sites}
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            output = _run_forward(self.model, self.inputs)
            tensors = [t for t in _tensors(output) if t.requires_grad]
            if not tensors:
                return "the output depends on no projection"
            generator = torch.Generator().manual_seed(2)
            noise = (torch.randn(t.shape, generator=generator).to(t.dtype) for t in tensors)
            sums = [(torch.nan_to_num(t) * r).sum() for t, r in zip(tensors, noise)]
            torch.stack([s.float() for s in sums]).sum().backward()
            used = {site for site, weight in weights.items() if _has_gradient(weight, site)}
            return self._missing(used)
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
                weight.grad = None
            for parameter in self.adapter.parameters():
                parameter.grad = None

    def _missing(self, used: set[Site]) -> str:
        missing, idle = [], []
        for group in self.adapter.groups:
            active = [site for site in group.sites if site in used]
            if active:
                missing += [f"{group.name} {text}" for text in self._zeros(group, active)]
            else:
                idle.append(group.name)
        if missing:
            return _shorten(f"none in {'; '.join(missing)}")
        if len(idle) == len(self.adapter.groups):
            return "the output depends on no projection"
        return f"yes, but the output does not depend on {', '.join(idle)}" if idle else ""

    def _zeros(self, group: Group, active: list[Site]) -> Iterator[str]:
        """Factors without gradient, and entries of their modes other than in and out."""
        network = self.adapter.network(group)
        expected = {
            "layer": {group.layers.index(site.layer) for site in active},
            "matrix": {group.roles.index(site.role) for site in active},
            "head": set(range(group.heads)),
        }
        for (name, factor), term in zip(network.named_parameters(), network.legs.terms):
            gradient = torch.zeros_like(factor) if factor.grad is None else factor.grad
            if not gradient.abs().max() > 0:
                yield f"{name}, nowhere"
                continue
            for axis, leg in enumerate(term.legs):
                size = gradient.movedim(axis, 0).reshape(factor.shape[axis], -1).abs().amax(1)
                zero = [k for k in sorted(expected.get(leg, ())) if not size[k] > 0]
                names = [group.roles[k] if leg == "matrix" else str(k) for k in zero]
                if zero:
                    yield f"{name}, {leg} {' '.join(names)}"

    def merged(self) -> str:
        """The same output from the weights alone."""
        self.adapter.merge()
        distance = _distance(_forward(self.model, self.inputs), self.adapted)
        return "" if distance < 1e-3 else f"relative difference {distance:.1e}"

    def unmerged(self) -> str:
        """The base has every bit again."""
        self.adapter.unmerge()
        changed = _changed(self.before, _without_adapter(self.model))
        return _shorten(f"changed: {', '.join(changed)}") if changed else ""

    def loaded(self) -> str:
        """A fresh model with the file computes the same."""
        fresh = zoo.build(self.row.type, self.row.size, "cpu")
        with tempfile.TemporaryDirectory() as folder:
            self.adapter.save(folder)
            lortalib.nn.load(fresh, folder)
        distance = _distance(_forward(fresh, self.inputs), self.adapted)
        return "" if distance < 1e-6 else f"relative difference {distance:.1e}"

    def removed(self) -> str:
        """Names, order and bits of the state, and the output, are the base's."""
        self.adapter.remove()
        after = _state(self.model)
        if list(after) != list(self.before):
            return "the names or the order of the state differ"
        changed = _changed(self.before, after)
        if changed:
            return _shorten(f"changed: {', '.join(changed)}")
        distance = _distance(_forward(self.model, self.inputs), self.base)
        return "" if distance == 0 else f"relative difference of outputs {distance:.1e}"


# Helpers


def _run_forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)  # some models draw noise
    return model(**copy.deepcopy(dict(inputs)))  # some change their inputs


def _forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    with torch.no_grad():
        return _run_forward(model, inputs)


def _tensors(output: Any) -> list[Tensor]:
    """Every floating-point tensor of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in _tensors(value)]
    return []


def _distance(one: Any, other: Any) -> float:
    """The largest relative difference of two outputs; infinite where their shapes differ."""
    ones, others = _tensors(one), _tensors(other)
    if [t.shape for t in ones] != [t.shape for t in others]:
        return math.inf
    distances = [0.0]
    for a, b in zip(ones, others):
        a, b = torch.nan_to_num(a.double()), torch.nan_to_num(b.double())
        distances.append(((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item())
    return max(distances)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _without_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model under the base's own names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("lortalib."):
            state[re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)] = tensor
    return state


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    names = set(before) ^ set(after)
    both = (name for name in before if name in after)
    return sorted(names) + [n for n in both if not torch.equal(bits(before[n]), bits(after[n]))]


def _has_gradient(weight: Tensor, site: Site) -> bool:
    """Whether the output depends on the site's own part of its weight."""
    if weight.grad is None:
        return False
    gradient = weight.grad if site.writer == site.transposed else weight.grad.mT
    if site.rows is not None:
        gradient = gradient[..., site.rows.index(), :]
    return bool(gradient.abs().max() > 0)


def _shorten(text: str, length: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


# The survey


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
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(
                target=_serve, args=(theirs, self.meta_only), daemon=True
            )
            self.process.start()
            theirs.close()
            self.pipe.recv()  # it has started
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
    head = ["type", "model", "sites", "stacks", *CHECKS, "why not"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in sorted(rows, key=lambda row: row.type):
        marks, reasons = [], [row.why] if row.why else []
        for name in CHECKS:
            found = row.checks.get(name, "")
            known = {"yes": "yes", "in ": "in part", "": ""}
            marks.append(known.get(found[:3], "no"))
            if found not in ("", "yes"):
                reasons.append(f"{name}: {_plain(found.removeprefix('yes, but '))}")
        plan = str(row.sites) if row.plan == "planned" else row.plan
        why = _shorten(_plain("; ".join(reasons)), 160).replace("|", "\\|")
        cells = [f"`{row.type}`", row.model, plan, str(len(row.stacks) or ""), *marks, why]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
        "# Every model type",
        "Made by `python benchmarks/coverage.py`; how to read it is in [Models](models.md).",
        "\n".join(totals(rows)),
        table(rows),
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
    if not partial:
        write_table([rows[t] for t in types if t in rows])


if __name__ == "__main__":
    main()
