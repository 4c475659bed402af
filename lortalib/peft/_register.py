"""Registers the method with PEFT, which has no public call for methods of other libraries."""

from __future__ import annotations

from peft.utils import register_peft_method

from ._config import LortaConfig
from ._model import LortaModel
from ._peft_type import NAME, peft_type


def register() -> None:
    """Add the method to PEFT's tables; a second call does nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type()) is not LortaConfig:
        register_peft_method(
            name=NAME.lower(),
            config_cls=LortaConfig,
            model_cls=LortaModel,
            prefix=LortaModel.prefix,
        )
