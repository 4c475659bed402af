"""Runs a model for a check: in evaluation mode, with plain attention, and restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Enter evaluation mode; at the end, restore the modes of all modules and the random numbers."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off gradients for all parameters; at the end, restore their flags."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def with_plain_attention(model: nn.Module) -> Iterator[None]:
    """Switch configs to eager attention if their kernel hides the arithmetic; at the end, restore them."""
    name = "_attn_implementation_internal"
    configs = {id(config): config for config in _configs(model)}.values()
    asked = [(config, getattr(config, name, None)) for config in configs]
    changed = [(c, value) for c, value in asked if value not in (None, "eager", "sdpa")]
    try:
        for config, _ in changed:
            setattr(config, name, "eager")
        yield
    finally:
        for config, value in changed:
            setattr(config, name, value)


def _configs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            yield config


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split inputs into positional and keyword arguments: of a mapping, a tuple or list, or one value."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
