"""Compresses saved LoRAs and adapters of one model into one tensor of any line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..._kinds import FLAG, FUNCTION, GENERATOR, takes
from ...decomp import Legs, LegsError, Network, Rank, Shape, balance, get_format
from .._anatomy import check_model, site_weight
from .._config import AdapterConfig, check_settings, choose_acts_on
from .._files import Rules, lora_network, lora_sites
from .._group import Group, group_sites
from .._meta_model import as_model
from .._plan import check_whole
from .._task_lines import line_of_one_task
from .compression import Compression, check_joint
from .slices import line_over_tasks
from .sources import FOLDERS, Folders, read_sources

#: Called after every sweep with the name of the group, the number of sweeps and the relative error.
Progress = Callable[[str, int, float], object]


@takes(folders=FOLDERS, generator=GENERATOR, progress=FUNCTION.or_none, joint=FLAG)
def compress(
    model: Any,
    folders: Folders,
    decomposition: str = "cp",
    rank: Rank = 32,
    *,
    gqa: str = "pool",
    dropout: float = 0.0,
    rules: Rules = (),
    tolerance: float = 1e-6,
    ridge: float = 0.0,
    restarts: int = 0,
    sweeps: int = 100,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    revision: str | Sequence[str | None] | None = None,
    token: str | bool | None = None,
    subfolder: str | Sequence[str | None] | None = None,
    joint: bool = False,
) -> Compression:
    """Fit one tensor of any line to saved LoRAs of PEFT and adapters of lortalib of one model.

    At every projection an adapter is a low-rank pair, whatever its format. So all adapters together are
    one network, ``adapter layer matrix in r, adapter layer matrix head out r``, with zeros for modules
    that an adapter leaves alone, and `lortalib.decomp.fit` fits the line to it. No update is formed.

    Several adapters share one tensor with one more mode, ``task`` if the line names it, else ``adapter``.
    What carries no such leg is shared by all. Formats whose line depends on the modes (cp, cp_matrix, tucker,
    tt, ring, cara, block_term) have the leg by themselves; in others it is written into the line.

    Args:
        model: the model that the adapters were trained on, or its configuration. The meta device is
            enough, unless an adapter acts on the stream.
        folders: a folder, several folders, or a mapping from names to folders. Without names, an adapter
            is called after its folder, with ``_`` for a dot.
        decomposition: the name of a format, or a line of legs, of a tensor that is added to the weights.
        rank: as for `lortalib.decomp.network`.
        gqa: ``"pool"`` gives keys and values the query heads, ``"split"`` gives them a tensor of their own
            if they have fewer heads, which is nearer at the same rank and has more parameters.
        dropout: dropout of the compressed adapters.
        rules: rows that explain a remote-code model, as for `lortalib.nn.sites`.
        tolerance, ridge, restarts, sweeps, generator: as for `lortalib.decomp.fit`.
        progress: called after every sweep with the name of the group, the number of sweeps, and the
            relative error.
        revision: a branch, tag or commit of each repository, by default ``main``; or a list with one for
            each, where None is the default.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in each repository, or below each local folder, that has the files; or a list
            with one for each, where ``"."`` is the top. Without names, an adapter with a subfolder of its
            own is called after that.
        joint: whether the adapters are to be the tasks of one adapter, for which `Compression.save` writes
            one folder.

    Returns:
        `Compression`: the tensors, the adapters, and their errors by layer, matrix and head.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFileError: a damaged file, another method, a LoRA that is more than low-rank pairs (DoRA,
            biases), or one that does not fit the model.
        LegsError: a line that does not fit the modes, for instance one without a leg for the adapters.
        ValueError: a tensor on the residual stream, such as indscal; names that are missing or taken;
            or a bad argument. With ``joint``: an adapter with modules that were trained as a whole, a name
            that no task can have, or dropout.

    Example:
        >>> import tempfile, lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> folders = {}
        >>> for name in ("ann", "bob"):
        ...     adapter = lortalib.nn.apply(model, "cp", rank=2, init="normal")
        ...     folders[name] = adapter.export_lora(tempfile.mkdtemp())
        ...     adapter.remove()
        >>> found = compress(model.config, folders, "cp", rank=8)
        >>> str(found.networks["encoder"].legs), found.count(), found.original_count()
        ('in r, out r, head r, layer r, matrix r, adapter r', 416, 2048)
        >>> str(found.adapter("bob").networks["encoder"].legs)
        'in r, out r, head r, layer r, matrix r'
    """
    from ...decomp import fit  # deferred on purpose: it loads TensorLy

    check_settings(1.0, dropout, "normal")
    _check_line(decomposition)
    model = check_model(as_model(model))
    originals = read_sources(model, folders, rules, revision, token, subfolder)
    if joint:
        check_joint({name: lora.trained_modules for name, lora in originals.items()}, dropout)
    shapes = {path: shape for lora in originals.values() for path, shape in lora.shapes.items()}
    chosen = lora_sites(model, shapes, rules)
    check_whole(model, {site.path: site_weight(model, site) for site in chosen})
    groups = group_sites(chosen, gqa)
    mode = _mode(decomposition, joint or len(originals) > 1)
    for group in groups:
        legs = _check_modes(decomposition, group.shape, mode)
        if joint:
            line_of_one_task(line_over_tasks(legs, mode))
    fits = {}
    for group in groups:
        found = fit(
            lora_network(group, [lora.pairs for lora in originals.values()], mode),
            decomposition,
            rank,
            weights=_weights(group),
            tolerance=tolerance,
            ridge=ridge,
            restarts=restarts,
            sweeps=sweeps,
            generator=generator,
            progress=None if progress is None else partial(progress, group.name),
        )
        # Further training takes steps of one size in all parameters.
        even = found.network.like(balance(found.network).tensors)
        fits[group.name] = replace(found, network=even)
    config = AdapterConfig(decomposition, 1.0, 1.0, float(dropout), gqa, "compress")
    return Compression(model, originals, groups, fits, config, mode, joint)


def _check_line(decomposition: object) -> None:
    """Refuse what no LoRA can be fitted with, before anything is read."""
    if not isinstance(decomposition, str):
        raise ValueError(
            f"decomposition must be the name of a format or a line of legs; found {decomposition!r}"
        )
    if choose_acts_on(decomposition, None) == "stream":
        raise ValueError(
            f"{decomposition!r} is a tensor on the residual stream, which multiplies the weights: the update "
            "of a LoRA is added to them, and no such tensor equals it. Choose 'cp', 'tucker', 'cp_matrix' "
            "or another format on the weights"
        )


def _mode(decomposition: str, is_needed: bool) -> str:
    """Name the mode that numbers the adapters. If it is not needed, only a line that names it has it."""
    line = get_format(decomposition).line
    legs = Legs.parse(line).carriers if isinstance(line, str) else {}
    if "task" in legs:
        return "task"
    return "adapter" if is_needed or "adapter" in legs else ""


def _check_modes(decomposition: str, shape: Shape, mode: str) -> Legs:
    """Return the line, if it has a leg for every mode; else say how to write the one for the adapters."""
    legs = get_format(decomposition).legs({mode: 1, **shape} if mode else shape)
    if not mode or mode in legs.carriers:
        legs.check([mode, *shape] if mode else shape.modes)
        return legs
    modes = [{leg.partition(".")[0] for leg in term.legs} for term in legs.terms]
    apart = [k for k, own in enumerate(modes) if not {"in", "out"} & own]
    terms = [str(term) for term in legs.terms]
    k = apart[0] if apart else 0
    terms[k] = f"{mode} {terms[k]}"
    raise LegsError(
        f"several adapters need the leg {mode!r} on the parameters in which they differ, for instance "
        f"{', '.join(terms)!r}; there is none in",
        str(legs),
    )


def _weights(group: Group) -> Network | None:
    """Weigh the slices of a group's tensor by what they count for.

    Each key/value head stands once for each of its query heads, and counts once. A layer and matrix
    without a site is free. Without either, all weights are one.
    """
    values = torch.zeros(len(group.layers), len(group.roles))
    for site in group.sites:
        at = group.layers.index(site.layer), group.roles.index(site.role)
        values[at] = site.heads / group.heads
    return None if values.eq(1).all() else Network("layer matrix", [values], ("layer", "matrix"))
