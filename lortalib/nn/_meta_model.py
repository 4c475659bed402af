"""Makes the model of a configuration without its weights."""

from __future__ import annotations

from typing import Any

import torch


def class_of(config: Any) -> type[Any] | None:
    """Find the model class of transformers that a configuration names; None if it names none.

    Args:
        config: a configuration of transformers.

    Example:
        >>> from transformers import BertConfig
        >>> class_of(BertConfig(architectures=["BertForMaskedLM"])).__name__
        'BertForMaskedLM'
    """
    import transformers

    names = getattr(config, "architectures", None)
    for name in names if isinstance(names, list) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            continue
        if found.config_class:
            return found
    return None


def meta_model(config: Any, trust_remote_code: bool = False) -> Any:
    """Make a model on the meta device from its configuration alone.

    Args:
        config: a configuration of transformers; without ``architectures``, the model has no head.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        TypeError: something that is neither a model nor a configuration.
        ValueError: no model can be made from the configuration.

    Example:
        >>> from transformers import BertConfig
        >>> model = meta_model(BertConfig(num_hidden_layers=1))
        >>> type(model).__name__, model.device.type
        ('BertModel', 'meta')
    """
    from transformers import AutoModel, PretrainedConfig

    if not isinstance(config, PretrainedConfig):
        raise TypeError(
            f"a model or a configuration of transformers is needed; found {type(config).__name__}. "
            "AutoConfig.from_pretrained(folder) reads one"
        )
    # A configuration may name an attention kernel on the hub; eager attention loads no such code.
    plain: dict[str, Any] = {"attn_implementation": "eager"}
    known = class_of(config)
    with torch.device("meta"):
        if known is not None:
            return known._from_config(config, **plain)
        return AutoModel.from_config(config, trust_remote_code=trust_remote_code, **plain)
