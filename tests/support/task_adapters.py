"""Adapters of several tasks for tests, and their rows by definition."""

import copy
import warnings
from types import SimpleNamespace

import torch
from adapted import close, put
from hypothesis import strategies as st
from models import LAW_FAMILIES
from strategies import generator, mode_sets
from updates import dense_output, updates

from lortalib import decomp

TASKS = ("a", "b", "c")
FAMILIES = ["decoder", "encoder", "encoder-decoder", "fused", "fused, stored (in, out)"]
MODES = {"task", "layer", "head", "matrix", "in", "out"}
#: Every registered format that takes the mode task, on the weights or on the stream.
FORMATS = [
    name
    for name in decomp.formats
    if any({*modes} in (MODES, MODES - {"head"}) for modes in mode_sets(name))
]
LINES = [
    "task layer matrix in r, task layer matrix head out r",
    "in r (of n), head out r (of n, zero), layer matrix task r",
    "in p (frozen), task layer matrix p q, head out q (frozen)",
    "task in r, out r, head r, layer matrix r, task r",
]


def model_of(family="encoder"):
    return LAW_FAMILIES[family].model().double()


def inputs_of(family, rows=4):
    inputs = LAW_FAMILIES[family].inputs()
    draw = generator(5)
    return {
        k: torch.randint(5, 60, (rows, v.shape[1]), generator=draw) if "ids" in k
        else v[:1].expand(rows, *v.shape[1:])
        for k, v in inputs.items()
    }  # fmt: skip


def adapted(model, line="metatt_41d", rank=2, tasks=TASKS, **options):
    options = {"dtype": torch.float64, "alpha": 0.7, **options}
    return put(model, line, rank, tasks=list(tasks), **options)


def record(adapter, task):
    """What `updates` reads: the slices of the tensor at a task."""
    k = adapter.tasks.index(task)

    def network(group):
        return adapter.tensor(group).select(task=k)

    return SimpleNamespace(groups=adapter.groups, scaling=adapter.scaling, network=network)


def rows_by_definition(adapter, plain, inputs, names):
    """The outputs, each row of a model with the dense update of its task in the weights."""
    found = []
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        added = {} if name is None else updates(record(adapter, name), plain)
        found.append(dense_output(plain, added, own))
    return torch.cat(found)


def gradients(value, adapter):
    trained = [p for p in adapter.parameters() if p.requires_grad]
    noise = torch.randn(value.shape, generator=generator(1), dtype=value.dtype)
    return torch.autograd.grad((value * noise).sum(), trained, materialize_grads=True)


@st.composite
def task_lines(draw):
    """A line of legs over the modes of a model and ``task``: most modes on one or two parameters."""
    number = draw(st.integers(2, 4))
    terms = [["r"] for _ in range(number)]

    def place(leg, most):
        at = st.lists(st.integers(0, number - 1), min_size=1, max_size=most, unique=True)
        for position in draw(at):
            terms[position].append(leg)

    place("in", 1)
    for mode in MODES - {"in"}:
        place(mode, 2)
    if draw(st.booleans()):
        for position in draw(st.lists(st.integers(0, number - 1), min_size=2, unique=True)):
            terms[position].append("q")
    frozen = draw(st.sets(st.integers(0, number - 1), max_size=number - 1))
    texts = [" ".join(draw(st.permutations(term))) for term in terms]
    return ", ".join(t + " (frozen)" * (k in frozen) for k, t in enumerate(texts))


def check_rows(line, family, names, alone, **options):
    model, inputs = model_of(family), inputs_of(family)
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adapter = adapted(model, line, **options)
    source = generator(2)
    with torch.no_grad():  # a start can be constant over `in`, which a layer norm makes invisible
        for parameter in adapter.parameters():
            parameter.normal_(std=0.6, generator=source)
    expected = rows_by_definition(adapter, plain, inputs, names)
    with adapter.using(names):
        value = model(**inputs)[0]
    assert close(value.detach(), expected.detach(), 1e-8)
    wanted, found = gradients(expected, adapter), gradients(value, adapter)
    largest = max(gradient.abs().max().item() for gradient in wanted)
    assert largest > 1e-4
    for one, other in zip(found, wanted, strict=True):
        assert close(one / largest, other / largest, 1e-8)
    with adapter.using(alone):
        value = model(**inputs)[0]
    expected = rows_by_definition(adapter, plain, inputs, [alone] * 4)
    assert close(value.detach(), expected.detach(), 1e-8)
    for one, other in zip(gradients(value, adapter), gradients(expected, adapter), strict=True):
        assert close(one / largest, other / largest, 1e-8)
