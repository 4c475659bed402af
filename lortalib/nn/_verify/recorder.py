"""Records the attention calls of a forward by watching its arithmetic, whatever the modules are named.

An attention call is a product of two activations (the scores), a softmax and a product with a third
activation (the values), with any elementwise functions in between. Torch passes every function of a
forward to a ``TorchFunctionMode``; this one follows scores to their softmax and on to the values.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_T = torch.Tensor


_REVERSED = _T.__rmatmul__


_PRODUCTS = frozenset(
    (torch.matmul, torch.bmm, torch.mm, _T.matmul, _T.bmm, _T.mm, _T.__matmul__, _REVERSED)
)


_ADDED = frozenset((torch.baddbmm, torch.addmm, _T.baddbmm, _T.addmm))


_SOFTMAX = frozenset((torch.softmax, functional.softmax, torch.special.softmax, _T.softmax))


#: Functions whose results are no scores any more.
_ENDS = frozenset(
    getattr(functional, name)
    for name in ("linear", "conv1d", "conv2d", "conv3d", "layer_norm", "group_norm", "rms_norm")
)


# A copy of torch's own code; the mode also sees the functions that it calls.
_multi_head_attention = FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**vars(functional), "has_torch_function": lambda _: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)


@dataclass(eq=False, frozen=True)
class ScoreOperands:
    """Two activations whose product is part of the scores.

    Attributes:
        one, other: the operands, in the order of the code.
        ordered: whether they are known to be queries and keys, in this order.
    """

    one: Tensor
    other: Tensor
    ordered: bool = False


@dataclass(eq=False, frozen=True)
class AttentionCall:
    """An attention call: one product of attention weights with values.

    Attributes:
        where: the path of the innermost module whose code made the call.
        weights: (units, queries, keys); a unit is one head of one entry of the batch. In the graph,
            the softmax is the identity wherever a weight is not zero, so that a saturated softmax
            does not lose the gradient.
        mixed: (units, queries, components), the output; in the graph it depends on the values only.
        gate: (units, queries) of ones; the rest of the forward depends on the call through them only.
        pairs: the operands of the scores.
    """

    where: str
    weights: Tensor
    mixed: Tensor
    gate: Tensor
    pairs: tuple[ScoreOperands, ...]


class AttentionRecorder(TorchFunctionMode):
    """A mode that collects the attention calls of a forward and cuts the graph behind each.

    Args:
        names: the path of each module, to tell where a call was made.
        writers: the weights of output projections that code reads directly, by path. Their inputs are
            collected in ``written``, and the graph is cut behind them too.
    """

    def __init__(self, names: Mapping[nn.Module, str], writers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []
        self.written: list[tuple[str, Tensor]] = []
        self._names = names
        self._writers = {id(weight): path for path, weight in writers.items()}
        # The tensor is kept with its id, so that Python cannot give the id to another tensor.
        self._scores: dict[int, tuple[Tensor, tuple[ScoreOperands, ...]]] = {}
        self._weights: dict[int, tuple[Tensor, tuple[ScoreOperands, ...]]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` in its place, as torch asks; calls are traced even if the code turns gradients off."""
        with torch.enable_grad():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        if func is functional.linear and len(args) > 1 and id(args[1]) in self._writers:
            self.written.append((self._writers[id(args[1])], args[0]))
            return func(*args, **kwargs).detach()
        product = _Product.read(func, args, kwargs)
        if product:
            return self._multiply(product)
        out = func(*args, **kwargs)
        if func in _SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            if id(scores) in self._scores:
                out = _straight_through(scores, out)
                self._weights[id(out)] = out, self._scores[id(scores)][1]
        elif func not in _ENDS:
            self._follow((args, kwargs), args[0] if func is _T.__setitem__ else out)
        return out

    def _follow(self, inputs: Any, outputs: Any) -> None:
        """Carry the knowledge about the inputs over to the outputs."""
        ids = [id(tensor) for tensor in _tensors(inputs)]
        for known in (self._scores, self._weights):
            pairs = dict.fromkeys(pair for key in ids if key in known for pair in known[key][1])
            for tensor in _tensors(outputs) if pairs else ():
                if tensor.is_floating_point():
                    known[id(tensor)] = tensor, tuple(pairs)

    def _multiply(self, product: _Product) -> Tensor:
        for flipped in (False, True):
            weights = product.right if flipped else product.left
            if id(weights) in self._weights and product.is_mixture(flipped):
                return self._call(product, flipped, self._weights[id(weights)][1])
        out = product.run(product.left, product.right)
        if not (_is_parameter(product.left) or _is_parameter(product.right)):
            self._scores[id(out)] = out, (ScoreOperands(product.left, product.right),)
        return out

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Compute scaled_dot_product_attention step by step."""
        pair = ScoreOperands(query, key, ordered=True)
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask.to(scores.dtype)
        weights = _straight_through(scores, torch.nan_to_num(scores.softmax(-1)))
        return self._call(_Product.matmul(weights, value), False, (pair,))

    def _call(self, product: _Product, flipped: bool, pairs: tuple[ScoreOperands, ...]) -> Tensor:
        """Record the call and return its output for the rest of the forward."""
        weights, values = product.left, product.right
        axes, other, out = product.axes
        operands = weights.detach(), values
        if flipped:
            weights, axes, other = values, other, axes
            operands = product.left, weights.detach()
        mixed = product.run(*operands)
        size = dict(zip((*axes, *out), (*weights.shape, *mixed.shape)))
        keys = [axis for axis in axes if axis not in out]
        rows = [axis for axis in axes if axis in out and axis not in other][-1:]
        units = [axis for axis in axes if axis in out and axis not in rows]
        inner = [axis for axis in out if axis not in axes]
        flat = math.prod(size[axis] for axis in units), math.prod(size[axis] for axis in rows), -1

        def arranged(tensor: Tensor, names: str, last: list[str]) -> Tensor:
            tensor = tensor.expand([size[axis] for axis in names])
            order = [names.index(axis) for axis in (*units, *rows, *last)]
            return tensor.permute(order).reshape(flat)

        gate = mixed.new_ones(flat[:2], requires_grad=True)
        call = AttentionCall(
            where=self._where(),
            weights=arranged(weights, axes, keys),
            mixed=arranged(mixed, out, inner),
            gate=gate,
            pairs=pairs,
        )
        self.calls.append(call)
        order = [*units, *rows, *inner]
        shaped = gate.reshape([1 if axis in inner else size[axis] for axis in order])
        return mixed.detach() * shaped.permute([order.index(axis) for axis in out])

    def _where(self) -> str:
        frame = sys._getframe(1)
        while frame.f_back:
            frame = frame.f_back
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in self._names:
                return self._names[module]
        return ""


class _Product(NamedTuple):
    """A product of two tensors: run(left, right), with a letter for each axis of left, right and out."""

    left: Tensor
    right: Tensor
    axes: tuple[str, str, str]
    run: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def matmul(
        cls, left: Tensor, right: Tensor, run: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    ) -> _Product:
        """Describe a product of matrices with any leading axes."""
        lead = "".join(chr(97 + k) for k in range(max(left.dim(), right.dim()) - 2))
        first, second = (lead[len(lead) + 2 - tensor.dim() :] for tensor in (left, right))
        return cls(left, right, (f"{first}XY", f"{second}YZ", f"{lead}XZ"), run)

    @classmethod
    def einsum(cls, equation: str, left: Tensor, right: Tensor) -> _Product:
        """Describe a product in Einstein's notation."""
        sides, arrow, out = equation.replace(" ", "").partition("->")
        axes = sides.split(",")
        if not arrow:
            once = sorted(axis for axis in {*sides} - {","} if sides.count(axis) == 1)
            out = "".join(("..." if "..." in sides else "", *once))
        dots = [t.dim() - len(a) + 3 for t, a in zip((left, right), axes) if "..." in a]
        lead = "".join(chr(0x3B1 + k) for k in range(max(dots, default=0)))
        for k, n in enumerate(dots):  # both operands have an ellipsis, or one of them
            which = k if len(dots) == 2 else ["..." in a for a in axes].index(True)
            axes[which] = axes[which].replace("...", lead[len(lead) - n :])
        written = axes[0], axes[1], out.replace("...", lead)
        return cls(left, right, written, lambda a, b: torch.einsum(equation, a, b))

    @classmethod
    def read(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Product | None:
        """Describe the product that a function computes; None if it computes none."""
        given = [*_tensors((args, kwargs))]
        if len(given) < 2 or "out" in kwargs or any(tensor.dim() < 2 for tensor in given[-2:]):
            return None
        left, right = given[-2:]
        if func in _PRODUCTS and len(given) == 2:
            return cls.matmul(right, left) if func is _REVERSED else cls.matmul(left, right)
        if func in _ADDED and len(given) == 3:
            options = {name: kwargs[name] for name in ("beta", "alpha") if name in kwargs}
            return cls.matmul(left, right, lambda a, b: func(given[0], a, b, **options))
        if func is torch.einsum and len(given) == 2 and isinstance(args[0], str):
            return cls.einsum(args[0], left, right)
        return None

    def is_mixture(self, flipped: bool) -> bool:
        """Return True if an axis of the weights is summed over."""
        weights = self.axes[1 if flipped else 0]
        return any(axis not in self.axes[2] for axis in weights)


def _straight_through(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the weights, bit for bit, with the gradient of the scores wherever a weight is not zero."""
    finite = torch.where(weights > 0, scores, 0).to(weights.dtype)
    return weights.detach() + (finite - finite.detach())


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Find every tensor in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)
