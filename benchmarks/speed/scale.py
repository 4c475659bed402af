"""Does putting an adapter on, and making its factors at every step, scale to models of 405B?

Llama-shaped models on the meta device (no weights), CP of rank 8 on q, k, v, o of every layer:

* apply: seconds (median of 5 [smallest, largest]) and growth of the process's resident memory over the
  first one; trainable parameters beside LoRA's.
* factors: from the few parameters of the tensor every step makes the low-rank pair of every projection,
  which LoRA has as parameters. Operations and bytes written for that, forward and backward, are
  counted from what torch executes, at full size on the meta device, and beside a formula. A small model
  on the CPU, whose factors are really made, checks both.
* state: bytes of parameters, gradients and the two moments of Adam in float32, beside LoRA's, which
  reads its A and B in every step and keeps all four for them.

One operation is one multiplication or addition; a product of matrices has two for each term.

    python benchmarks/speed/scale.py   writes scale.md and .json beside it, in 2 minutes
    python benchmarks/speed/scale.py --quick   without 405B; writes runs/scale-quick.md and .json
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import MIB, Progress, arguments, resident, spread, table, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib

RANK = 8
BYTES = 4  # factors, gradients and moments are float32


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama."""

    title: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 128_256

    def build(self, device: str = "meta") -> nn.Module:
        """The model; on the meta device without weights."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
        )
        with torch.device(device):
            return LlamaForCausalLM(config)

    @property
    def head_dim(self) -> int:
        """Components of a head."""
        return self.hidden // self.heads

    def lora_parameters(self, rank: int) -> int:
        """Trainable parameters of LoRA on q, k, v, o."""
        narrow = self.kv_heads * self.head_dim
        widths = (2 * self.hidden, self.hidden + narrow, self.hidden + narrow, 2 * self.hidden)
        return self.layers * rank * sum(widths)


LLAMAS = (
    Llama("7B (Llama-2)", 4096, 32, 32, 32, 11_008, 32_000),
    Llama("8B (Llama-3)", 4096, 32, 32, 8, 14_336),
    Llama("70B (Llama-3)", 8192, 80, 64, 8, 28_672),
    Llama("405B (Llama-3.1)", 16_384, 126, 128, 8, 53_248),
)
#: Small enough to make its factors; with and without grouped queries.
SMALL = (
    Llama("small, on the CPU", 256, 4, 8, 8, 512, 100),
    Llama("small, grouped queries, on the CPU", 256, 4, 8, 2, 512, 100),
)


# Putting it on


def measure_apply(model: nn.Module, times: int) -> dict[str, Any]:
    """Seconds of `apply`, what the first one added to the process, and the parameters it trains."""
    seconds = []
    growth = 0
    for number in range(times):
        gc.collect()
        before, begin = resident(), time.perf_counter()
        adapter = lortalib.nn.apply(model, "cp", RANK)
        seconds.append(time.perf_counter() - begin)
        if number == 0:
            growth = resident() - before
        if number < times - 1:
            adapter.remove()
    return {"seconds": spread(seconds), "growth": growth, "parameters": adapter.count()}


# Making the factors


def make_factors(adapter: lortalib.nn.Adapter) -> list[Tensor]:
    """All low-rank pairs of a step, as the library makes them."""
    made = []
    for source in adapter.sources:
        made += source.contract(source.network.tensors)
    return made


class Count(TorchDispatchMode):
    """Counts what is executed.

    Attributes:
        operations: multiplications and additions.
        written: bytes of results that are not views.
        calls: operations of torch that compute or copy.
    """

    ELEMENTWISE = frozenset(("add", "sub", "mul", "div", "neg", "add_", "mul_", "div_"))
    REDUCTIONS = frozenset(("sum", "mean"))

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.written = self.calls = 0

    def counts(self) -> dict[str, int]:
        """The three by name."""
        return {"operations": self.operations, "written": self.written, "calls": self.calls}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.calls += 1
        self.written += sum(tensor.numel() * tensor.element_size() for tensor in results)
        name = function.overloadpacket.__name__
        if name in self.ELEMENTWISE:
            self.operations += results[0].numel()
        elif name in self.REDUCTIONS:
            self.operations += args[0].numel()
        elif name in ("mm", "bmm"):
            self.operations += 2 * results[0].numel() * args[0].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.operations += (2 * args[1].shape[-1] + 1) * results[0].numel()
        return result


def count_factors(adapter: lortalib.nn.Adapter) -> dict[str, dict[str, int]]:
    """Operations, bytes and calls to make all factors, and to take their gradients back; bytes of the
    pairs that the forward then reads."""
    with Count() as forward:
        factors = make_factors(adapter)
    # Distinct tensors only: q, k and v may be given one and the same A.
    outputs = [f for f in {id(f): f for f in factors}.values() if f.grad_fn is not None]
    upstream = [torch.ones_like(factor) for factor in outputs]
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    with Count() as backward:
        torch.autograd.grad(outputs, trained, upstream, allow_unused=True)
    storages = {factor.untyped_storage()._cdata: factor.untyped_storage() for factor in factors}
    return {
        "forward": forward.counts(),
        "backward": backward.counts(),
        "pairs": {"bytes": sum(storage.nbytes() for storage in storages.values())},
    }


def predict(llama: Llama) -> dict[str, int]:
    """Operations and bytes written of the forward by formula.

    B[layer, matrix, r, head*out] is the product of two short tensors, layer-matrix and head-out, so it
    takes one multiplication for each of its numbers; q and o have all heads, k and v their own.
    """
    heads = 2 * (llama.heads + llama.kv_heads)
    numbers = RANK * llama.layers * heads * llama.head_dim
    return {"operations": numbers, "written": BYTES * numbers}


def measure_llama(llama: Llama, times: int, device: str = "meta") -> dict[str, Any]:
    """Everything about one size."""
    model = llama.build(device)
    begin = measure_apply(model, times)
    adapter = lortalib.nn.adapters(model)["default"]
    return {
        "model": llama.title,
        "apply": begin,
        "lora_parameters": llama.lora_parameters(RANK),
        "lora_checked": lora_parameters_of(adapter),
        "predicted": predict(llama),
        "counted": count_factors(adapter),
    }


def lora_parameters_of(adapter: lortalib.nn.Adapter) -> int:
    """LoRA's trainable parameters by the sites that lortalib found."""
    return RANK * sum(site.width + site.features for site in adapter.sites)


