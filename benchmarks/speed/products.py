"""The products of CP's update alone, added by bare hooks from pairs that are parameters themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def add_products(model: nn.Module, rank: int) -> int:
    """Add ``(x A^T) B`` to each projection of a Llama by a bare hook, A being common to q, k and v.

    The products are those that lortalib takes, in the same layout, and into the output in place.

    Returns:
        The number of projections.
    """
    number = 0
    for layer in model.model.layers:
        attention = layer.self_attn
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        for modules in (qkv, [attention.o_proj]):
            down = nn.Parameter(torch.randn(rank, modules[0].in_features) * 0.02)
            modules[0].register_parameter("down", down)
            known: list[Tensor] = []  # the product that all of these modules have in common
            for module in modules:
                up = nn.Parameter(torch.randn(rank, module.out_features) * 0.02)
                module.register_parameter("up", up)
                module.register_forward_hook(product_hook(down, up, known, module is modules[-1]))
                number += 1
    return number


def product_hook(
    down: Tensor, up: Tensor, known: list[Tensor], is_last: bool
) -> Callable[..., Tensor]:
    """The forward hook of one projection; ``known`` has its product with ``down`` if another took it."""
    as_shape = torch.ops.aten._unsafe_view.default  # of a view, autograd would copy the gradient

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not known:
            known.append((down @ args[0].flatten(0, -2).t()).t())
        (h,) = known
        if is_last:
            known.clear()
        flat = as_shape(output, (-1, output.shape[-1]))
        return as_shape(flat.addmm_(h, up), output.shape)  # type: ignore[no-any-return]

    return hook
