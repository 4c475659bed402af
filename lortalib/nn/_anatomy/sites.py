"""Finds the attention projections of a model and lists them as sites, which are data.

It works by rules, without a list of models. The name of a projection gives its role, a block is a module
with projections of the roles q, k and v, and widths decide what names leave open (the output projection
must read heads * head_dim). Nothing in the model is changed, and no weight is read, so a model on the
meta device will do. Facts that no rule can find are rows in ``rules``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..._kinds import takes
from .attention import claimed_twice, find_blocks, overlooked_blocks
from .block import BlockError, read_block
from .mlp import read_mlps
from .rules import RULES, RULES_KIND, BlockRule
from .site import Site
from .stacks import SiteList, bare_prefix, join_tied, number_layers
from .wrappers import named_modules, unwrapped


class UnsupportedModelError(ValueError):
    """Raised for a model whose attention projections were not found, or not all of them."""


class NoAttentionError(UnsupportedModelError):
    """Raised for a model in which no attention was found."""


@takes(rules=RULES_KIND)
def sites(model: nn.Module, *, rules: BlockRule | Sequence[BlockRule] = ()) -> SiteList:
    """Find every attention projection of a transformers model.

    Args:
        model: any transformers model; also on the meta device.
        rules: rows with facts that lortalib cannot find itself, for remote-code models; they take
            precedence over its own.

    Returns:
        The sites, ordered by stack, layer and role. The list prints as a table by stack.

    Raises:
        NoAttentionError: no attention projection was found; it is an `UnsupportedModelError`.
        UnsupportedModelError: a block that looks like attention was not understood; the message names
            the block and what it contains.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                     intermediate_size=64)
        >>> site = sites(BertModel(config))[3]
        >>> site.role, site.path, site.heads, site.head_dim, site.writer
        ('o', 'encoder.layer.0.attention.output.dense', 4, 8, True)
    """
    model = check_model(model)
    rules = ((rules,) if isinstance(rules, BlockRule) else tuple(rules)) + RULES
    found, refused = _read(model, rules)
    if refused:
        raise UnsupportedModelError(_refusal_text(model, len(found), refused))
    if not found:
        raise NoAttentionError(_refusal_text(model, 0, {}))
    return _listed(model, found)


def understood_sites(model: nn.Module) -> SiteList:
    """Find the projections of all attention blocks that are understood, even if others are not.

    This is for callers that name the modules they want, such as PEFT.
    """
    found, refused = _read(model, RULES)
    return _listed(model, {k: v for k, v in found.items() if k.partition(" ")[0] not in refused})


def _read(
    model: nn.Module, rules: Sequence[BlockRule]
) -> tuple[dict[str, list[Site]], dict[str, str]]:
    """Return the sites by the name of their block, and the reason by path for each block not understood."""
    modules = named_modules(model)
    found: dict[str, list[Site]] = {}
    refused: dict[str, str] = {}
    for block in find_blocks(modules, rules):
        try:
            found[block.name] = read_block(block, modules)
        except BlockError as error:
            refused[block.path] = str(error)
    refused |= overlooked_blocks(modules, found, refused, rules)
    refused |= claimed_twice(found)
    return found, refused


def _listed(model: nn.Module, found: dict[str, list[Site]]) -> SiteList:
    return SiteList(number_layers(join_tied(found, named_modules(model)), bare_prefix(model)))


def check_model(model: object) -> nn.Module:
    """Return the model without its wrappers.

    Raises:
        TypeError: it is not a module.
    """
    if not isinstance(model, nn.Module):
        found = (
            repr(model)
            if isinstance(model, str)
            else f"an object of the type {type(model).__name__}"
        )
        raise TypeError(
            f"expected a model, a torch.nn.Module; found {found}. Load it first, for instance with "
            "transformers.AutoModel.from_pretrained"
        )
    return unwrapped(model)


def mlp_sites(model: nn.Module) -> SiteList:
    """Find every MLP projection that is recognised: gate, up (readers) and down (writers).

    Experts packed as 3-D parameters are sites with ``experts`` set; shared experts and MLPs in lists
    are ordinary sites. Their stacks are named after the towers that contain them.

    Args:
        model: the model; the meta device is enough.

    Raises:
        UnsupportedModelError: no MLP was found.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2,
        ...                      intermediate_size=16)
        >>> [(site.role, site.weight_shape) for site in mlp_sites(LlamaModel(config))]
        [('gate', (16, 8)), ('up', (16, 8)), ('down', (8, 16))]
    """
    model = check_model(model)
    found = read_mlps(named_modules(model))
    if not found:
        raise UnsupportedModelError(
            f"no MLP was found in {type(model).__name__}: looked for modules that hold an up- and a "
            "down-projection (gate_proj/up_proj/down_proj, fc1/fc2, intermediate/output.dense, ...) "
            "of widths that fit each other, or packed experts"
        )
    return _listed(model, found)


def _refusal_text(model: nn.Module, n_found: int, refused: dict[str, str]) -> str:
    name = type(model).__name__
    if not refused:
        return (
            f"no attention was found in {name}: looked for modules that hold projections for q, k "
            "and v (named q_proj, query, to_q, Wq, qkv, ...) and saw "
            f"{', '.join(n for n, _ in model.named_children()) or 'no submodules'}"
        )
    modules = named_modules(model)
    lines = [
        f"of {n_found + len(refused)} attention blocks in {name}, {len(refused)} were not "
        "understood; nothing was changed. Looked for a module with projections for q, k, v (apart or "
        "fused) and an output projection that reads heads * head_dim features. Not understood:"
    ]
    shown = list(refused.items())[:5]
    lines += [f"  {path or name} ({type(modules[path]).__name__}): {why}" for path, why in shown]
    if len(refused) > len(shown):
        lines.append(f"  ... and {len(refused) - len(shown)} more")
    lines.append(
        "A row rules=lortalib.nn.BlockRule(...) tells what cannot be read off; see docs/models.md"
    )
    return "\n".join(lines)
