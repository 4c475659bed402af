"""Computes the pairs of all layers as a single node of the autograd graph that saves no tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..._torch import is_batched


class Counter:
    """A counter that only grows: `MakePairs` increases it in every backward, and its owner reads it."""

    def __init__(self) -> None:
        self.value = 0


class Contraction(NamedTuple):
    """The contraction that computes the matrices of all pairs from the parameters of one network.

    Attributes:
        name: name of the network, for messages.
        layers: number of layers.
        spread: function of the parameters that returns the tensors of the terms; the two differ only for
            hashed terms.
        contract: function of the terms' tensors that returns tensors (layers, matrices, ...); the first
            axis has size 1 if all layers are alike.
        of_layers: function of the terms' tensors and positions of layers that returns the tensors of these
            layers.
        backwards: counter that every backward increases.
    """

    name: str
    layers: int
    spread: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    contract: Callable[[Sequence[Tensor]], list[Tensor]]
    of_layers: Callable[[Sequence[Tensor], Sequence[int]], Sequence[Tensor]]
    backwards: Counter


def matrices(
    how: Contraction, dtype: torch.dtype, device: torch.device, parameters: Sequence[Tensor]
) -> tuple[list[int], tuple[Tensor, ...]]:
    """Compute the matrices of all layers.

    Returns:
        The number of matrices that a layer has in each tensor of ``how.contract``; and all matrices,
        ordered by tensor, layer and matrix. Their graph refers to the parameters and to no other tensor.
    """
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        counts: list[int] = []
        return counts, MakePairs.apply(how, dtype, device, counts, *parameters)
    return _contracted(how, dtype, device, parameters)


def _contracted(
    how: Contraction, dtype: torch.dtype, device: torch.device, parameters: Sequence[Tensor]
) -> tuple[list[int], tuple[Tensor, ...]]:
    # Contiguous, so that the products with A and B read memory in order.
    made = [
        tensor.to(device, dtype).contiguous() for tensor in how.contract(how.spread(parameters))
    ]
    found = [matrix for tensor in made for matrix in _by_layer(tensor, how.layers)]
    return [t.shape[1] for t in made], tuple(found)


def _by_layer(tensor: Tensor, layers: int) -> Sequence[Tensor]:
    """List the matrices of every layer. Layers that are alike have views of one memory."""
    if len(tensor) == 1 and tensor.shape[1] > 1:  # flattened, they would be copied
        return [matrix for _ in range(layers) for matrix in tensor[0].unbind()]
    return _every(tensor, layers).flatten(0, 1).unbind()


class MakePairs(Function):
    """Computes all matrices of a network's pairs as one node of the autograd graph.

    The node saves no tensor: the parameters are small, and the backward repeats the contraction. So one
    set of pairs serves several backwards (accumulation, reentrant checkpoints), and a forward that a
    checkpoint runs again saves the same tensors as the first time, whichever forward made the pairs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        how: Contraction,
        dtype: torch.dtype,
        device: torch.device,
        counts: list[int],
        *parameters: Tensor,
    ) -> Any:
        ctx.how, ctx.parameters = how, parameters
        ctx.versions = [p._version for p in parameters]
        ctx.set_materialize_grads(False)
        ctx.counts, found = _contracted(how, dtype, device, parameters)
        counts.extend(ctx.counts)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        how: Contraction = ctx.how
        parameters: tuple[Tensor, ...] = ctx.parameters
        if ctx.versions != [p._version for p in parameters]:
            raise RuntimeError(
                f"a parameter of the network {how.name!r} was changed in place between "
                "the forward and the backward; run the forward again after a step of the optimiser"
            )
        if any(each is not None and is_batched(each) for each in gradients):
            raise RuntimeError(
                "several gradients at once (is_grads_batched=True, or vectorize=True of "
                "torch.autograd.functional) do not pass through the network "
                f"{how.name!r}; use torch.func.vmap, jacrev or hessian with torch.func.functional_call, "
                "or one gradient after another"
            )
        how.backwards.value += 1
        # A parameter that was frozen after the forward gets no gradient, as in autograd itself.
        trained = [k for k, p in enumerate(parameters) if p.requires_grad]
        given = iter(gradients)
        layers = range(how.layers)
        # By tensor of the contraction, layer and matrix.
        of_matrices = [[[next(given) for _ in range(n)] for _ in layers] for n in ctx.counts]
        used = [layer for layer in layers if any(_any(each[layer]) for each in of_matrices)]
        of_parameters: list[Tensor | None] = [None] * len(parameters)
        if not used:
            return None, None, None, None, *of_parameters
        with torch.enable_grad():
            # Views keep hooks on the parameters from seeing this inner gradient besides the outer one.
            aliases = [p.view_as(p) for p in parameters]
            tensors = how.of_layers(how.spread(aliases), used)
            made = [_every(t, len(used)) for t in how.contract(tensors)]
        outputs, upstream = [], []
        for tensor, each in zip(made, of_matrices):
            if tensor.requires_grad and any(_any(each[layer]) for layer in used):
                outputs.append(tensor)
                flat = [gradient for layer in used for gradient in each[layer]]
                upstream.append(_stack(flat, tensor))
        if not outputs:
            return None, None, None, None, *of_parameters
        found = torch.autograd.grad(
            outputs,
            [aliases[k] for k in trained],
            upstream,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        for k, gradient in zip(trained, found):
            of_parameters[k] = gradient
        return None, None, None, None, *of_parameters


def _every(tensor: Tensor, layers: int) -> Tensor:
    """Expand a tensor to one row for each layer, also if all layers are alike."""
    return tensor.expand(layers, *tensor.shape[1:])


def _any(gradients: Sequence[Tensor | None]) -> bool:
    return any(gradient is not None for gradient in gradients)


def _stack(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Stack gradients in the shape and dtype of a tensor; a missing gradient becomes zeros."""
    zero = next(each for each in gradients if each is not None).new_zeros(like.shape[2:])
    found = torch.stack([zero if each is None else each for each in gradients])
    return found.to(like.device, like.dtype).view(like.shape)
