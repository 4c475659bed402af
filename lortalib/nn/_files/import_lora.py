"""Turns an existing LoRA into an adapter, so that everything that works on adapters works on it."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from torch import nn

from ..._kinds import FLAG, takes
from .._adapter import Adapter
from .._adapters import check_name, install
from .._anatomy import site_weight
from .._config import AdapterConfig
from .._group import group_sites
from .._hub import local_folder
from .._plan import check_whole
from .._trained_modules import TrainedModules
from .fit import Rules
from .lora_config import CONFIG, WEIGHTS, saved_modules
from .lora_file import open_lora
from .lora_modules import check_modules, take_modules
from .lora_sites import Pairs, check_fit, lora_network, lora_sites


@takes(active=FLAG, freeze=FLAG)
def load_lora(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    name: str = "default",
    active: bool = True,
    freeze: bool = True,
    rules: Rules = (),
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Adapter:
    """Put an existing LoRA of PEFT on a model, exactly, as an adapter of the format ``lora``.

    Its matrices become the parameters ``layer matrix in r`` and ``layer matrix head out r`` of one
    network for each size of projection. It can then be trained, merged, decomposed, exported and saved
    like any other adapter. Scaling, rank patterns and alpha patterns are multiplied in.

    Args:
        model: the model that the LoRA was trained on.
        folder: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a repository of
            the Hugging Face hub, ``user/name``. A local path goes before the hub.
        name: the adapter's name on the model.
        active: whether the adapter takes part in the forward at once.
        freeze: whether all other parameters of the model stop requiring gradients.
        rules: rows that explain a remote-code model, as for `lortalib.nn.sites`.
        revision: a branch, tag or commit of the repository; by default ``main``.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in the repository, or below a local folder, that has the files.

    Returns:
        The `Adapter`.

    Raises:
        FileNotFoundError: a file is missing, or the hub has no such repository or revision.
        ConnectionError: the hub cannot be reached, and the repository was not downloaded before.
        AdapterFileError: a damaged file, another method, a variant that is more than low-rank pairs
            (DoRA, biases, embeddings, convolutions), modules that the model does not have, or values for
            one of several modules that share one weight. The model stays unchanged.
        ValueError: the name is in use.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> folder = lortalib.nn.apply(model, "cp", rank=2).export_lora(tempfile.mkdtemp())
        >>> str(load_lora(model, folder, name="again").networks["encoder"].legs)
        'layer matrix in r, layer matrix head out r'
    """
    model = check_name(model, name)
    lora = read_lora(model, local_folder(folder, (CONFIG, WEIGHTS), revision, token, subfolder))
    chosen = lora_sites(model, lora.shapes, rules)
    check_whole(model, {site.path: site_weight(model, site) for site in chosen})
    groups = group_sites(chosen, gqa="split")
    networks = {}
    for group in groups:
        weight = site_weight(model, group.sites[0])
        network = lora_network(group, [lora.pairs])
        networks[group.name] = network if weight.is_meta else network.to(weight.device)
    config = AdapterConfig("lora", 1.0, 1.0, lora.dropout, "split", "lora")
    adapter = Adapter(name, config, tuple(groups), networks, lora.trained_modules)
    install(adapter, model, active=active, freeze=freeze)
    return adapter


@dataclass(frozen=True)
class Lora:
    """A LoRA that was read and fits a model.

    Attributes:
        pairs: the pairs by the path of their module, with the scaling multiplied in.
        trained_modules: the modules that were trained as a whole.
        dropout: its dropout.
    """

    pairs: Pairs
    trained_modules: TrainedModules
    dropout: float = 0.0

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(features written, features read) of each pair, by the path of its module."""
        return {path: (len(pair.b), pair.a.shape[1]) for path, pair in self.pairs.items()}


def read_lora(model: nn.Module, folder: str | PathLike[str]) -> Lora:
    """Read a LoRA of PEFT, and check that it fits a model; see `load_lora` for the errors."""
    with open_lora(folder) as file:
        check_fit(model, file.shapes)
        paths = check_modules(model, saved_modules(file.config), file.shapes, file.others)
        pairs, others = file.read()
    dropout = float(file.config.get("lora_dropout") or 0)
    return Lora(pairs, take_modules(model, paths, others), dropout)
