"""Serves a model with many adapters: OpenAI's completions over HTTP, in one running batch.

Each request names an adapter of a bank, and joins the batch of transformers' continuous batching when it
comes. ``lortalib serve`` is the same as a command.

Example:
    >>> import lortalib
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...                                      num_hidden_layers=2, num_attention_heads=4)).eval()
    >>> bank = lortalib.nn.bank(model, "cp", rank=2)
    >>> bank["ann"] = {"layers": [t.normal_() for t in bank[None]["layers"]]}
    >>> engine = Engine(model, bank, ends=[0], room=256)
    >>> for tokens, done in engine.answer(Request([5, 6, 7], adapter="ann", length=4, temperature=0)):
    ...     pass
    >>> len(tokens) <= 4, done
    (True, True)
    >>> engine.close()
"""

from ._catalogue import Catalogue
from ._engine import BusyError, Engine
from ._request import Request
from ._server import Server, end_tokens

__all__ = ["BusyError", "Catalogue", "Engine", "Request", "Server", "end_tokens"]
