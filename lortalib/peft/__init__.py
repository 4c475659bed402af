"""Offers one low-rank tensor as a PEFT method: pass a `LortaConfig` wherever PEFT takes a configuration.

This module needs the extra ``peft`` (peft 0.21 or later). ``import lortalib`` is enough to use it: the
method is registered with PEFT as soon as both libraries are imported, in either order.

Example:
    >>> import peft
    >>> from lortalib.peft import LortaConfig
    >>> from transformers import BertConfig, BertModel
    >>> base = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
    ...                             intermediate_size=64))
    >>> model = peft.get_peft_model(base, LortaConfig(rank=2))
    >>> model.get_nb_trainable_parameters()[0]
    80
"""

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"lortalib.peft needs PEFT 0.21 or later ({error}); install it with "
        'pip install "lortalib[peft]". lortalib.nn works without it'
    ) from error

from ._config import LortaConfig
from ._layer import LortaLayer
from ._model import LortaModel
from ._register import register

register()

__all__ = ["LortaConfig", "LortaLayer", "LortaModel"]