# Tables


def table_of_apply(entries: Sequence[dict[str, Any]]) -> str:
    """Time and memory of `apply`."""
    rows = []
    for entry in entries:
        begin = entry["apply"]
        factor = entry["lora_parameters"] / begin["parameters"]
        rows.append(
            [
                entry["model"],
                begin["seconds"].text(3),
                f"{begin['growth'] / MIB:.1f}",
                f"{begin['numbers']:,}",
                f"{entry['lora_parameters']:,}",
                f"{factor:.0f}",
            ]
        )
    head = ["model", "apply, seconds", "process growth, MiB", "CP trains", "LoRA trains", "ratio"]
    return table(head, rows)


def table_of_factors(entries: Sequence[dict[str, Any]]) -> str:
    """Cost of making the factors of one step."""
    rows = []
    for entry in entries:
        forward, backward = entry["counted"]["forward"], entry["counted"]["backward"]
        predicted = entry["predicted"]
        rows.append(
            [
                entry["model"],
                f"{predicted['operations'] / 1e6:.3g}",
                f"{forward['operations'] / 1e6:.3g}",
                f"{forward['operations'] / predicted['operations']:.3f}",
                f"{predicted['written'] / MIB:.3g}",
                f"{forward['written'] / MIB:.3g}",
                f"{forward['written'] / predicted['written']:.3f}",
                f"{backward['operations'] / 1e6:.3g}",
                f"{backward['written'] / MIB:.3g}",
                f"{forward['calls']:,} + {backward['calls']:,}",
            ]
        )
    head = ["model"]
    for unit in ("Mop", "MiB written"):
        head += [f"forward, {unit}, formula", f"counted, {unit}", "counted / formula"]
    return table([*head, "backward, Mop", "backward, MiB written", "calls"], rows)


def table_of_state(entries: Sequence[dict[str, Any]]) -> str:
    """What a step makes, reads and keeps, beside LoRA."""
    rows = []
    for entry in entries:
        counted = entry["counted"]
        passes = (counted["forward"], counted["backward"])
        own, lora = entry["apply"]["parameters"] * BYTES, entry["lora_parameters"] * BYTES
        rows.append(
            [
                entry["model"],
                f"{sum(count['operations'] for count in passes) / 1e6:.3g}",
                f"{sum(count['written'] for count in passes) / MIB:.3g}",
                f"{counted['pairs']['bytes'] / MIB:.4g}",
                f"{lora / MIB:.4g}",
                f"{4 * own / MIB:.3g}",
                f"{4 * lora / MIB:.4g}",
                f"{lora / own:.0f}",
            ]
        )
    head = ["model", "CP makes, Mop", "CP writes, MiB", "pairs of CP, MiB", "pairs of LoRA, MiB"]
    return table([*head, "state of CP, MiB", "state of LoRA, MiB", "state, LoRA / CP"], rows)


def main() -> None:
    """Measure all sizes and write the tables."""
    options = arguments(__doc__, repetitions=5, quick=2)
    progress = Progress()
    measure_llama(SMALL[0], 1)  # lets torch and transformers import what they import at first use
    small = [measure_llama(llama, 1, "cpu") for llama in SMALL]
    entries = []
    for llama in LLAMAS[:3] if options.quick else LLAMAS:
        entries.append(measure_llama(llama, options.repetitions))
        progress.say(llama.title)
    for entry in [*small, *entries]:
        if entry["lora_parameters"] != entry["lora_checked"]:
            raise RuntimeError(f"{entry['model']}: other sites than those of q, k, v, o")
    parts = [
        f"CP of rank {RANK} on q, k, v, o of every layer; models on the meta device.",
        "## Putting it on",
        table_of_apply(entries),
        "## Making the factors, once a step",
        table_of_factors([*small, *entries]),
        "## A step beside LoRA",
        "What CP makes and writes is for the factors, forward and backward; LoRA makes none. Both read "
        "their pairs in the forward. State is parameters, gradients and the two moments of Adam.",
        table_of_state(entries),
    ]
    write(__file__, parts, {"small": small, "sizes": entries}, quick=options.quick)


if __name__ == "__main__":
    main()
