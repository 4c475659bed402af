"""Pairs that were made: one node of the graph, and what they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..decomp import TensorNetwork

if TYPE_CHECKING:
    from ._factors import Factors


class Pair(NamedTuple):
    """The two maps of a share, ``y += (x @ first^T) @ second``; leading axes are slices.

    Attributes:
        first: (p, features that the module reads).
        second: (p, features of the module's whole output). The scaling is in one of them.
    """

    first: Tensor
    second: Tensor


class Made:
    """Pairs that were made, and the state of the parameters they were made from.

    Attributes:
        pairs: for each layer the pair of every kind.
        doubted: whether the numbers have to be compared before the next use.
        checked: when they were last seen to hold; see `Factors._now`.
    """

    # Where they can be used: in inference mode, without gradients of the parameters, with them.
    _INFERENCE, _VALUES, _GRAPH = range(3)

    def __init__(self, factors: Factors, dtype: torch.dtype, device: torch.device) -> None:
        parameters = factors.network.tensors
        self._state = [(p, p._version, p.data_ptr(), p.requires_grad) for p in parameters]
        # On a GPU comparing would wait for the device, which costs more than making them again.
        compare = all(p.device.type == "cpu" for p in parameters)
        self._copies = [p.detach().clone() for p in parameters] if compare else []
        self._use = self._wanted()
        self.doubted = False
        self.checked: tuple[int, int, bool] | None = None
        rows = iter(Make.apply(factors, dtype, device, *parameters))
        layers = range(len(factors.group.layers))
        made = [[[next(rows) for _ in range(n)] for _ in layers] for n in factors.matrices]
        self.pairs = [
            [Pair(made[a][layer][i], made[b][layer][j]) for (a, i), (b, j) in factors.places]
            for layer in layers
        ]

    def hold(self, network: TensorNetwork) -> bool:
        """Whether they are those of the network as it is, and can be used in the present mode."""
        for p, (own, version, pointer, trained) in zip(network.tensors, self._state):
            if p is not own or p._version != version:
                return False
            if p.data_ptr() != pointer or p.requires_grad != trained:
                return False
        if self.doubted:
            same = (torch.equal(entry[0], kept) for entry, kept in zip(self._state, self._copies))
            if not self._copies or not all(same):
                return False
            self.doubted = False
        return self._use >= self._wanted()

    def _wanted(self) -> int:
        if torch.is_grad_enabled():
            return self._GRAPH if any(entry[3] for entry in self._state) else self._VALUES
        return self._INFERENCE if torch.is_inference_mode_enabled() else self._VALUES


class Make(Function):
    """All pairs of a group as one node of the graph.

    It saves no tensor: the parameters are few, and the contraction is repeated in the backward. So
    one set of pairs serves several backwards (accumulation, reentrant checkpoints), and a forward
    that a checkpoint repeats saves what it saved at first, whoever made the pairs.
    """

    @staticmethod
    def forward(
        ctx: Any, factors: Factors, dtype: torch.dtype, device: torch.device, *parameters: Tensor
    ) -> Any:
        ctx.factors, ctx.parameters = factors, parameters
        ctx.versions = [p._version for p in parameters]
        ctx.set_materialize_grads(False)
        layers = len(factors.group.layers)
        made, factors.places = factors.make(parameters)
        factors.matrices = [tensor.shape[1] for tensor in made]
        # Products run along rows.
        made = [tensor.to(device, dtype).contiguous() for tensor in made]
        rows = [_every(tensor, layers).flatten(0, 1) for tensor in made]
        return tuple(row for tensor in rows for row in tensor.unbind())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        factors: Factors = ctx.factors
        parameters: tuple[Tensor, ...] = ctx.parameters
        if ctx.versions != [p._version for p in parameters]:
            raise RuntimeError(
                f"a parameter of the network {factors.group.name!r} was changed in place between "
                "the forward and the backward; run the forward again after a step of the optimiser"
            )
        factors.reads.backwards += 1
        factors.doubt()  # an optimiser may follow that leaves no trace in the versions
        # One that was frozen since the forward is passed over, as by autograd itself.
        trained = [k for k, p in enumerate(parameters) if p.requires_grad]
        given = iter(gradients)
        layers = range(len(factors.group.layers))
        rows = [[[next(given) for _ in range(n)] for _ in layers] for n in factors.matrices]
        used = [layer for layer in layers if any(_any(row[layer]) for row in rows)]
        with torch.enable_grad():
            # Aliases: hooks on a parameter are to see its gradient once, from the outer graph.
            aliases = [p.view_as(p) for p in parameters]
            rows_of = factors.rows(aliases, used)
            made = [_every(tensor, len(used)) for tensor in factors.make(rows_of)[0]]
        outputs, upstream = [], []
        for tensor, row in zip(made, rows):
            if tensor.requires_grad and any(_any(row[layer]) for layer in used):
                outputs.append(tensor)
                flat = [gradient for layer in used for gradient in row[layer]]
                upstream.append(_stack(flat, tensor))
        if not outputs:
            return None, None, None, *[None] * len(parameters)
        found = torch.autograd.grad(
            outputs,
            [aliases[k] for k in trained],
            upstream,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        result: list[Tensor | None] = [None] * len(parameters)
        for k, gradient in zip(trained, found):
            result[k] = gradient
        return None, None, None, *result


def _every(tensor: Tensor, layers: int) -> Tensor:
    """With a row for each layer, also where all layers are alike."""
    return tensor.expand(layers, *tensor.shape[1:])


def _any(row: Sequence[Tensor | None]) -> bool:
    return any(gradient is not None for gradient in row)


def _stack(rows: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Gradients in the shape and dtype of what was made; zero where there is none."""
    zero = next(row for row in rows if row is not None).new_zeros(like.shape[2:])
    found = torch.stack([zero if row is None else row for row in rows])
    return found.to(like.device, like.dtype).view(like.shape)
