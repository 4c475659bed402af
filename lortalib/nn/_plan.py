"""Plans an adapter: chooses sites, groups them, makes a network for each group. The model is unchanged."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import nn

from .._kinds import FLAG, takes
from .._numbers import check_number
from ..decomp import Network, Rank, Shape, StartLike, get_format, mark_shared
from ._anatomy import Site
from ._config import AdapterConfig, check_legs, check_settings, choose_acts_on
from ._group import Group, group_sites
from ._stream import stream_sites
from ._table import count_parameters, lora_count, network_table
from ._task_lines import TASK, check_dropout, check_task_names, has_tasks, line_of_one_task

#: The name of a format, a line of legs, or a callable ``(shape, rank, ...)`` that returns a network.
Decomposition = Union[str, Callable[..., Network]]
Device = Union[torch.device, str, None]


@dataclass(frozen=True, eq=False)
class Plan:
    """A plan of an adapter that is on no model yet; it prints as a table of the adapter's tensors.

    Attributes:
        groups: the groups of sites, each of which shares one network.
        networks: the networks by name of the group.
        config: the settings of the adapter.
        tasks: the names of the tasks, if the networks have the mode ``task``.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> planned = lortalib.nn.plan(model, "cp", rank=2)
        >>> planned.count(), planned.lora_count(2), len(planned.sites)
        (100, 1024, 8)
    """

    groups: tuple[Group, ...]
    networks: Mapping[str, Network]
    config: AdapterConfig
    tasks: tuple[str, ...] = ()

    @property
    def sites(self) -> list[Site]:
        """Every projection that would be updated."""
        return [site for group in self.groups for site in group.sites]

    @takes(trainable_only=FLAG, shared=FLAG)
    def count(self, trainable_only: bool = True, *, shared: bool = True) -> int:
        """Count the parameters of the networks; a parameter that several networks share counts once.

        Args:
            trainable_only: whether parameters marked ``(frozen)`` are left out.
            shared: whether parameters marked ``(shared)`` are counted.
        """
        return count_parameters(self.networks.values(), trainable_only, shared=shared)

    def lora_count(self, rank: int) -> int:
        """Count the parameters that PEFT's LoRA of this rank has on the same modules.

        Args:
            rank: rank of the LoRA.

        Raises:
            TypeError, ValueError: the rank is no integer of at least 1.
        """
        check_number("rank", rank, least=1, is_integer=True)
        return lora_count(self.groups, rank)

    def __str__(self) -> str:
        count, rank = self.count(), _largest_rank(self.networks)
        lora = self.lora_count(rank)
        return "\n".join(
            [
                f"Plan: {self.config.decomposition}, scaling {self.config.scaling:g}"
                + f", tasks {', '.join(self.tasks)}" * bool(self.tasks),
                *network_table(self.groups, self.networks),
                f"  {count:,} trainable parameters; LoRA of rank {rank} on these "
                f"{len(self.sites)} projections has {lora:,}",
            ]
        )


def plan_sites(
    sites: Sequence[Site],
    decomposition: Decomposition,
    rank: Rank,
    *,
    alpha: float = 1.0,
    dropout: float = 0.0,
    init: StartLike = "invariant",
    gqa: str = "pool",
    acts_on: str | None = None,
    share_residual: bool = False,
    shared: Iterable[str] = (),
    tasks: Sequence[str] = (),
    generator: torch.Generator | None = None,
    device: Device | Callable[[Site], Device] = None,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """Plan an adapter on given sites, for tools such as PEFT that find the sites themselves.

    Args:
        sites: the projections to update.
        decomposition: as for `apply`, like all further arguments except ``device``.
        rank: as for `apply`.
        alpha: as for `apply`.
        dropout: as for `apply`.
        init: as for `apply`.
        gqa: as for `apply`.
        acts_on: as for `apply`.
        share_residual: as for `apply`.
        shared: as for `plan`.
        tasks: as for `apply`.
        generator: as for `apply`.
        dtype: as for `apply`.
        device: device of the networks, or a function from the first site of each network to its device.

    Raises:
        ValueError: a bad argument.
    """
    check_settings(alpha, dropout, init, acts_on)
    acts_on = choose_acts_on(decomposition, acts_on)
    on_stream = acts_on == "stream"
    check_legs(shared)
    tasks = check_task_names(tasks)
    if tasks:
        check_dropout(dropout)
    groups = group_sites(stream_sites(sites) if on_stream else sites, gqa, on_stream)
    networks = {}
    for group in groups:
        options: dict[str, Any] = {"init": init, "generator": generator, "dtype": dtype}
        options["device"] = device(group.sites[0]) if callable(device) else device
        network = make_network(decomposition, group, rank, options, tasks)
        if tasks:
            line_of_one_task(network.legs)  # raises if a task has no parameters of its own
        networks[group.name] = _marked(network, shared) if shared else network
    if share_residual:
        share_input_factor(groups, networks)
    config = AdapterConfig(
        decomposition=_name_of(decomposition),
        alpha=float(alpha),
        scaling=float(alpha) / (_published_rank(networks) if init == "lorta" else 1),
        dropout=float(dropout),
        gqa=gqa,
        init=init if isinstance(init, str) else getattr(init, "__name__", "callable"),
        share_residual=share_residual,
        acts_on=acts_on,
    )
    return Plan(tuple(groups), networks, config, tasks)


def _marked(network: Network, shared: Iterable[str]) -> Network:
    """Return a network of the same values whose parameters with one of these legs are ``(shared)``."""
    legs = mark_shared(network.legs, shared)
    return Network(legs, network.stored, network.modes, sizes=network.sizes)


def check_whole(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Refuse weights that tensor parallelism divides over processes.

    Args:
        model: the model that the weights belong to.
        weights: the weights by path of their module.

    Raises:
        ValueError: a weight is a DTensor, and FSDP2, which gathers whole weights, did not make it.
    """
    divided = {path: w for path, w in weights.items() if hasattr(w, "device_mesh")}
    if divided and not any(type(module).__name__.startswith("FSDP") for module in model.modules()):
        path, weight = next(iter(divided.items()))
        raise ValueError(
            f"the weight of {path} is divided over the processes of {weight.device_mesh} (tensor "
            "parallelism): an update would be added to a part of an output as if it were the whole. "
            "Load the model without tp_plan; DDP and FSDP2 work, and for serving merge the adapter "
            "or export it as a LoRA"
        )


