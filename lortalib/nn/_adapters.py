"""Finds, names, switches and installs the adapters of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._kinds import TEXT, TEXTS
from .._stacklevel import outside
from ._adapter import Adapter
from ._adapter_dict import home_of
from ._anatomy import ATTRIBUTE, check_model, unwrapped, wrappers
from ._host import AdapterHost
from ._save_pretrained import stand_in
from ._sharded import sharded_parts


def install(adapter: Adapter, model: nn.Module, *, active: bool, freeze: bool) -> None:
    """Put a finished adapter on a model. `apply` and `load` change a model only here.

    Args:
        adapter: an adapter that is on no model yet.
        model: the model.
        active: whether the adapter takes part in the forward at once.
        freeze: whether all other parameters of the model stop requiring gradients.

    Raises:
        ValueError: another active adapter uses a module that this one trains, or the model has an
            attribute ``lortalib`` that holds no adapters.
    """
    model = unwrapped(model)
    if sharded_parts(model):
        warnings.warn(
            "FSDP2 divides this model already, and does not know the parameters of an adapter that comes "
            "later: they can be used, but would train apart in each process. To train, put the adapter on "
            "before fully_shard",
            stacklevel=outside(),
        )
    trained = _trained_by_peft(model) if freeze else 0
    if trained:
        warnings.warn(
            f"PEFT trains {trained:,} parameters of this model, which are frozen from here on, so that only "
            f"adapter {adapter.name!r} trains; pass freeze=False to train both, or call merge_and_unload() "
            "first to make what was trained a part of the base",
            stacklevel=outside(),
        )
    host = host_of(model)
    others = host.adapters() if host else []
    taken = adapter.trained_modules.conflict(o.trained_modules for o in others if o.active)
    if active and taken:
        raise ValueError(
            f"{taken!r} is trained by another active adapter and can hold only one's values; "
            "disable that adapter first, or pass active=False"
        )
    with ExitStack() as undo:
        if host is None:
            if hasattr(home_of(model), ATTRIBUTE):
                raise ValueError(
                    f"the model has an attribute {ATTRIBUTE!r} that is no adapter; rename it first"
                )
            host = AdapterHost(model)
            undo.callback(host.release)
            home_of(model).add_module(ATTRIBUTE, host)
            stand_in(model, host)
        host.install(adapter, active, freeze, undo)
        undo.pop_all()


def _is_in_ddp(model: Any) -> bool:
    """Return True for a model in DistributedDataParallel that runs on several processes."""
    is_several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not is_several or not isinstance(model, nn.Module):
        return False
    return any(isinstance(each, DistributedDataParallel) for each in wrappers(model))


def _trained_by_peft(model: nn.Module) -> int:
    """Count the trainable parameters in PEFT's layers, without those of the modules that they wrap."""
    kinds = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")
    found: dict[int, int] = {}
    for module in model.modules():
        if any(kind.__name__ in kinds for kind in type(module).__mro__):
            base = getattr(module, "base_layer", getattr(module, "original_module", None))
            own = {id(p) for p in base.parameters()} if isinstance(base, nn.Module) else set()
            parameters = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
            found |= {id(p): p.numel() for p in parameters}
    return sum(found.values())


def host_of(model: nn.Module) -> AdapterHost | None:
    """Return the host of a model's adapters; None if the model has no adapter."""
    host = home_of(unwrapped(model))._modules.get(ATTRIBUTE)
    return host if isinstance(host, AdapterHost) else None


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a model by name, in the order in which they were applied.

    Args:
        model: the model, also in a wrapper such as that of torch.compile or DistributedDataParallel.

    Raises:
        TypeError: the model is no torch module.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> first = lortalib.nn.apply(model, "cp", rank=2)
        >>> second = lortalib.nn.apply(model, "tt", rank=2, name="second")
        >>> list(adapters(model)), adapters(model)["second"] is second
        (['default', 'second'], True)
    """
    host = host_of(check_model(model))
    return {adapter.name: adapter for adapter in host.adapters()} if host else {}


def set_active(model: nn.Module, names: str | Iterable[str]) -> None:
    """Switch exactly these adapters on in the forward; their updates add up.

    The cost does not depend on the size of the model.

    Args:
        model: a model with adapters.
        names: one name, several, or none (``[]``).

    Raises:
        KeyError: a name that no adapter has.
        TypeError: the model is no torch module, or a name is no text.
        ValueError: two of them train the same module. After any error the model is unchanged.

    Example:
        >>> import lortalib
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32,
        ...                              num_attention_heads=4, intermediate_size=64))
        >>> for name in ("one", "two"):
        ...     adapter = lortalib.nn.apply(model, "cp", rank=2, name=name)
        >>> set_active(model, "two")
        >>> [name for name, adapter in adapters(model).items() if adapter.active]
        ['two']
    """
    names = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    TEXTS.check("names", names)
    wanted = list(dict.fromkeys(names))
    known = adapters(model)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise KeyError(
            f"no adapter is called {', '.join(map(repr, unknown))}; the model has "
            f"{', '.join(map(repr, known)) or 'none'}"
        )
    for position, name in enumerate(wanted):
        before = [known[other].trained_modules for other in wanted[:position]]
        taken = known[name].trained_modules.conflict(before)
        if taken:
            raise ValueError(
                f"the adapters {wanted} cannot be active together: both train {taken!r}"
            )
    host = host_of(model)
    if host is not None:
        host.set_active([known[name] for name in wanted])


def check_name(model: nn.Module, name: str) -> nn.Module:
    """Check the model and the name of a new adapter.

    Returns:
        The model without its wrappers.

    Raises:
        TypeError: the model is no torch module.
        ValueError: the name is in use or impossible.
    """
    if _is_in_ddp(model):
        warnings.warn(
            "DistributedDataParallel holds this model already, and does not know the parameters of an "
            "adapter that comes later: they would train apart in each process. Put the adapter on first",
            stacklevel=outside(),
        )
    model = check_model(model)
    if not TEXT.fits(name) or not name or "." in name:
        raise ValueError(
            "an adapter's name, which files hold as UTF-8, must be a non-empty string without dots; "
            f"found {name!r}"
        )
    if name in adapters(model):
        raise ValueError(
            f"the model already has an adapter called {name!r}; give name=..., or remove that one "
            f"with lortalib.nn.adapters(model)[{name!r}].remove()"
        )
    if hasattr(host_of(model) or AdapterHost(nn.Module()), name):
        raise ValueError(f"{name!r} is no possible name for an adapter; choose another")
    return model
