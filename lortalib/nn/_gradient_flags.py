"""Keeps the ``requires_grad`` flags that a model had before its adapters, and freezes the base for them."""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch import nn

from ._anatomy import plain_name


def set_flags(wanted: Iterable[tuple[nn.Parameter, bool]]) -> None:
    """Set the ``requires_grad`` flags of parameters; after an error all are as before.

    Args:
        wanted: parameters, each with its flag.
    """
    wanted = list(wanted)
    before = [(parameter, parameter.requires_grad) for parameter, _ in wanted]
    try:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
    except BaseException:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        raise


class GradientFlags:
    """The ``requires_grad`` flags of a model with adapters.

    Args:
        model: the model, which has no adapter yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = {plain_name(k): p.requires_grad for k, p in model.named_parameters()}
        self._freezing: set[str] = set()  # names of the adapters that keep the base frozen
        self._frozen: list[nn.Parameter] = []  # the parameters that these adapters froze

    def freeze(self, name: str, without: Container[int]) -> None:
        """Freeze the base for an adapter.

        Args:
            name: the name of the adapter.
            without: the identities of parameters that stay as they are, those of adapters.
        """
        stopped = [p for p in self._model.parameters() if p.requires_grad and id(p) not in without]
        for parameter in stopped:
            parameter.requires_grad_(False)
        self._freezing.add(name)
        self._frozen += stopped

    def forget(self, name: str) -> None:
        """Forget that the base is frozen for an adapter; `thaw` follows."""
        self._freezing.discard(name)

    def thaw(self) -> None:
        """Let the base train again if no adapter keeps it frozen."""
        if not self._freezing:
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            self._frozen = []

    def reset(self, paths: Iterable[str]) -> None:
        """Restore the flags in modules that no adapter trains any more.

        Args:
            paths: the paths of the modules.
        """
        for path in paths:
            for name, parameter in self._model.get_submodule(path).named_parameters():
                before = self._before.get(plain_name(f"{path}.{name}"), False)
                parameter.requires_grad_(before and not self._freezing)

    def restore(self) -> None:
        """Restore the flags of all parameters that the model had before."""
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._before.get(plain_name(name), parameter.requires_grad))
