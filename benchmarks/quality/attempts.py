"""What was tried beyond the library's defaults: other starts, and the published head side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from tasks import Task, autocast
from torch import Tensor, nn
from torch.nn.functional import linear

import lortalib
from lortalib.decomp import Legs, Shape, cp, fit

#: Batches whose mean gradient gives directions.
BATCHES = 4


def first_batches(task: Task, seed: int) -> Iterator[Any]:
    """Rows drawn like those of a training, otherwise."""
    return islice(task.batches(seed + 1000), BATCHES)


def align_to_gradient(model: nn.Module, task: Task, seed: int) -> None:
    """Point the adapter along the gradient of the first batches."""
    rows = first_batches(task, seed)
    lortalib.nn.align_to_gradient(model, rows, loss=lambda some: loss(model, task, some))


def loss(model: nn.Module, task: Task, rows: Any) -> Tensor:
    """As in a training."""
    with autocast():
        return task.loss(model, rows)


def gradient(task: Task, seed: int) -> tuple[Tensor, tuple[str, ...]]:
    """The gradient of the loss by T itself, and the names of its axes.

    `lortalib.nn.align_to_gradient` keeps this tensor to itself and has no directions for CP. A network of
    one parameter that has every mode is T, so its gradient is the tensor of all gradients of weights.
    """
    model, new = task.fresh(seed)
    line = "layer head matrix in out"
    adapter = lortalib.nn.apply(model, line, 1, train_also=new)
    for rows in first_batches(task, seed):
        (loss(model, task, rows) / BATCHES).backward()
    (network,) = adapter.networks.values()
    (parameter,) = network.parameters()
    assert parameter.grad is not None
    return parameter.grad, tuple(line.split())


class FromGradient:
    """Start CP with the directions of CP of the gradient, TensorPEFT's idea; the update is zero.

    Columns have the common size of lortalib's own start, so that only directions differ.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def __call__(
        self, legs: Legs, sizes: Mapping[str, int], modes: Sequence[str], randn: Any
    ) -> list[Tensor]:
        """Tensors for the parameters of a line of CP."""
        found, names = gradient(self.task, self.seed)
        torch.manual_seed(self.seed)
        fitted = fit(
            -found / found.norm(),
            "cp",
            sizes["r"],
            modes=names,
            start="random",
            sweeps=30,
            generator=torch.Generator().manual_seed(self.seed),
        )
        directions = {name: p.detach() for name, p in fitted.network.named_parameters()}
        # The library's own start says how large each parameter is.
        own = cp(Shape({mode: sizes[mode] for mode in modes}), sizes["r"])
        tensors = []
        for name, parameter in own.named_parameters():
            column = directions[name]
            rms = parameter.detach().square().mean().sqrt()
            tensors.append(column / column.square().mean(0).sqrt() * rms)
        return tensors


class PublishedSide(nn.Module):
    """CP with heads on the input of all four matrices, as LoRTA's published code for GLUE has it.

    Args:
        model: its projections must be square.
        rank: of CP.
        seed: of the start, which is the library's own.
    """

    def __init__(self, model: nn.Module, rank: int, seed: int) -> None:
        super().__init__()
        sites = lortalib.nn.sites(model)
        first = sites[0]
        sizes = {
            "layer": 1 + max(s.layer for s in sites),
            "head": first.heads,
            "matrix": 4,
            "in": first.width,
            "out": first.head_dim,
        }
        self.network = cp(Shape(sizes), rank, generator=torch.Generator().manual_seed(seed))
        for site in sites:
            if site.heads * site.head_dim != site.width:
                raise ValueError(f"{site.path} is not square; the published code would not run")
            model.get_submodule(site.path).register_forward_hook(self._share(site))

    def _share(self, site: lortalib.nn.Site) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            part = self.network.select(layer=site.layer, matrix="qkvo".index(site.role))
            # (head, in, out) to a weight (in, head out): heads on its input, for o and for all.
            weight = part.dense().permute(1, 0, 2).flatten(1)
            return output + linear(args[0], weight.to(args[0].dtype))

        return hook
