"""Adapters as files: the numbers in ``adapter.safetensors``, all else in ``adapter.json``.

A site is stored by (stack, layer, role) and its sizes; its module path is only a hint, since
transformers renames paths between versions.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..._version import __version__
from ...decomp import Legs, LegsError, Network
from .._adapter import Adapter
from .._anatomy import (
    MLP_ROLES,
    ROLES,
    BlockRule,
    Site,
    linear_sites,
    mlp_sites,
    site_weight,
    sites,
)
from .._group import Group
from .._host import check_name, install
from .._plan import share_input_factor
from .._trained_modules import TrainedModules, Values, find_modules
from .folder import DESCRIPTION, TENSORS, AdapterFileError, _replace_both, write_tensors
from .schema import Saved, group_from_json, group_to_json, settings_from_json, shared_from_json

FORMAT_VERSION = 1


def save(adapter: Adapter, folder: str | PathLike[str]) -> Path:
    """Write an adapter; see `Adapter.save`. Both files are written aside first, then renamed."""
    folder = Path(folder)
    owned: dict[int, str] = {}  # a parameter that several networks share is stored once
    shared: dict[str, dict[str, str]] = {group.name: {} for group in adapter.groups}
    tensors = {}
    for group in adapter.groups:
        for name, tensor in adapter.network(group).named_parameters():
            if tensor.is_meta:
                raise ValueError(
                    f"network {group.name!r} is on the meta device: it has no numbers to save"
                )
            key = f"networks.{group.name}.{name}"
            if owned.setdefault(id(tensor), key) == key:
                tensors[key] = tensor.detach().cpu().contiguous()
            else:
                shared[group.name][name] = owned[id(tensor)]
    model = adapter.model
    for path, values in adapter.trained_modules.values(model).items():
        tensors |= {f"beside.{path}:{k}": v.cpu().contiguous() for k, v in values.items()}
    config = getattr(model, "config", None)
    description = {
        "format": "lortalib adapter",
        "format_version": FORMAT_VERSION,
        "lortalib_version": __version__,
        "name": adapter.name,
        "settings": asdict(adapter.config),
        "trained_beside": list(adapter.trained_modules.paths),
        "base_model": {
            "class": type(model).__name__,
            "model_type": getattr(config, "model_type", None),
            "name": getattr(config, "_name_or_path", None) or None,
            "shape_fingerprint": fingerprint(adapter.sites),
        },
        "groups": [
            group_to_json(group, adapter.network(group), shared[group.name])
            for group in adapter.groups
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        write_tensors(tensors, Path(aside, TENSORS))
        text = json.dumps(description, indent=2) + "\n"
        Path(aside, DESCRIPTION).write_text(text, encoding="utf-8")
        _replace_both(Path(aside), folder)
    return folder


def fingerprint(sites: Iterable[Site]) -> str:
    """A digest of the identities and weight shapes of sites: equal where adapters fit alike."""
    shapes = sorted((*site.key, *site.weight_shape) for site in sites)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def load(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    name: str | None = None,
    active: bool = True,
    freeze: bool = True,
    rules: BlockRule | Sequence[BlockRule] = (),
) -> Adapter:
    """Put a saved adapter on a model.

    Args:
        model: a model of the same shape as the one the adapter was trained on.
        folder: what `Adapter.save` wrote.
        name: name on the model; the saved one by default.
        active: whether it takes part in the forward at once.
        freeze: whether all else of the model stops requiring gradients.
        rules: rows that explain a remote-code model, as for `lortalib.nn.sites`.

    Returns:
        The `Adapter`.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFileError: a file is damaged, or the adapter does not fit the model; the message says
            what differs. The model is then as it was.
        ValueError: the name is in use.

    Example:
        >>> import tempfile
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> folder = lortalib.nn.apply(model, "cp", rank=2).save(tempfile.mkdtemp())
        >>> load(model, folder, name="again").count()
        100
    """
    description = read_description(Path(folder))
    check_name(model, description["name"] if name is None else name)
    adapter = read_adapter(model, folder, name=name, rules=rules)
    install(adapter, model, active=active, freeze=freeze)
    return adapter


def read_adapter(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    name: str | None = None,
    rules: BlockRule | Sequence[BlockRule] = (),
) -> Adapter:
    """The adapter of a folder, fitted to a model but not put on it; see `load`."""
    folder = Path(folder)
    file = _File(folder)
    beside = _beside_values(model, file.paths, file.tensors, folder)
    found = {site.key: site for site in _candidates(model, file.saved, rules)}
    _check_fit(model, file.saved, found, file.description)
    groups = []
    for group, *_ in file.saved:
        fitted = tuple(found[site.key] for site in group.sites)
        groups.append(Group(group.name, group.heads, fitted, group.layers, group.roles))
    networks = file.networks()
    for group in groups:
        weight = site_weight(model, group.sites[0])
        if not weight.is_meta:
            networks[group.name].to(weight.device)
    return file.adapter(name, groups, networks, TrainedModules(file.paths, beside))


def file_adapter(folder: str | PathLike[str]) -> Adapter:
    """The adapter of a folder as it was saved, on no model: its sites are those of its own model.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFileError: a file is damaged.
    """
    folder = Path(folder)
    file = _File(folder)
    values: Values = {path: {} for path in file.paths}
    for key in [key for key in file.tensors if key.startswith("beside.")]:
        path, _, name = key.removeprefix("beside.").partition(":")
        if path not in values:
            raise AdapterFileError(f"{folder / TENSORS} holds the unknown tensor {key!r}")
        values[path][name] = file.tensors.pop(key)
    groups = [group for group, *_ in file.saved]
    return file.adapter(None, groups, file.networks(), TrainedModules(file.paths, values))


class _File:
    """The contents of a folder, each checked by itself.

    Attributes:
        settings: of the adapter.
        saved: its groups, with their lines and sizes.
        paths: of the modules trained beside it.
        tensors: by key; `networks` takes out what it needs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = read_description(folder)
        self.tensors = read_tensors(folder)
        self.paths = self.description["trained_beside"]
        try:
            self.config = settings_from_json(self.description["settings"])
            self.saved = [group_from_json(entry) for entry in self.description["groups"]]
            shares = [shared_from_json(entry) for entry in self.description["groups"]]
        except ValueError as error:
            raise AdapterFileError(f"{folder / DESCRIPTION} is damaged: {error}") from error
        for (group, *_), shared in zip(self.saved, shares):
            for own, owner in shared.items():
                if owner not in self.tensors:
                    raise AdapterFileError(f"{folder / TENSORS} lacks the tensor {owner!r}")
                self.tensors[f"networks.{group.name}.{own}"] = self.tensors[owner]

    def networks(self) -> dict[str, Network]:
        """The networks by name of their group; nothing else may be left in the file."""
        networks = {
            group.name: _read_network(group, legs, modes, self.tensors, self.folder)
            for group, legs, modes in self.saved
        }
        if self.tensors:
            raise AdapterFileError(
                f"{self.folder / TENSORS} holds unknown tensors: {', '.join(self.tensors)}"
            )
        return networks

    def adapter(
        self,
        name: str | None,
        groups: Sequence[Group],
        networks: dict[str, Network],
        beside: TrainedModules,
    ) -> Adapter:
        """The adapter, under its saved name by default."""
        if self.config.share_residual:
            share_input_factor(groups, networks)
        name = self.description["name"] if name is None else name
        return Adapter(name, self.config, tuple(groups), networks, beside)


