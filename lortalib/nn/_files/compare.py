"""Compares the updates of two saved adapters, of any formats, LoRAs among them.

Every adapter is a set of low-rank pairs, one for each module. A module that an adapter leaves alone has the
update zero, so adapters on unlike modules compare as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

from .._hub import HubPlace, each_place, local_folder
from .folder import FILES, is_lora
from .load import read
from .lora_file import LowRank, open_lora
from .lora_pairs import lora_pairs


@dataclass(frozen=True)
class Difference:
    """The difference of two adapters at one module.

    Attributes:
        module: the path of the module; for a value that trained as a whole, its name in the model.
        one: the norm of the first adapter's update; 0 if it leaves the module alone.
        other: the norm of the second adapter's update.
        distance: the norm of the difference of both updates.
    """

    module: str
    one: float
    other: float
    distance: float

    @property
    def relative(self) -> float:
        """The distance in units of the larger norm: 0 for equal updates, 1 if one of them is zero."""
        largest = max(self.one, self.other)
        return self.distance / largest if largest else 0.0


@torch.no_grad()
def compare_updates(
    one: str | PathLike[str],
    other: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    revision: str | Sequence[str | None] | None = None,
    token: str | bool | None = None,
    subfolder: str | Sequence[str | None] | None = None,
    task: str | None = None,
    other_task: str | None = None,
) -> list[Difference]:
    """Compare two saved adapters, module by module; neither needs a model on which it runs.

    Args:
        one: a folder or repository of an adapter, of lortalib or PEFT, or of a LoRA.
        other: the same.
        model: the model whose weights a tensor on the stream acts through.
        revision: a branch, tag or commit of each repository, by default ``main``; or a pair of them, where
            None is the default.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in each repository, or below each local folder, that has the files; or a pair
            of them, where ``"."`` is the top.
        task: the task of the first adapter, if it has several.
        other_task: the task of the second.

    Returns:
        A `Difference` for each module that either of them updates.

    Raises:
        FileNotFoundError: a folder has no adapter.
        AdapterFileError: a file is damaged.
        ValueError: adapters of models of different sizes; an adapter on the stream and no model; or weights
            that have no low-rank pair (packed experts); a task is asked for and the adapter has none, or it
            has several and none is asked for.
        KeyError: an adapter has other tasks.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2, init="normal")
        >>> here, there = adapter.save(tempfile.mkdtemp()), adapter.export_lora(tempfile.mkdtemp())
        >>> found = compare_updates(here, there)
        >>> len(found), max(each.relative for each in found) < 1e-5
        (8, True)
    """
    here, there = each_place(2, revision, token, subfolder)
    mine, own = _read(one, model, here, task)
    theirs, others = _read(other, model, there, other_task)
    for path in mine.keys() & theirs.keys():
        a, b = ((len(each.b), each.a.shape[1]) for each in (mine[path], theirs[path]))
        if a != b:
            raise ValueError(
                f"{path} is a matrix of {a[0]} x {a[1]} for {one}, and of {b[0]} x {b[1]} for "
                f"{other}: they are adapters of different models"
            )
    found = [
        Difference(
            path,
            _norm(mine.get(path)),
            _norm(theirs.get(path)),
            _norm(mine.get(path), theirs.get(path)),
        )
        for path in dict.fromkeys([*mine, *theirs])
    ]
    for name in dict.fromkeys([*own, *others]):
        values = own.get(name), others.get(name)
        found.append(Difference(name, _size(values[0]), _size(values[1]), _gap(*values)))
    return found


def _read(
    folder: str | PathLike[str], model: nn.Module | None, place: HubPlace, task: str | None
) -> tuple[Mapping[str, LowRank], Mapping[str, Tensor]]:
    """Read the low-rank pairs of an adapter by module, and the values that trained as a whole by name."""
    folder = local_folder(folder, FILES, **place)
    if is_lora(folder):
        if task is not None:
            raise ValueError(f"{folder} is a LoRA and has no tasks; leave out the task {task!r}")
        with open_lora(folder) as file:
            return file.read()
    adapter = read(folder, task=task)
    pairs = {path: LowRank(a, b) for path, a, b in lora_pairs(adapter, model)}
    values = adapter.trained_modules.values(None)
    whole = {f"{path}.{own}": t for path, each in values.items() for own, t in each.items()}
    return pairs, whole


def _norm(pair: LowRank | None, minus: LowRank | None = None) -> float:
    """Compute the Frobenius norm of B A, or of the difference of two such products, without forming them.

    The norm is that of the product of two triangular matrices, which loses no digits to cancellation, as
    the product of Gram matrices would.
    """
    a = [each.a.double() for each in (pair, minus) if each is not None]
    b = [sign * each.b.double() for sign, each in ((1, pair), (-1, minus)) if each is not None]
    if not a:
        return 0.0
    right = torch.linalg.qr(torch.cat(a).mT, mode="r").R
    left = torch.linalg.qr(torch.cat(b, dim=1), mode="r").R
    return float((left @ right.mT).norm())


def _size(value: Tensor | None) -> float:
    return 0.0 if value is None else float(value.double().norm())


def _gap(one: Tensor | None, other: Tensor | None) -> float:
    """Compute the distance of two values; one that is missing, or of another shape, is all that differs."""
    if one is None or other is None or one.shape != other.shape:
        return _size(one) + _size(other)
    return float((one.double() - other.double()).norm())
