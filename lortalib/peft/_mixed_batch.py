"""Batches whose rows use different adapters: the names of the rows, as each layer sees them."""

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
    """Within this context the layers of a tuner see a name for every row.

    Args:
        tuner: whose layers.
        names: a name for each row of the batch, or ``"__base__"``.
        repeats: how often generation may repeat a row (beams, several sequences); a layer that sees so
            many times the rows repeats their names.
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
        """Torch's forward pre-hook with keyword arguments."""
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = next((value for value in given if value.dim()), None)
        times, rest = divmod(len(self.names) if first is None else len(first), len(self.names))
        names = [
            n for n in self.names for _ in range(times if not rest and times in self.repeats else 1)
        ]
        return args, {**kwargs, "adapter_names": names}


def repeats_of(model: nn.Module, kwargs: Mapping[str, Any]) -> set[int]:
    """How often generation with these arguments may repeat a row.

    Args:
        model: whose generation config counts where the arguments say nothing.
        kwargs: the arguments of the call, a ``generation_config`` among them or not.
    """
    own = (kwargs.get("generation_config"), getattr(model, "generation_config", None))

    def number(name: str) -> int:
        for value in (kwargs.get(name), *(getattr(config, name, None) for config in own)):
            if isinstance(value, int) and value > 0:
                return value
        return 1

    beams, sequences = number("num_beams"), number("num_return_sequences")
    return {1, beams, sequences, beams * sequences}
