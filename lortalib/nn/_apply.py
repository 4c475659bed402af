"""The verb that puts an adapter on a model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Union

import torch
from torch import nn

from ..decomp import Network, Shape, get_format
from ..decomp._formats import Rank
from ..decomp._initial import StartLike, as_start, zero_parameter
from ._adapter import Adapter, AdapterConfig, install
from ._anatomy import UnsupportedModelError, check_model, mlp_sites, sites
from ._beside import TrainedModules, find_modules
from ._families import BlockRule
from ._groups import Group, Targets, choose, group_sites, share_input_factor
from ._host import Host, host_of
from ._mlp import check_experts
from ._probe import verify as probe
from ._share import site_weight
from ._site import MLP_ROLES, Site

Decomposition = Union[str, Callable[..., Network]]


def apply(
    model: nn.Module,
    decomposition: Decomposition = "cp",
    rank: Rank = 8,
    *,
    alpha: float = 1.0,
    dropout: float = 0.0,
    targets: Targets = "qkvo",
    layers: int | Iterable[int] | None = None,
    init: StartLike = "invariant",
    gqa: str = "pool",
    name: str = "default",
    train_also: Sequence[str] = (),
    share_residual: bool = False,
    rules: BlockRule | Sequence[BlockRule] = (),
    verify_with: Mapping[str, Any] | None = None,
    freeze: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Put an adapter on a transformers model: one low-rank tensor for all its attention projections.

    Sites of equal head count and widths form one tensor T[layer, head, matrix, in, out] for each
    stack; ``in`` is the residual stream, ``head`` and ``out`` the other side, of readers (q, k, v)
    and writers (o) alike. Their shares are added by forward hooks; no module is replaced.

    Args:
        model: the model; it is changed in place, until ``adapter.remove()``.
        decomposition: a registered name (``"cp"``, ``"tucker"``, ``"tt"``, ...), a line of legs, a
            function such as ``lortalib.decomp.tt``, or any callable ``(shape, rank, ...)`` that
            returns a network of that shape.
        rank: as for `lortalib.decomp.network`.
        alpha: the update is ``alpha * T``. The start makes the effect of the first step independent
            of the rank, so nothing is divided by it; only ``init="lorta"`` uses ``alpha / rank``.
        dropout: probability of dropping an input feature of the adapter in training.
        targets: letters out of ``"qkvo"`` (those that the model has), ``"mlp"``, ``"all"``, a list
            of module names or paths, or a predicate on an attention `Site`.
        layers: only these layers of each stack; all by default.
        init: ``"invariant"``, ``"lorta"`` (the published start), ``"normal"``, or a callable.
        gqa: with grouped queries, ``"pool"`` (a key/value head takes the mean of its query heads'
            slices) or ``"split"`` (tensors of their own for k and v).
        name: name of the adapter on the model.
        train_also: modules that train as a whole beside it and are saved with it.
        share_residual: let the networks of one stack with equal width and rank have one factor for
            ``in``, the residual stream: attention and MLP then share it.
        rules: rows that explain a remote-code model; see `sites`.
        verify_with: example inputs of the model; the plan is held against one forward of the live model
            before anything is changed (see `lortalib.nn.verify`).
        freeze: whether all else of the model stops requiring gradients.
        generator: source of randomness for the start.
        dtype: of the factors; computation follows the model's dtype.

    Returns:
        The `Adapter`, active.

    Raises:
        AnatomyError: the model's attention was not, or not wholly, found.
        ValueError: a bad argument, a name that is in use, targets that choose nothing, a plan that
            the live model contradicts. The model is then as it was.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> lortalib.nn.apply(model, "cp", rank=2).count()
        100
    """
    check_name(model, name)
    check_settings(alpha, dropout, init)
    groups, networks = plan(
        model,
        decomposition,
        rank,
        targets=targets,
        layers=layers,
        gqa=gqa,
        rules=rules,
        options={"init": init, "generator": generator, "dtype": dtype},
        share_residual=share_residual,
    )
    chosen = [site for group in groups for site in group.sites]
    paths = find_modules(model, train_also, (site.path for site in chosen))
    if verify_with is not None:
        attention = [site for site in chosen if site.role not in MLP_ROLES]
        probe(model, verify_with, sites=attention).raise_for_disagreement()
    settings = make_settings(
        decomposition, networks, alpha, dropout, gqa, init, share_residual=share_residual
    )
    adapter = Adapter(name, settings, tuple(groups), networks, TrainedModules(paths))
    install(adapter, model, active=True, freeze=freeze)
    return adapter


