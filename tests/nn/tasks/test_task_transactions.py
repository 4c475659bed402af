"""Every change of an adapter with tasks is a transaction: a fault leaves all as before or as after."""

import pytest
from faults import check_faults, frozen_garbage  # noqa: F401
from models import FAMILIES
from task_adapters import adapted

from lortalib.nn import adapters


def tasked():
    model = FAMILIES["Bert"].model("ForSequenceClassification").double()
    adapted(model, tasks=("a", "b"), train_also=["classifier"]).default = "a"
    return model


def merged():
    model = tasked()
    adapters(model)["default"].merge()
    return model


def verb(name, *arguments, **options):
    return lambda model: getattr(adapters(model)["default"], name)(*arguments, **options)


def add_task(model):
    adapter = adapters(model)["default"]
    if "c" not in adapter.tasks:  # the second try, behind a fault that came too late
        adapter.add_task("c", start="b")


VERBS = {
    "add_task": (tasked, add_task),
    "train_tasks": (tasked, verb("train_tasks", ["b"])),
    "merge": (tasked, verb("merge")),
    "unmerge": (merged, verb("unmerge")),
    "disable": (tasked, verb("disable")),
    "remove": (merged, verb("remove")),
    "remove and leave merged": (tasked, verb("remove", merged=True)),
}


@pytest.mark.parametrize("kind", VERBS)
def test_a_fault_leaves_all_as_before_or_as_after(kind):
    prepare, act = VERBS[kind]
    check_faults(f"tasks, {kind}", prepare(), act, 12 if kind != "train_tasks" else 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VERBS)
def test_faults_at_many_places_leave_all_as_before_or_as_after(kind):
    prepare, act = VERBS[kind]
    check_faults(f"tasks, {kind}", prepare(), act, 150)