def make_network(
    decomposition: Decomposition,
    group: Group,
    rank: Rank,
    options: dict[str, Any],
    tasks: Sequence[str] = (),
) -> Network:
    """Make the network of a group, over the tasks if there are any, and check its shape."""
    shape = Shape({TASK: len(tasks), **group.shape}) if tasks else group.shape
    if isinstance(decomposition, str):
        made = get_format(decomposition)
        if not tasks and has_tasks(made.legs(shape)):
            raise ValueError(
                f"the decomposition {decomposition!r} has the mode 'task', whose positions are named as in "
                "lortalib.nn.apply(model, ..., tasks=['sst2', 'mrpc']). A bank and PEFT have no such mode: "
                "they choose whole adapters by name"
            )
        return made(shape, rank, **options)
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
    """Call a function with the options that it takes by name; a second positional parameter gets the rank."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a builtin, which no network comes from
        raise ValueError(
            f"decomposition must be a function (shape, rank, ...) that returns a network; found {function!r}"
        ) from None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function(shape, **options)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    accepted = {name: value for name, value in options.items() if name in named}
    second = parameters[1] if len(parameters) > 1 else None
    if second is not None and second.kind is not second.KEYWORD_ONLY and second.name not in options:
        return function(shape, options["rank"], **accepted)
    return function(shape, **accepted)


def share_input_factor(groups: Sequence[Group], networks: Mapping[str, Network]) -> None:
    """Let the networks of one stack share the parameter for ``in`` if its legs and size are equal."""
    owners: dict[tuple[object, ...], nn.Parameter] = {}
    for group in groups:
        network = networks[group.name]
        inputs = set(network.legs.open_legs(["in"]))
        others = set(network.legs.open_legs([TASK, "layer", "matrix", "head", "expert"]))
        for name, term in zip(network.names, network.legs.terms):
            if inputs & set(term.legs) and not term.of and not others & set(term.legs):
                own = network.get_parameter(name)
                key = (group.sites[0].stack, term.legs, own.shape)
                network.register_parameter(name, owners.setdefault(key, own))


def _name_of(decomposition: Decomposition) -> str:
    if isinstance(decomposition, str):
        return get_format(decomposition).name or decomposition
    name = getattr(decomposition, "name", "") or getattr(decomposition, "__name__", "")
    return name or type(decomposition).__name__


def _published_rank(networks: Mapping[str, Network]) -> int:
    """Return the r of alpha/r: the product of the bond sizes at the parameter that starts at zero."""
    network = next(iter(networks.values()))
    term = network.legs.terms[network.legs.zero]
    return math.prod(network.sizes[leg] for leg in term.legs if leg in network.ranks)


def _largest_rank(networks: Mapping[str, Network]) -> int:
    return max((n for net in networks.values() for n in net.ranks.values()), default=1)