def check_settings(alpha: object, dropout: object, init: StartLike) -> None:
    """Refuse what no adapter can be made with.

    Raises:
        ValueError: an alpha that is zero or not finite, a dropout outside [0, 1), an unknown init.
    """
    if not isinstance(dropout, Real) or not 0 <= float(dropout) < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; found {dropout!r}")
    if not isinstance(alpha, Real) or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"alpha must be a finite number other than 0; found {alpha!r}")
    as_start(init)


def make_settings(
    decomposition: Decomposition,
    networks: dict[str, Network],
    alpha: float,
    dropout: float,
    gqa: str,
    init: StartLike,
    share_residual: bool = False,
) -> AdapterConfig:
    """The settings of an adapter with these networks."""
    return AdapterConfig(
        decomposition=_name_of(decomposition),
        alpha=float(alpha),
        scaling=float(alpha) / (_published_rank(networks) if init == "lorta" else 1),
        dropout=float(dropout),
        gqa=gqa,
        init=init if isinstance(init, str) else getattr(init, "__name__", "callable"),
        share_residual=share_residual,
    )


def plan(
    model: nn.Module,
    decomposition: Decomposition,
    rank: Rank,
    *,
    targets: Targets,
    layers: int | Iterable[int] | None,
    gqa: str,
    rules: BlockRule | Sequence[BlockRule],
    options: dict[str, Any],
    share_residual: bool,
) -> tuple[list[Group], dict[str, Network]]:
    """The groups of the chosen sites and a network for each, by name; changes nothing."""
    chosen = choose(candidates(model, targets, rules), targets, layers)
    check_experts(model, chosen)
    check_whole(model, {site.path: site_weight(model, site) for site in chosen})
    groups = group_sites(chosen, gqa)
    networks: dict[str, Network] = {}
    for group in groups:
        weight = site_weight(model, group.sites[0])
        device = weight.device if isinstance(weight, torch.Tensor) else None
        networks[group.name] = make_network(
            decomposition, group, rank, {**options, "device": device}
        )
    if share_residual:
        share_input_factor(groups, networks)
    return groups, networks


