"""The methods of the study: lortalib's formats, the methods of HF PEFT, and the two ends.

All adapt the same sites, q, k, v and o of every layer, unless their label says otherwise.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from attempts import FromGradient, PublishedSide, align_to_gradient
from tasks import Task
from torch import nn

import lortalib

#: Learning rates are 10^(k / 2); a method's search starts where its authors' defaults are.
Parameters = list[tuple[float, list[nn.Parameter]]]


@dataclass(frozen=True)
class Method:
    """One way to train a model.

    Args:
        label: its name in the tables, unique.
        library: ``"lortalib"``, ``"peft"``, ``"frozen"`` or ``"full"``.
        start: the exponent k of the learning rate 10^(k/2) where the search begins.
        kind: format of lortalib, or name of PEFT's configuration class.
        settings: its arguments.
    """

    label: str
    library: str
    start: int
    kind: str = ""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def attach(self, model: nn.Module, task: Task, new: list[str], seed: int) -> Parameters:
        """Put the method on a model that has just been made.

        Args:
            model: it is changed in place.
            task: whose sites are meant.
            new: the modules that every method trains.
            seed: of the start.

        Returns:
            What trains besides the new modules: pairs of a factor of the learning rate and
            parameters.
        """
        torch.manual_seed(seed)
        model.requires_grad_(False)
        found = getattr(self, f"_{self.library}")(model, task, seed)
        for name in new:
            model.get_submodule(name).requires_grad_(True)
        return found

    def _frozen(self, model: nn.Module, task: Task, seed: int) -> Parameters:
        return []

    def _full(self, model: nn.Module, task: Task, seed: int) -> Parameters:
        model.requires_grad_(True)
        new = {
            id(p)
            for name in ("classifier",)
            if hasattr(model, name)
            for p in model.get_submodule(name).parameters()
        }
        return [(1.0, [p for p in model.parameters() if id(p) not in new])]

    def _peft(self, model: nn.Module, task: Task, seed: int) -> Parameters:
        settings = {"target_modules": task.sites, **self.settings}
        if "last_layers" in settings:
            settings["target_modules"] = task.last_sites(settings.pop("last_layers"))
        if self.kind == "IA3Config":
            settings["feedforward_modules"] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.get_peft_model(model, getattr(peft, self.kind)(**settings))
        return [(1.0, [p for p in wrapped.parameters() if p.requires_grad])]

    def _lortalib(self, model: nn.Module, task: Task, seed: int) -> Parameters:
        settings = dict(self.settings)
        speeds = settings.pop("speeds", {})
        along = settings.get("init") == "gradient"
        if along:
            settings["init"] = FromGradient(task, seed) if self.kind == "cp" else "invariant"
        if self.kind == "published side":
            return [(1.0, list(PublishedSide(model, settings["rank"], seed).parameters()))]
        adapter = lortalib.nn.apply(
            model, self.kind, generator=torch.Generator().manual_seed(seed), **settings
        )
        if along and self.kind != "cp":
            align_to_gradient(model, task, seed)
        groups = lortalib.nn.parameter_groups(adapter, 1.0, speeds=speeds)
        return [(group["lr"], group["params"]) for group in groups]
