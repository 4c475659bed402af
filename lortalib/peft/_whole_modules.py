"""Reads the modules that PEFT trains as a whole and saves with an adapter."""

from __future__ import annotations

from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..nn.door import Values


def whole_modules(model: nn.Module, adapter_name: str) -> Values:
    """Read the values of the modules in ``modules_to_save``, by path of the module and name of the tensor.

    Args:
        model: the model with PEFT's wrappers.
        adapter_name: name of the adapter.

    Raises:
        ValueError: the adapter trains rows of an embedding, which a file of a LoRA cannot contain.
    """
    values: Values = {}
    for path, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper) or adapter_name not in module._adapters:
            continue
        if not isinstance(module, ModulesToSaveWrapper):
            raise ValueError(
                f"adapter {adapter_name!r} trains rows of {path} (trainable_token_indices), which no pair "
                "of a LoRA can say. Save it with save_pretrained, or save the model of merge_and_unload"
            )
        values[path] = dict(module.modules_to_save[adapter_name].state_dict())
    return values