def check_whole(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Refuse weights of which every process holds a part (tensor parallelism).

    Args:
        model: that they belong to.
        weights: by path of their module.

    Raises:
        ValueError: a weight that is a DTensor, unless FSDP2 made it, which gathers the whole.
    """
    divided = {path: w for path, w in weights.items() if hasattr(w, "device_mesh")}
    if divided and not any(type(module).__name__.startswith("FSDP") for module in model.modules()):
        path, weight = next(iter(divided.items()))
        raise ValueError(
            f"the weight of {path} is divided over the processes of {weight.device_mesh} (tensor "
            "parallelism): a share would be added to a part of an output as if it were the whole. "
            "Load the model without tp_plan; DDP and FSDP2 work, and for serving merge the adapter "
            "or export it as a LoRA"
        )


def candidates(
    model: nn.Module, targets: Targets, rules: BlockRule | Sequence[BlockRule]
) -> list[Site]:
    """The sites that targets of this kind choose from."""
    if targets == "mlp":
        return mlp_sites(model)
    attention = sites(model, rules=rules)
    if targets == "all":
        return attention + mlp_sites(model)
    if isinstance(targets, str) or callable(targets):
        return attention
    try:
        return attention + mlp_sites(model)
    except UnsupportedModelError:
        return attention


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by name, in the order in which they were applied."""
    host = host_of(model)
    return {adapter.name: adapter for adapter in host.adapters()} if host else {}


def set_active(model: nn.Module, names: str | Iterable[str]) -> None:
    """Let exactly these adapters take part in the forward; their updates add up.

    The cost does not depend on the size of the model.

    Args:
        model: a model with adapters.
        names: one name, several, or none (``[]``).

    Raises:
        KeyError: a name that no adapter has; then nothing is changed.
        ValueError: two of them train the same module beside them.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> one, two = (apply(model, "cp", rank=2, name=name) for name in ("one", "two"))
        >>> set_active(model, "two")
        >>> [name for name, adapter in adapters(model).items() if adapter.active]
        ['two']
    """
    wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    known = adapters(model)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise KeyError(
            f"no adapter is called {', '.join(map(repr, unknown))}; the model has "
            f"{', '.join(map(repr, known)) or 'none'}"
        )
    for position, name in enumerate(wanted):
        taken = known[name].trained_modules.conflict(
            known[other].trained_modules for other in wanted[:position]
        )
        if taken:
            raise ValueError(
                f"the adapters {wanted} cannot be active together: both train {taken!r}"
            )
    for name, adapter in known.items():
        if name not in wanted:
            adapter.disable()
    for name in wanted:
        known[name].enable()


def check_name(model: nn.Module, name: str) -> None:
    """Refuse what is no model, and a name that no adapter on it can have."""
    check_model(model)
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"an adapter's name is a non-empty string without dots; found {name!r}")
    if name in adapters(model):
        raise ValueError(
            f"the model already has an adapter called {name!r}; give name=..., or remove that one "
            f"with lortalib.nn.adapters(model)[{name!r}].remove()"
        )
    if hasattr(host_of(model) or Host(nn.Module()), name):
        raise ValueError(f"{name!r} is no possible name for an adapter; choose another")


def _name_of(decomposition: Decomposition) -> str:
    if isinstance(decomposition, str):
        return get_format(decomposition).name or decomposition
    name = getattr(decomposition, "name", "") or getattr(decomposition, "__name__", "")
    return name or type(decomposition).__name__


def make_network(
    decomposition: Decomposition, group: Group, rank: Rank, options: dict[str, Any]
) -> Network:
    """The network of a group, checked against the group's shape."""
    shape = group.shape
    if isinstance(decomposition, str):
        return get_format(decomposition)(shape, rank, **options)
    if not callable(decomposition):
        raise ValueError(
            f"decomposition must be a name, a line of legs or a callable; found {decomposition!r}"
        )
    network = _call(decomposition, shape, {"rank": rank, **options})
    if not isinstance(network, Network):
        raise ValueError(f"the decomposition {decomposition!r} returned no Network but {network!r}")
    if dict(network.shape) != dict(shape):
        raise ValueError(
            f"the decomposition {decomposition!r} was asked for {shape} and returned {network.shape}"
        )
    return network.to(options["device"], options["dtype"])


def _call(function: Callable[..., Network], shape: Shape, options: dict[str, Any]) -> Network:
    """Call with those of the options that it takes by name; a second position takes the rank."""
    parameters = list(inspect.signature(function).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function(shape, **options)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    accepted = {name: value for name, value in options.items() if name in named}
    second = parameters[1] if len(parameters) > 1 else None
    if second is not None and second.kind is not second.KEYWORD_ONLY and second.name not in options:
        return function(shape, options["rank"], **accepted)
    return function(shape, **accepted)


def _published_rank(networks: dict[str, Network]) -> int:
    """The r of alpha/r: the size of the bonds at the parameter that starts at zero."""
    network = next(iter(networks.values()))
    term = network.legs.terms[zero_parameter(network.legs)]
    return math.prod(network.sizes[leg] for leg in term.legs if leg in network.ranks)
