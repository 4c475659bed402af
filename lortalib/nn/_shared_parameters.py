"""Keeps state dicts free of duplicates if a parameter is registered under several names in a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

#: A mapping from every further name of a parameter to its first name.
Aliases = Mapping[str, str]


def find_aliases(module: nn.Module) -> dict[str, str]:
    """Find the parameters with several names in a module: each further name with the first name.

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
    """Remove the aliases from a state dict, because file formats refuse one tensor under two names."""
    for alias in aliases:
        state.pop(prefix + alias, None)


def put_back(aliases: Aliases, state: dict[str, Any], prefix: str) -> None:
    """Add missing aliases to a state dict before it is loaded."""
    for alias, owner in aliases.items():
        if prefix + owner in state:
            state.setdefault(prefix + alias, state[prefix + owner])


def share_again(module: nn.Module, aliases: Aliases) -> None:
    """Register the parameter of the first name under every alias again, after either was replaced."""
    for alias, owner in aliases.items():
        path, _, name = alias.rpartition(".")
        holder, parameter = module.get_submodule(path), module.get_parameter(owner)
        if holder._parameters[name] is not parameter:
            holder._parameters[name] = parameter
