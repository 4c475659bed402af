"""One adapter on one tiny model: does it act, learn, merge, load, and leave no trace?"""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

import lortalib
from lortalib.nn import Group, Site


def stored_weight(model: nn.Module, site: Site) -> Tensor:
    """The weight of a site as it is stored, also where an adapter's update is added to it when read."""
    module = model.get_submodule(site.path)
    if is_parametrized(module, site.parameter):
        return module.parametrizations[site.parameter].original
    return module._parameters[site.parameter]


class Trial:
    """One adapter on a tiny model; every method is a check and returns why it failed, or ''."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        model: nn.Module,
        inputs: dict[str, Any],
        before: dict[str, Tensor],
    ) -> None:
        self.build, self.model, self.inputs, self.before = build, model, inputs, before
        self.base = forward(model, inputs)
        generator = torch.Generator().manual_seed(0)
        self.adapter = lortalib.nn.apply(model, "cp", 4, init="normal", generator=generator)
        self._scale()
        self.adapted = forward(model, inputs)

    def _scale(self) -> None:
        """Bring each update to a tenth of its weight's size, whatever the sizes are."""
        for group in self.adapter.groups:
            network = self.adapter.network(group)
            size = network.parameters()
            norm = max(self.adapter.delta(site).detach().square().mean().sqrt().item()
                       for site in group.sites)  # fmt: skip
            factors = list(size)
            wanted = 0.1 / math.sqrt(group.sites[0].width)
            with torch.no_grad():
                for factor in factors:
                    factor *= (wanted / max(norm, 1e-12)) ** (1 / len(factors))

    def moves(self) -> str:
        """The output differs from the base's."""
        distance = _distance(self.adapted, self.base)
        return "" if distance > 1e-6 else f"relative change {distance:.1e}"

    def gradient(self) -> str:
        """Every factor gets a gradient, in each layer, role and head where the base's weight does."""
        weights = {site: stored_weight(self.model, site) for site in self.adapter.sites}
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            output = run_forward(self.model, self.inputs)
            tensors = [t for t in tensors_of(output) if t.requires_grad]
            if not tensors:
                return "the output depends on no projection"
            generator = torch.Generator().manual_seed(2)
            noise = (torch.randn(t.shape, generator=generator).to(t.dtype) for t in tensors)
            sums = [(torch.nan_to_num(t) * r).sum() for t, r in zip(tensors, noise)]
            torch.stack([s.float() for s in sums]).sum().backward()
            used = {site for site, weight in weights.items() if _has_gradient(weight, site)}
            return self._missing(used)
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
                weight.grad = None
            for parameter in self.adapter.parameters():
                parameter.grad = None

    def _missing(self, used: set[Site]) -> str:
        missing, idle = [], []
        for group in self.adapter.groups:
            active = [site for site in group.sites if site in used]
            if active:
                missing += [f"{group.name} {text}" for text in self._zeros(group, active)]
            else:
                idle.append(group.name)
        if missing:
            return shorten(f"none in {'; '.join(missing)}")
        if len(idle) == len(self.adapter.groups):
            return "the output depends on no projection"
        return f"yes, but the output does not depend on {', '.join(idle)}" if idle else ""

    def _zeros(self, group: Group, active: list[Site]) -> Iterator[str]:
        """Factors without gradient, and entries of their modes other than in and out."""
        network = self.adapter.network(group)
        expected = {
            "layer": {group.layers.index(site.layer) for site in active},
            "matrix": {group.roles.index(site.role) for site in active},
            "head": set(range(group.heads)),
        }
        for (name, factor), term in zip(network.named_parameters(), network.legs.terms):
            gradient = torch.zeros_like(factor) if factor.grad is None else factor.grad
            if not gradient.abs().max() > 0:
                yield f"{name}, nowhere"
                continue
            for axis, leg in enumerate(term.legs):
                size = gradient.movedim(axis, 0).reshape(factor.shape[axis], -1).abs().amax(1)
                zero = [k for k in sorted(expected.get(leg, ())) if not size[k] > 0]
                names = [group.roles[k] if leg == "matrix" else str(k) for k in zero]
                if zero:
                    yield f"{name}, {leg} {' '.join(names)}"

    def merged(self) -> str:
        """The same output from the weights alone."""
        self.adapter.merge()
        distance = _distance(forward(self.model, self.inputs), self.adapted)
        return "" if distance < 1e-3 else f"relative difference {distance:.1e}"

    def unmerged(self) -> str:
        """The base has every bit again."""
        self.adapter.unmerge()
        changed = _changed(self.before, _without_adapter(self.model))
        return shorten(f"changed: {', '.join(changed)}") if changed else ""

    def loaded(self) -> str:
        """A fresh model with the file computes the same."""
        fresh = self.build()
        with tempfile.TemporaryDirectory() as folder:
            self.adapter.save(folder)
            lortalib.nn.load(fresh, folder)
        distance = _distance(forward(fresh, self.inputs), self.adapted)
        return "" if distance < 1e-6 else f"relative difference {distance:.1e}"

    def removed(self) -> str:
        """Names, order and bits of the state, and the output, are the base's."""
        self.adapter.remove()
        after = state_of(self.model)
        if list(after) != list(self.before):
            return "the names or the order of the state differ"
        changed = _changed(self.before, after)
        if changed:
            return shorten(f"changed: {', '.join(changed)}")
        distance = _distance(forward(self.model, self.inputs), self.base)
        return "" if distance == 0 else f"relative difference of outputs {distance:.1e}"


# Helpers


def run_forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)  # some models draw noise
    return model(**copy.deepcopy(dict(inputs)))  # some change their inputs


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    with torch.no_grad():
        return run_forward(model, inputs)


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors_of(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in tensors_of(value)]
    return []


def _distance(one: Any, other: Any) -> float:
    """The largest relative difference of two outputs; infinite where their shapes differ."""
    ones, others = tensors_of(one), tensors_of(other)
    if [t.shape for t in ones] != [t.shape for t in others]:
        return math.inf
    distances = [0.0]
    for a, b in zip(ones, others):
        a, b = torch.nan_to_num(a.double()), torch.nan_to_num(b.double())
        distances.append(((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item())
    return max(distances)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _without_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model under the base's own names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("lortalib."):
            state[re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)] = tensor
    return state


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    names = set(before) ^ set(after)
    both = (name for name in before if name in after)
    return sorted(names) + [n for n in both if not torch.equal(bits(before[n]), bits(after[n]))]


def _has_gradient(weight: Tensor, site: Site) -> bool:
    """Whether the output depends on the site's own part of its weight."""
    if weight.grad is None:
        return False
    gradient = weight.grad if site.writer == site.transposed else weight.grad.mT
    if site.rows is not None:
        gradient = gradient[..., site.rows.index(), :]
    return bool(gradient.abs().max() > 0)


def shorten(text: str, length: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


# The survey
