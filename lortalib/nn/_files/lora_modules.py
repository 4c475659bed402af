"""Fits the modules that a LoRA saved as a whole, such as a head, to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .._anatomy import ATTRIBUTE, named_modules
from .._trained_modules import TrainedModules, Values
from .fit import check_values
from .folder import AdapterFileError
from .records import short
from .tensors import TensorSpec, plain


def check_modules(
    model: nn.Module,
    names: Iterable[str],
    adapted: Iterable[str],
    specs: Mapping[str, TensorSpec],
) -> list[str]:
    """Check the tensors of a LoRA that belong to no pair against a model; no tensor is read.

    Args:
        model: the model.
        names: the paths of the saved modules, or the ends of the paths.
        adapted: the paths of the modules that have a pair.
        specs: dtype and shape of each tensor, by its name in the model.

    Returns:
        The paths of the saved modules.

    Raises:
        AdapterFileError: a tensor that no module has, or of another shape; a saved module without
            parameters, or that contains a module with a pair.
    """
    own, wanted, left = model.state_dict(), set(names), set(specs)
    found = {
        path: module for path, module in named_modules(model).items() if _is_named(path, wanted)
    }
    for path, module in found.items():
        inner = [each for each in adapted if each == path or each.startswith(f"{path}.")]
        if inner or not any(True for _ in module.parameters()):
            raise AdapterFileError(
                f"the LoRA saves the module {path} as a whole, which "
                + (f"holds {inner[0]}, that has a pair too" if inner else "has no parameters")
            )
        expected = {f"{path}.{k}": tuple(v.shape) for k, v in module.state_dict().items()}
        if {key: specs[key].shape for key in expected if key in specs} != expected:
            raise AdapterFileError(f"the LoRA's values of the module {path} do not fit the model")
        left -= expected.keys()
    for key in sorted(left):
        known = own.get(_in_model(key))
        if known is None or tuple(known.shape) != specs[key].shape:
            raise AdapterFileError(
                f"the LoRA holds the tensor {short(key)}, which is no pair, not in a module to save and "
                "not the model's own"
            )
    return list(found)


def take_modules(
    model: nn.Module, paths: Iterable[str], tensors: Mapping[str, Tensor]
) -> TrainedModules:
    """Collect the modules that a LoRA saved as a whole, with their saved values.

    Args:
        model: the model.
        paths: the paths that `check_modules` returned.
        tensors: the tensors that belong to no pair, by their name in the model.

    Raises:
        AdapterFileError: values that differ from the model's for a module that was not saved as a whole
            (PEFT writes the embedding together with a LoRA on it), or for one of several modules that
            share one weight, or beyond the dtype in which the model holds them.
    """
    values: Values = {
        path: {own: tensors[f"{path}.{own}"] for own in model.get_submodule(path).state_dict()}
        for path in paths
    }
    trained = {f"{path}.{own}" for path, each in values.items() for own in each}
    present = model.state_dict()
    for key, tensor in tensors.items():
        if key not in trained and not _equal(present[_in_model(key)], tensor):
            raise AdapterFileError(
                f"the LoRA holds other values of {short(key)} than the model, and does not list its "
                "module among those to save; is it the model that the LoRA was trained on?"
            )
    _check_ties(model, {key: tensors[key] for key in trained})
    check_values(model, values)
    return TrainedModules(tuple(values), values)


def _check_ties(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Refuse values for one of several modules that share one weight: PEFT gives it a separate weight."""
    holders: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        holders.setdefault(id(parameter), []).append(name)
    for key, value in values.items():
        others = holders.get(id(parameters.get(key)), [])
        for other in others:
            if other != key and not _equal(values.get(other, parameters[other]), value):
                raise AdapterFileError(
                    f"the LoRA has values of its own for {key}, whose weight is {other}'s too in this "
                    "model. Load the model with tie_word_embeddings=False, so that each has its own"
                )


def _equal(known: Tensor, value: Tensor) -> bool:
    """Return True if a value equals the model's, in the model's dtype; on the meta device any value does."""
    return known.is_meta or torch.equal(plain(known), value.to(known.dtype))


def _is_named(path: str, names: set[str]) -> bool:
    """Return True if one of the names is a module's path, or its end after a dot."""
    words = path.split(".")
    ends = {".".join(words[k:]) for k in range(len(words))}
    return not names.isdisjoint(ends) and words[0] != ATTRIBUTE


def _in_model(key: str) -> str:
    return key.replace(".base_layer.", ".")
