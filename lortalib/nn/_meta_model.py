"""Makes models of shapes alone, on the meta device, from their configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def as_model(model: Any) -> Any:
    """Return the model of a configuration of transformers; anything else as it is.

    Args:
        model: a model, or a configuration.
    """
    from transformers import PreTrainedConfig

    return meta_model(model) if isinstance(model, PreTrainedConfig) else model


def meta_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Make the model that a configuration describes on the meta device; no weight is read.

    Args:
        config: a configuration of transformers.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: no model can be made from the configuration.

    Example:
        >>> from transformers import BertConfig
        >>> next(meta_model(BertConfig(num_hidden_layers=2)).parameters()).device
        device(type='meta')
    """
    from transformers import AutoModel

    # A configuration may name an attention kernel on the hub; eager attention loads no such code.
    plain: dict[str, Any] = {"attn_implementation": "eager"}
    with torch.device("meta"):
        kind = model_class(config)
        made: nn.Module = (
            kind._from_config(config, **plain)
            if kind is not None
            else AutoModel.from_config(config, trust_remote_code=trust_remote_code, **plain)
        )
    return made


def model_class(config: Any) -> type[Any] | None:
    """Find the model class of transformers that a configuration names; None if it names none.

    Args:
        config: a configuration of transformers.
    """
    import transformers

    names = getattr(config, "architectures", None)
    for name in names if isinstance(names, list) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if (
            isinstance(found, type)
            and issubclass(found, transformers.PreTrainedModel)
            and found.config_class
        ):
            return found
    return None
