"""Parameters that are registered at several places of a module: state dicts have each of them once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

#: Name of a further place of a parameter, and the name of its first place.
Aliases = Mapping[str, str]


def find_aliases(module: nn.Module) -> dict[str, str]:
    """The further places of the parameters of a module, each with the first.

    Example:
        >>> module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        >>> module["b"].weight = module["a"].weight
        >>> find_aliases(module)
        {'b.weight': 'a.weight'}
    """
    first: dict[int, str] = {}
    named = list(module.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        first.setdefault(id(parameter), name)
    return {name: first[id(p)] for name, p in named if first[id(p)] != name}


def leave_out(aliases: Aliases, state: dict[str, Any], prefix: str) -> None:
    """Take the aliases out of a state dict: formats of files refuse one memory under two names."""
    for alias in aliases:
        state.pop(prefix + alias, None)


def put_back(aliases: Aliases, state: dict[str, Any], prefix: str) -> None:
    """Give a state dict that is to be loaded the aliases that it lacks."""
    for alias, owner in aliases.items():
        if prefix + owner in state:
            state.setdefault(prefix + alias, state[prefix + owner])


def share_again(module: nn.Module, aliases: Aliases) -> None:
    """Let every alias be the parameter at the first place, whatever replaced the two."""
    for alias, owner in aliases.items():
        path, _, name = alias.rpartition(".")
        holder, parameter = module.get_submodule(path), module.get_parameter(owner)
        if holder._parameters[name] is not parameter:
            holder._parameters[name] = parameter
