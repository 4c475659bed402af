"""Reads the low-rank pairs of any saved adapter: a LoRA of PEFT, or an adapter of lortalib."""

from __future__ import annotations

from os import PathLike

from torch import nn

from .._anatomy import site_weight
from .._hub import local_folder
from .fit import Rules
from .folder import FILES, is_lora
from .import_lora import Lora, read_lora
from .load import read_adapter
from .lora_file import LowRank
from .lora_pairs import lora_pairs
from .lora_sites import check_fit


def read_pairs(
    model: nn.Module,
    folder: str | PathLike[str],
    rules: Rules = (),
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Lora:
    """Read a saved adapter as the low-rank pairs of its modules, exactly.

    Args:
        model: the model that it was trained on; the meta device is enough for an adapter on the weights.
        folder: a folder or repository of a LoRA of PEFT, or of an adapter of lortalib of either kind.
        rules: rows that explain a remote-code model, as for `lortalib.nn.sites`.
        revision, token, subfolder: as for `local_folder`.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFileError: a damaged file, another method, or an adapter that does not fit the model.
        ValueError: an adapter on the stream and a model without weights, or weights for which there is no
            pair, such as packed experts; or an adapter of several tasks.
    """
    folder = local_folder(folder, FILES, revision, token, subfolder)
    if is_lora(folder):
        return read_lora(model, folder)
    adapter = read_adapter(model, folder, rules=rules)
    if adapter.tasks:
        raise ValueError(
            f"the adapter in {folder} has the tasks {', '.join(map(repr, adapter.tasks))}, and one is "
            f"wanted: write it alone, with lortalib.nn.convert(folder, out, task={adapter.tasks[0]!r})"
        )
    on_stream = adapter.config.acts_on == "stream"
    if on_stream and any(site_weight(model, site).is_meta for site in adapter.sites):
        raise ValueError(
            f"the adapter in {folder} acts on the residual stream: its change of a weight is a product with "
            "that weight, and this model has no weights. Give the model with its weights"
        )
    pairs = {path: LowRank(a, b) for path, a, b in lora_pairs(adapter, model)}
    lora = Lora(pairs, adapter.trained_modules, adapter.dropout)
    check_fit(model, lora.shapes)
    return lora
