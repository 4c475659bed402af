"""Defines the commands that test an adapter: ``check``, ``verify`` and ``compare``."""

from __future__ import annotations

import math
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import nn as lnn
from ..nn import AdapterFileError
from ..nn.door import Difference, HubPlace, compare_updates, each_place
from ._models import base_of, example_inputs, load, shape_of
from ._output import Output
from ._place import place, places
from ._task import check_task


def check(options: Namespace, output: Output) -> bool:
    """Check that an adapter is sound, and fits a model: ``check FOLDER``."""
    _refuse_code_that_a_file_names(options)
    folder, where = options.folder, place(options)
    findings: dict[str, Any] = {"adapter": folder, "sound": False, "fits": None, "why": None}
    try:
        adapter = lnn.read(folder, **where)
        named = lnn.read_description(folder, **where)["base_model"].get("name")
        findings["sound"] = True
    except (AdapterFileError, FileNotFoundError) as error:
        findings["why"] = str(error)
        output.show(findings, [findings])
        return False
    findings["trainable parameters"] = adapter.count()
    name = options.model or named
    if options.model or (named and _is_folder(named)):
        findings["model"] = name
        try:
            lnn.load(shape_of(base_of(options, name)), folder, **where)
            findings["fits"] = True
        except (OSError, ValueError, ImportError) as error:
            # Without --model, a failure to load says nothing against the adapter.
            findings["fits"] = False if options.model else None
            findings["why"] = str(error).strip().partition("\n\n")[0]
    elif named:
        findings["why"] = f"the model {named!r} was not looked up; give it as --model to do so"
    else:
        findings["why"] = "the file names no model; give one as --model"
    output.show(findings, [findings])
    return findings["fits"] is not False


def _refuse_code_that_a_file_names(options: Namespace) -> None:
    if options.trust_remote_code and not options.model:
        raise ValueError(
            "--trust-remote-code goes with --model only: the file of an adapter names no code to run"
        )


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # the system allows no folder of this name
        return False


def verify(options: Namespace, output: Output) -> bool:
    """Load an adapter on its model and check effect, merge and export: ``verify FOLDER``."""
    _refuse_code_that_a_file_names(options)
    description = lnn.read_description(options.folder, **place(options))
    check_task(options.folder, description["tasks"], options.task)
    named = description["base_model"].get("name")
    name = options.model or (named if named and _is_folder(named) else None)
    if name is None:
        raise ValueError(
            f"the file names the model {named!r}, which is no folder here and was not looked up; give it as "
            "--model"
        )
    model = load(base_of(options, name), options.dtype).eval()
    adapter = lnn.load(model, options.folder, **place(options), task=options.task)
    inputs = example_inputs(model)

    def forward() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**inputs)[0].double()
            return found

    try:
        adapted = forward()
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on {', '.join(inputs)} alone ({error}). Check it from "
            "Python, with lortalib.nn.check_effect(adapter, inputs)"
        ) from error
    with adapter.disabled():
        base = forward()

    def near(other: Tensor) -> str:
        gap = float((other - adapted).abs().max() / adapted.abs().max())
        return f"{'ok' if gap <= options.tolerance else 'FAILED'}: differs by {gap:.1e}"

    rows = {
        "changes the output": f"by {float((adapted - base).abs().max() / base.abs().max()):.1e}",
        "every tensor has an effect": _effect(lnn.check_effect(adapter, inputs)),
        "merged = adapted": _attempt(lambda: _merged(adapter, forward, near)),
        "unmerged = base, bit for bit": _attempt(lambda: _unmerged(adapter, forward, base)),
        "exported LoRA = adapted": _attempt(lambda: _exported(adapter, forward, near)),
    }
    about = {"adapter": options.folder, "model": name, "class": type(model).__name__}
    output.show({**about, "checks": rows}, [about], [{"check": k, "": v} for k, v in rows.items()])
    return not any(row.startswith("FAILED") for row in rows.values())


def _attempt(step: Callable[[], str]) -> str:
    """Run one check; what lortalib refuses with a reason is no failure."""
    try:
        return step()
    except ValueError as error:
        return f"not possible: {error}"


def _effect(found: dict[str, bool]) -> str:
    silent = [name for name, has_effect in found.items() if not has_effect]
    return f"FAILED: {', '.join(silent)} changes nothing" if silent else "ok"


def _merged(adapter: lnn.Adapter, forward: Callable[[], Tensor], near: Any) -> str:
    adapter.merge()
    return str(near(forward()))


def _unmerged(adapter: lnn.Adapter, forward: Callable[[], Tensor], base: Tensor) -> str:
    adapter.unmerge()
    with adapter.disabled():
        return "ok" if torch.equal(forward(), base) else "FAILED: the output is another"


def _exported(adapter: lnn.Adapter, forward: Callable[[], Tensor], near: Any) -> str:
    model = adapter.model
    with tempfile.TemporaryDirectory() as folder:
        adapter.export_lora(folder)
        adapter.disable()
        lora = lnn.load_lora(model, folder, name="exported")
    found = str(near(forward()))
    lora.remove()
    return found


def compare(options: Namespace, output: Output) -> bool:
    """Compare the updates of two adapters, or of an adapter and its LoRA: ``compare A B``."""
    where = places(options)
    for name, task, each in zip("ab", (options.task_a, options.task_b), each_place(2, **where)):
        folder = getattr(options, name)
        check_task(folder, _tasks_of(folder, each), task, f"--task-{name}")
    model = load(base_of(options, options.model), "float32") if options.model else None
    found = compare_updates(
        options.a,
        options.b,
        model,
        **where,
        task=options.task_a,
        other_task=options.task_b,
    )
    rows = [
        {"module": d.module, "norm of A": d.one, "norm of B": d.other, "distance": d.distance,
         "relative": d.relative}
        for d in sorted(found, key=lambda d: -d.relative)
    ]  # fmt: skip
    about: dict[str, Any] = {
        "A": options.a,
        "B": options.b,
        "modules": len(found),
        "alike": sum(d.relative <= options.tolerance for d in found),
        "relative distance": _total(found),
    }
    shown = rows if options.all else rows[:10]
    output.show({**about, "differences": rows}, [about], shown)
    if len(shown) < len(rows):
        output.say(f"the {len(shown)} modules that differ most; --all lists every one")
    return all(d.relative <= options.tolerance for d in found)


def _tasks_of(folder: str, where: HubPlace) -> Sequence[str]:
    """Return the tasks of an adapter; a LoRA has none."""
    try:
        tasks: Sequence[str] = lnn.read_description(folder, **where)["tasks"]
    except (AdapterFileError, FileNotFoundError):  # a LoRA, or nothing that `compare_updates` reads
        return ()
    return tasks


def _total(found: list[Difference]) -> float:
    """Return the distance of all updates together, in units of the larger norm."""
    one, other, distance = (
        math.hypot(*(getattr(d, field) for d in found)) for field in ("one", "other", "distance")
    )
    return distance / (max(one, other) or 1.0)
