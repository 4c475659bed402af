"""Manages modules of the model that train as a whole with an adapter, such as a new classifier head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ._anatomy import ATTRIBUTE, module_at, named_modules
from ._offloaded import bring_back, check_unshared
from ._sharded import divide_again, divided_like

#: Path of a module, name in it, tensor.
Values = dict[str, dict[str, Tensor]]


class TrainedModules:
    """Whole modules that train in place with an adapter; the adapter owns their trained values.

    While the adapter is active the modules have the adapter's values, otherwise the base's. So a disabled
    adapter has no effect, and two adapters can each have their own head (but cannot both be active).

    Args:
        paths: paths of the modules.
        values: the adapter's values; by default the values of the modules when they are swapped in.
    """

    def __init__(self, paths: Iterable[str] = (), values: Values | None = None) -> None:
        self.paths = tuple(paths)
        self._inside = False
        self._other: Values = values or {}  # the base's values while inside, else the adapter's

    def values(self, model: nn.Module | None, copy: bool = True) -> Values:
        """Return the adapter's values by path of the module and name of the tensor.

        Args:
            model: the model that the adapter is on.
            copy: whether values that the model has are copied; else they are its own parameters.
        """
        if model is not None and (self._inside or not self._other):
            return _read(model, self.paths, copy)
        return self._other

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """List the modules."""
        return [module_at(model, path) for path in self.paths]

    def conflict(self, others: Iterable[TrainedModules]) -> str | None:
        """Return the path of a module that one of ``others`` trains too; None if there is none."""
        taken = {path for other in others for path in other.paths}
        return next((path for path in self.paths if path in taken), None)

    def set_values(self, model: nn.Module, values: Values) -> None:
        """Replace the adapter's values, in the form that `values` returns; names and shapes must agree."""
        if self._inside:
            _write(model, values)
        else:
            self._other = values

    def swap_in(self, model: nn.Module, others: Iterable[TrainedModules]) -> None:
        """Write the adapter's values into the modules and keep the base's. After an error all values are
        unchanged.

        Args:
            model: the model.
            others: the trained modules of the other active adapters.

        Raises:
            ValueError: one of the modules has the values of another active adapter, or was resized.
        """
        if self._inside:
            return
        taken = self.conflict(others)
        if taken:
            raise ValueError(
                f"{taken!r} is trained by another active adapter and can hold only one's values; "
                "disable that adapter first"
            )
        self._swap(model)

    def swap_out(self, model: nn.Module) -> None:
        """Write the base's values back into the modules and keep the adapter's. After an error all values are
        unchanged.

        Raises:
            ValueError: a module was resized meanwhile.
        """
        if self._inside:
            self._swap(model)

    def bring_back(self, model: nn.Module, also: Sequence[str] = ()) -> None:
        """Bring the modules back to the device that computes with them, if accelerate offloads them.

        Args:
            model: the model.
            also: paths of modules that another tool trains with the adapter.

        Raises:
            ValueError: one of their weights is offloaded and shared with another module.
        """
        _bring_back(model, (*self.paths, *also))

    def leave_in(self) -> None:
        """Leave the adapter's values in the modules for good."""
        self._inside, self._other = False, {}

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """List the parameters of the modules."""
        return [parameter for module in self.modules(model) for parameter in module.parameters()]

    def set_trainable(self, model: nn.Module, trainable: bool) -> None:
        """Set ``requires_grad`` of every parameter of the modules."""
        for module in self.modules(model):
            module.requires_grad_(trainable)

    def _swap(self, model: nn.Module) -> None:
        _check_shapes(model, self._other)
        present = _read(model, self.paths)
        wanted = {
            path: {name: divided_like(t, present[path][name]) for name, t in tensors.items()}
            for path, tensors in self._other.items()
        }
        try:
            _write(model, wanted)
        except BaseException:
            _write(model, present)
            raise
        self._other, self._inside = present, not self._inside


def _bring_back(model: nn.Module, paths: Sequence[str]) -> None:
    modules = [module_at(model, path) for path in paths]
    for module in modules:
        check_unshared(module)
    for module in modules:
        bring_back(module)


def _read(model: nn.Module, paths: Sequence[str], copy: bool = True) -> Values:
    divide_again(model)
    _bring_back(model, paths)
    found = {path: module_at(model, path).state_dict(keep_vars=True) for path in paths}
    if not copy:
        return found
    return {path: {k: t.detach().clone() for k, t in own.items()} for path, own in found.items()}


def _write(model: nn.Module, values: Values) -> None:
    with torch.no_grad():
        for path, tensors in values.items():
            own = module_at(model, path).state_dict()
            for name, tensor in tensors.items():
                own[name].copy_(tensor)


def _check_shapes(model: nn.Module, values: Values) -> None:
    """Refuse values whose shapes no longer fit their modules."""
    for path, tensors in values.items():
        own = module_at(model, path).state_dict()
        for name, tensor in tensors.items():
            found = tuple(own[name].shape) if name in own else None
            if found != tuple(tensor.shape):
                raise ValueError(
                    f"{path}.{name} had the shape {tuple(tensor.shape)} and now has {found}: the module was "
                    "resized or replaced after the adapter that trains it was applied. Give it its old size "
                    "back, or call remove(merged=True), which leaves the module as it is"
                )


def find_modules(model: nn.Module, names: Sequence[str], site_paths: Iterable[str]) -> list[str]:
    """Find the paths of the modules that ``names`` mean; a name is a path or the end of a path.

    Raises:
        ValueError: a name fits no module, or a module that has no parameters or contains an adapted
            projection.
    """
    if isinstance(names, str):
        names = [names]
    modules = {
        path: module
        for path, module in named_modules(model).items()
        if ATTRIBUTE not in path.split(".")
    }
    site_paths = list(site_paths)
    found: list[str] = []
    for name in names:
        fits = [path for path in modules if name and (path == name or path.endswith(f".{name}"))]
        if not fits:
            raise ValueError(
                f"train_also={name!r} fits no module; the model's own are "
                f"{', '.join(child for child, _ in model.named_children())}"
            )
        for path in fits:
            if not any(True for _ in modules[path].parameters()):
                raise ValueError(f"train_also={name!r}: {path!r} has no parameters to train")
            inner = [site for site in site_paths if site == path or site.startswith(f"{path}.")]
            if inner:
                raise ValueError(
                    f"train_also={name!r}: {path!r} holds the adapted projection {inner[0]!r}; "
                    "a weight takes an update or trains as a whole, not both"
                )
        found += [path for path in fits if path not in found]
    return [p for p in found if not any(p != q and p.startswith(f"{q}.") for q in found)]
