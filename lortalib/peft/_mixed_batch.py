"""Gives each layer the names of its rows, for batches whose rows use different adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

#: The name of a row that no adapter updates.
BASE = "__base__"


@contextmanager
def named_rows(tuner: nn.Module, names: Sequence[str], repeats: Iterable[int]) -> Iterator[None]:
    """Give the layers of a tuner a name for every row, within this context.

    Args:
        tuner: the tuner.
        names: a name for each row of the batch, or ``"__base__"``.
        repeats: the numbers of times that generation may repeat a row (beams, several sequences). A layer
            whose batch is so many times larger gets each name as often.
    """
    pass_names = _PassNames(tuple(names), frozenset(repeats))
    handles = []
    try:
        for module in tuner.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                handles.append(module.register_forward_pre_hook(pass_names, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _PassNames:
    """A forward pre-hook that gives a layer the names of its rows."""

    def __init__(self, names: tuple[str, ...], repeats: frozenset[int]) -> None:
        self.names, self.repeats = names, repeats

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the arguments with the names added, as torch calls a forward pre-hook with keywords."""
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = next((value for value in given if value.dim()), None)
        rows = len(self.names) if first is None else len(first)
        repeat = next((n for n in self.repeats if n * len(self.names) == rows), 1)
        names = [name for name in self.names for _ in range(repeat)]
        return args, {**kwargs, "adapter_names": names}


def repeats_of(model: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]) -> set[int]:
    """Find how often generation with these arguments may repeat a row: for its beams or for its sequences,
    whichever are more.

    Args:
        model: the model; its generation config is the default for the arguments.
        args: the positional arguments of the call, which may contain a generation config.
        kwargs: the keyword arguments of the call.
    """
    configs = [*args, kwargs.get("generation_config"), getattr(model, "generation_config", None)]

    def numbers(name: str) -> set[int]:
        found = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return {1, *(value for value in found if isinstance(value, int) and value > 0)}

    return numbers("num_beams") | numbers("num_return_sequences")
