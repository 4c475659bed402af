"""Divides the network of several tasks into one network for each task, and joins these again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ...decomp import Legs, Network, TensorNetwork
from .._task_lines import TASK, are_common, line_of_one_task


class TaskLine(NamedTuple):
    """The line of a tensor over tasks.

    Attributes:
        legs: the parsed line, with the mode ``task``.
        modes: the modes, in the order of the axes.
        names: the name of each parameter.
    """

    legs: Legs
    modes: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def common(self) -> tuple[bool, ...]:
        """For each term, whether all tasks have its parameter in common."""
        return are_common(self.legs)

    @property
    def owns_input(self) -> bool:
        """True if a parameter for ``in`` is a task's own."""
        common = self.common
        carriers = (k for leg in self.legs.open_legs(["in"]) for k in self.legs.carriers[leg])
        return not all(common[k] for k in carriers)


def key_of(group: str, task: str) -> str:
    """Name the network of one task of a group.

    Example:
        >>> key_of("encoder", "sst2")
        'encoder@sst2'
    """
    return f"{group}@{task}"


def divide(networks: Mapping[str, Network], tasks: Sequence[str]) -> dict[str, Network]:
    """Divide networks over tasks into a network for each task.

    A parameter without the leg ``task`` is one object in the networks of all tasks. One with it becomes a
    parameter for each task, so that a task can train while the others are frozen: an optimiser leaves alone
    what has no gradient, whatever its moments and its weight decay, but not a slice of what has one.

    Args:
        networks: the networks by the name of the group.
        tasks: the name of each position of the mode ``task``.

    Returns:
        The networks by `key_of`.

    Raises:
        LegsError: a parameter cannot be divided; see `line_of_one_task`.
    """
    made: dict[tuple[int, int], nn.Parameter] = {}
    found = {}
    for name, whole in networks.items():
        legs = line_of_one_task(whole.legs)
        modes = tuple(mode for mode in whole.modes if mode != TASK)
        sizes = {leg: size for leg, size in whole.sizes.items() if leg != TASK}
        axes = [t.legs.index(TASK) if TASK in t.legs else None for t in whole.legs.terms]
        for k, task in enumerate(tasks):
            with torch.inference_mode(False):
                values = [_part(tensor, axis, k) for tensor, axis in zip(whole.stored, axes)]
            one = Network(legs, values, modes, sizes=sizes)
            for own, tensor, axis in zip(one.names, whole.stored, axes):
                place = id(tensor), -1 if axis is None else k
                one.register_parameter(own, made.setdefault(place, one.get_parameter(own)))
            found[key_of(name, task)] = one
    return found


def _part(tensor: Tensor, axis: int | None, position: int) -> Tensor:
    tensor = tensor.detach()
    return tensor if axis is None else tensor.select(axis, position).clone()


class TaskNetwork(TensorNetwork):
    """The network over all tasks, T[task, ...], made of the networks of the tasks.

    Its operations are those of any network, and gradients reach the parameters of every task.

    Args:
        line: the line of the tensor over tasks.
        networks: the network of each task, in the order of the mode ``task``.
    """

    def __init__(self, line: TaskLine, networks: Sequence[Network]) -> None:
        self._describe(line.legs, {**networks[0].sizes, TASK: len(networks)}, line.modes)
        self.names = line.names
        self._networks = tuple(networks)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The parameters, one for each term; those with the leg ``task`` are stacked over the tasks."""
        return tuple(
            torch.stack(same, term.legs.index(TASK)) if TASK in term.legs else same[0]
            for term, same in zip(self.legs.terms, zip(*(net.stored for net in self._networks)))
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are contracted, one for each term."""
        return self.spread(self.stored)

    def spread(self, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute `tensors` from `stored`, or from others like it."""
        return self._networks[0].spread(stored)  # what is hashed carries no task


def mean_of(line: TaskLine, networks: Sequence[Network]) -> Network:
    """Make the network of a new task: its own parameters are the means of those of other tasks, and what all
    tasks have in common is common to it too.

    Args:
        line: the line of the tensor over tasks.
        networks: the networks of the other tasks.
    """
    one = networks[0]
    same = zip(*(network.stored for network in networks))
    made = one.like([torch.stack([t.detach() for t in each]).mean(0) for each in same])
    for name, is_common, parameter in zip(made.names, line.common, one.stored):
        if is_common:
            made.register_parameter(name, cast(nn.Parameter, parameter))
    return made.train(one.training)
