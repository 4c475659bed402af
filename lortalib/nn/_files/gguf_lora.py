"""Writes an adapter as a LoRA in the file format of llama.cpp (GGUF)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from ..._kinds import MODULE, PATH, takes
from .._adapter import ADAPTER, Adapter
from .._base_record import warn_of_changes
from .._sharded import divide_again
from .adapter import check_numbers
from .folder import TENSORS, TENSORS_OF_PEFT, put_files
from .lora_pairs import lora_pairs
from .tensors import plain

#: llama.cpp's name of the architecture by transformers' ``model_type``, and whether its converter reorders
#: the rows of q and k, because its rotary embedding pairs neighbours (``LlamaModel.permute`` there).
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "granite": ("granite", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
    "starcoder2": ("starcoder2", False),
}


@takes(adapter=ADAPTER, file=PATH, model=MODULE.or_none)
def export_gguf(
    adapter: Adapter,
    file: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    task: str | None = None,
) -> Path:
    """Write an adapter as a LoRA for llama.cpp, exactly: ``llama-cli -m BASE.gguf --lora FILE``.

    The file has the float32 pairs of `export_lora` under llama.cpp's names, with alpha equal to the rank,
    so that its scale of 1 is the adapter's own.

    Args:
        adapter: an adapter; it need not be active.
        file: the file to write; its folder is made.
        model: the model it belongs to; by default the one that carries it.
        task: the task of an adapter with several; by default the one that is chosen.

    Returns:
        The path of the file.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        ValueError: no model; a ``model_type`` whose rules are not known here; a projection that llama.cpp has
            no name for; modules that train with the adapter, which the format cannot hold; the name
            of a saved adapter's file; or what `export_lora` refuses.
        KeyError: the adapter has other tasks.
        OSError: the file cannot be written. One that was there stays unchanged.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64,
        ...                                      num_attention_heads=4, intermediate_size=64))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2)
        >>> export_gguf(adapter, tempfile.mkdtemp() + "/lora.gguf").name
        'lora.gguf'
    """
    path = Path(file)
    if path.name in (TENSORS, TENSORS_OF_PEFT):
        raise ValueError(
            f"{path} has the name of a saved adapter's file; name the file for llama.cpp *.gguf"
        )
    if model is None and adapter.is_on_model:
        model = adapter.model
    if model is None:
        raise ValueError(
            "a GGUF file names the architecture of the model: give the model, or apply the adapter"
        )
    divide_again(model)
    if adapter.is_on_model:
        warn_of_changes(adapter.require_host())
    if task is not None:
        adapter = adapter.task(task)
    if adapter.trained_modules.paths:
        raise ValueError(
            f"a LoRA of llama.cpp has no place for {', '.join(adapter.trained_modules.paths)}, trained with "
            "the adapter; merge it and convert the model"
        )
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"the rules of llama.cpp for {kind!r} models are not known here; they are for "
            f"{', '.join(_ARCHITECTURES)}. Use export_lora and llama.cpp's convert_lora_to_gguf.py, or merge"
        )
    architecture, reordered = _ARCHITECTURES[kind]
    tensors = dict(_tensors(adapter, model, architecture, reordered=reordered))
    check_numbers(tensors, f"adapter {adapter.name!r} was not exported")
    data = _file(architecture, tensors)
    put_files(path.parent, {path.name: lambda opened: _write(opened, data)})
    return path


def _write(opened: BinaryIO, data: bytes) -> None:
    opened.write(data)


def _gguf() -> Any:
    try:
        import gguf  # nobody else needs it
    except ImportError as error:
        raise ImportError("export_gguf needs the package gguf: pip install gguf") from error
    return gguf


def _tensors(
    adapter: Adapter, model: nn.Module, architecture: str, *, reordered: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield both sides of every pair under llama.cpp's names, all with one rank."""
    gguf, config = _gguf(), cast(Any, model).config
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = list(lora_pairs(adapter, model))
    rank = max(len(a) for _, a, _ in pairs)
    for path, a, b in pairs:
        name = names.get_name(path) or names.get_name(f"model.{path}")
        if name is None:
            raise ValueError(f"llama.cpp has no name for {path} in its architecture {architecture}")
        if reordered and path.endswith((".q_proj", ".k_proj")):
            b = _reordered(b, head_dim)
        fill = rank - len(a)
        yield f"{name}.weight.lora_a", plain(nn.functional.pad(a, (0, 0, 0, fill)))
        yield f"{name}.weight.lora_b", plain(nn.functional.pad(b, (0, fill)))


def _reordered(b: Tensor, head_dim: int) -> Tensor:
    """Return rows of q or k as llama.cpp stores them: the two halves of a head in turn, entry by entry."""
    return b.view(-1, 2, head_dim // 2, b.shape[-1]).transpose(1, 2).reshape(b.shape)


def _file(architecture: str, tensors: dict[str, Tensor]) -> bytes:
    """Return the bytes of a GGUF file."""
    gguf = _gguf()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lora.gguf")
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        rank = next(len(tensor) for name, tensor in tensors.items() if name.endswith("lora_a"))
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.to(torch.float32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
