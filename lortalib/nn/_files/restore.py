"""Gives an adapter on a model the values of a saved one, in place."""

from __future__ import annotations

from os import PathLike

import torch
from torch import Tensor

from ...decomp import Network
from .._adapter import Adapter
from .._sharded import divided_like
from .folder import AdapterFileError
from .load import read


def restore(adapter: Adapter, folder: str | PathLike[str]) -> None:
    """Give an adapter the values of a saved one; its parameters stay the objects that an optimiser knows.

    Args:
        adapter: an adapter on a model, not merged.
        folder: a folder that `Adapter.save` wrote for an adapter that was made with the same arguments.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: the file is damaged, or of an adapter that was made otherwise. The adapter stays
            unchanged.
    """
    saved = read(folder)
    pairs = _pairs(adapter, saved, folder)
    values = saved.trained_modules.values(None)
    own = adapter.trained_modules.values(adapter.model)
    if {p: _shapes(v) for p, v in own.items()} != {p: _shapes(v) for p, v in values.items()}:
        raise AdapterFileError(
            f"the adapter in {folder} does not fit adapter {adapter.name!r}: it trains "
            f"{', '.join(values) or 'no module'} as a whole, of other sizes or names than "
            f"{', '.join(own) or 'no module'}; apply it with the same train_also"
        )
    before = [tensor.detach().clone() for tensor, _ in pairs]
    try:
        adapter.trained_modules.set_values(adapter.model, values)
        with torch.no_grad():
            for tensor, value in pairs:
                tensor.copy_(divided_like(value.to(tensor.device, tensor.dtype), tensor))
    except BaseException:
        with torch.no_grad():
            for (tensor, _), value in zip(pairs, before):
                tensor.copy_(value)
        adapter.trained_modules.set_values(adapter.model, own)
        raise


def _pairs(
    adapter: Adapter, saved: Adapter, folder: str | PathLike[str]
) -> list[tuple[Tensor, Tensor]]:
    """Return each parameter of an adapter beside its saved value."""
    theirs, ours = saved.all_networks(), adapter.all_networks()
    for name in theirs.keys() | ours.keys():
        here, in_file = _form(ours.get(name)), _form(theirs.get(name))
        if here != in_file:
            raise AdapterFileError(
                f"the adapter in {folder} does not fit adapter {adapter.name!r}: network {name!r} is\n"
                f"    {in_file}\nin the file, and here\n    {here}\n"
                "Apply the adapter with the arguments of the saved one"
            )
    return [
        pair for name, network in ours.items() for pair in zip(network.stored, theirs[name].stored)
    ]


def _form(network: Network | None) -> tuple[str, dict[str, int]] | None:
    """Return the line of a network and the size of every leg in it; None where there is no network."""
    return None if network is None else (str(network.legs), dict(network.sizes))


def _shapes(values: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in values.items()}