def _candidates(
    model: nn.Module,
    saved: list[Saved],
    rules: BlockRule | Sequence[BlockRule],
) -> list[Site]:
    """The sites of the model, of the kinds that the file speaks of."""
    asked = [site for group, *_ in saved for site in group.sites]
    roles = {site.role for site in asked}
    found: list[Site] = []
    if roles & set(ROLES) - set(MLP_ROLES):
        found += sites(model, rules=rules)
    if roles & set(MLP_ROLES):
        found += mlp_sites(model)
    modules = dict(model.named_modules())
    plain = [site for site in asked if site.role not in ROLES and site.path in modules]
    sizes = {site.path: (site.width, site.head_dim) for site in plain}
    return found + linear_sites({path: modules[path] for path in sizes}, sizes)


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of ``adapter.json``, as far as any version must have them."""
    file = folder / DESCRIPTION
    if not file.is_file():
        theirs = (folder / "adapter_config.json").is_file()
        raise FileNotFoundError(
            f"no {DESCRIPTION} in {folder}; a saved adapter is a folder with {DESCRIPTION} and "
            f"{TENSORS}, as Adapter.save writes it"
            + ". It holds an adapter of PEFT: open it with peft.PeftModel.from_pretrained, or a LoRA "
            "with lortalib.nn.load_lora" * theirs
        )
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != "lortalib adapter":
        raise AdapterFileError(f"{file} does not describe a lortalib adapter")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterFileError(
            f"{file} has format version {version}; this lortalib {__version__} reads version "
            f"{FORMAT_VERSION}. Update lortalib"
        )
    missing = {"name", "settings", "trained_beside", "groups"} - set(description)
    if missing:
        raise AdapterFileError(f"{file} is damaged: {', '.join(sorted(missing))} is missing")
    for key, kind in (
        ("name", str),
        ("settings", dict),
        ("trained_beside", list),
        ("groups", list),
    ):
        if not isinstance(description.get(key), kind):
            raise AdapterFileError(f"{file} is damaged: {key} is {description.get(key)!r}")
    names = [entry.get("name") for entry in description["groups"] if isinstance(entry, dict)]
    if not names or len({str(name) for name in names}) < len(description["groups"]):
        raise AdapterFileError(f"{file} is damaged: its groups are called {names}")
    if any(hasattr(nn.ModuleDict, str(name)) for name in names):
        raise AdapterFileError(f"{file} is damaged: no group can be called as one of {names}")
    if not all(isinstance(path, str) for path in description["trained_beside"]):
        raise AdapterFileError(f"{file} is damaged: trained_beside holds no paths")
    return description


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of ``adapter.safetensors``, on the CPU, checked to be finite."""
    file = folder / TENSORS
    if not file.is_file():
        raise FileNotFoundError(f"no {TENSORS} in {folder}, beside its {DESCRIPTION}")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file} is damaged or cut short: {error}") from error
    for key, tensor in tensors.items():
        if key.startswith("networks.") and not tensor.is_floating_point():
            raise AdapterFileError(
                f"{file}: factor {key!r} is of {tensor.dtype}, no numbers to train"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{file}: tensor {key!r} holds NaN or infinity")
    return tensors


def _read_network(
    group: Group, legs: Legs, modes: Mapping[str, int], tensors: dict[str, Tensor], folder: Path
) -> Network:
    """Take the group's tensors out of ``tensors``, in the order of the line."""
    prefix = f"networks.{group.name}."
    names = [f"{prefix}{'_'.join(term.legs)}" for term in legs.terms]
    for position, name in enumerate(names):
        while names[position] in names[:position]:
            names[position] += "_"
        if names[position] not in tensors:
            raise AdapterFileError(f"{folder / TENSORS} lacks the tensor {name!r}")
    try:
        network = Network(legs, [tensors.pop(name) for name in names], tuple(modes))
    except LegsError as error:
        raise AdapterFileError(
            f"{folder / TENSORS} does not fit its description: {error}"
        ) from error
    if dict(network.shape) != dict(modes):
        raise AdapterFileError(
            f"{folder}: network {group.name!r} has the shape {network.shape}, its description says "
            f"{modes}"
        )
    return network


def _beside_values(
    model: nn.Module, paths: list[str], tensors: dict[str, Tensor], folder: Path
) -> Values:
    """Take the values of the modules trained beside the adapter out of ``tensors``, checked."""
    values: Values = {}
    modules = dict(model.named_modules())
    for path in paths:
        if path not in modules:
            raise AdapterFileError(
                f"the adapter in {folder} was trained beside the module {path!r}, which "
                f"{type(model).__name__} does not have"
            )
        expected = modules[path].state_dict()
        prefix = f"beside.{path}:"
        values[path] = {
            key.removeprefix(prefix): tensors.pop(key)
            for key in list(tensors)
            if key.startswith(prefix)
        }
        found = {name: tuple(tensor.shape) for name, tensor in values[path].items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        if found != wanted:
            raise AdapterFileError(
                f"the module {path!r} saved with the adapter holds {found}; the model's holds {wanted}"
            )
    find_modules(model, paths, ())
    return values


def _check_fit(
    model: nn.Module,
    saved: list[Saved],
    found: Mapping[tuple[str, int, str], Site],
    description: Mapping[str, Any],
) -> None:
    def sizes(site: Site) -> tuple[int, ...]:
        return site.heads, site.query_heads, site.head_dim, site.width

    differences = []
    for site in (site for group, *_ in saved for site in group.sites):
        other = found.get(site.key)
        where = f"{site.stack} layer {site.layer} {site.role}"
        if other is None:
            differences.append(f"{where}: the model has no such projection")
        elif sizes(other) != sizes(site):
            differences.append(
                f"{where}: heads, query heads, head_dim, width are {sizes(site)} in the file, "
                f"{sizes(other)} in the model"
            )
    if differences:
        base = description.get("base_model") or {}
        shown = "\n  ".join(differences[:5])
        more = f"\n  ... and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise AdapterFileError(
            f"the adapter (trained on {base.get('class')} {base.get('name') or ''}) does not fit "
            f"{type(model).__name__}; nothing was changed:\n  {shown}{more}"
        )
