"""Checks by running a model that it computes what its sites say; no name plays a part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..._columns import aligned
from ..._kinds import Kind, are, takes
from .._adapters import adapters
from .._anatomy import Site, UnsupportedModelError, check_model
from .._anatomy import sites as find_sites
from .._offloaded import has_no_numbers
from .compare import WORDS, CallFindings, PlannedBlocks, features
from .heads import Forward, record_forward, single_queries, trace_heads, weight_name, whole_units

_ROLES = ("q", "k", "v", "o", "q_a", "kv_a")


#: How many single queries are followed if a call as a whole does not fit the plan.
_MOST_SINGLE = 256


@dataclass(frozen=True)
class StackReport:
    """The findings about one stack.

    Attributes:
        stack: the name of the stack.
        sites: the number of planned attention projections.
        calls: the number of attention calls that they take part in.
        checked: the number of heads checked, one for each layer, role and head.
        agreed: the number of heads whose features are exactly the planned ones.
        coupled: the number of heads that also depend on features of other heads, but most on the
            planned ones: something between the projection and the heads mixes them, such as a norm
            over the full width.
        unseen: the layers without any call.
        missed: projections that take part in calls and are not planned, or are planned and not seen.
        disagreements: a sentence for each place where the plan is wrong.
    """

    stack: str
    sites: int
    calls: int
    checked: int
    agreed: int
    coupled: int
    unseen: tuple[int, ...]
    missed: tuple[str, ...]
    disagreements: tuple[str, ...]

    @property
    def confirmed(self) -> bool:
        """Whether every layer computed what is planned, and nothing else."""
        return not (self.unseen or self.missed or self.disagreements)


@dataclass(frozen=True)
class Report:
    """A comparison of the planned sites with the attention that the model computed.

    It prints as a table by stack.

    Attributes:
        model: the class of the model.
        stacks: one entry for each planned stack.
        unplanned: attention calls that no planned site takes part in.
        uncalled: paths of planned projections that were not called: these inputs do not need them, or
            their weights are read directly and the plan does not say so (``weight_read_directly``).

    Example:
        >>> import lortalib, torch
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                              intermediate_size=64))
        >>> report = lortalib.nn.verify(model.eval(), {"input_ids": torch.tensor([[3, 14, 15]])})
        >>> report.ok, report.complete, [each.stack for each in report.stacks]
        (True, True, ['encoder'])
    """

    model: str
    stacks: tuple[StackReport, ...]
    unplanned: tuple[str, ...]
    uncalled: tuple[str, ...] = ()

    @property
    def disagreements(self) -> tuple[str, ...]:
        """A sentence for each place where the plan is wrong, over all stacks."""
        return tuple(f"{s.stack}: {reason}" for s in self.stacks for reason in s.disagreements)

    @property
    def ok(self) -> bool:
        """Whether nothing disagrees with the plan, and something was seen."""
        return not self.disagreements and any(stack.calls for stack in self.stacks)

    @property
    def complete(self) -> bool:
        """Whether every planned stack was confirmed and no attention call was missed."""
        return self.ok and not self.unplanned and all(stack.confirmed for stack in self.stacks)

    def raise_for_disagreement(self) -> None:
        """Raise an error unless the report is `ok`.

        Raises:
            UnsupportedModelError: the plan is wrong, or nothing was seen that could confirm it.
        """
        if not self.ok:
            seen = "" if self.disagreements else " No attention call of a planned site was seen."
            raise UnsupportedModelError(
                f"the plan of sites is not what {self.model} computes.{seen}\n{self}\n"
                "A row rules=lortalib.nn.BlockRule(...) corrects the plan; see docs/models.md"
            )

    def __str__(self) -> str:
        columns = "stack sites calls heads agreed coupled".split()
        rows = [[*columns, ""]]
        for s in self.stacks:
            numbers = (s.sites, s.calls, s.checked, s.agreed, s.coupled)
            rows.append(
                [s.stack, *map(str, numbers), "confirmed" if s.confirmed else "NOT CONFIRMED"]
            )
        lines = aligned(rows)
        for s in self.stacks:
            lines += _first(f"  {s.stack}: WRONG: {reason}" for reason in s.disagreements)
            lines += _first(f"  {s.stack}: not confirmed: {reason}" for reason in s.missed)
            if s.unseen:
                layers = ", ".join(map(str, s.unseen))
                lines.append(f"  {s.stack}: no attention call was seen for layers {layers}")
        lines += _first(f"  attention without planned sites: {call}" for call in self.unplanned)
        if self.unplanned:
            lines += _first(f"  planned, but not called: {path}" for path in self.uncalled)
        return "\n".join(lines)


_SITES = Kind(
    "a list of sites, such as lortalib.nn.sites(model) returns",
    are(lambda each: isinstance(each, Site)),
)


@takes(sites=_SITES.or_none)
def verify(model: nn.Module, example_inputs: Any, *, sites: Sequence[Site] | None = None) -> Report:
    """Run the model to check that its attention projections are what the sites say.

    One forward is run, and its attention arithmetic is watched: products of queries and keys, softmax,
    products with values, whichever module computes them. From each head of each call, gradients lead
    back to the features of the projections that feed it, and on to the features that the output
    projection reads. No name of a module plays a part.

    Args:
        model: a live transformers model, on any device. It is unchanged afterwards: weights, flags,
            hooks and the state of the random numbers.
        example_inputs: the inputs of the model: a mapping of keyword arguments, a tuple or list of
            positional ones, or a single one. Short inputs will do: two tokens are enough.
        sites: the plan; ``sites(model)`` by default. Sites of MLPs are ignored.

    Returns:
        A `Report`, which can be printed. ``report.ok`` is true if nothing disagrees.

    Raises:
        UnsupportedModelError: no plan can be made, or the plan does not fit the widths of the model.
        ValueError: the model has no weights (meta device).
        Exception: any error of the model's own forward.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                      num_key_value_heads=2, intermediate_size=64, vocab_size=50)
        >>> print(verify(LlamaModel(config), torch.tensor([[3, 14, 15, 9]])))
        stack   sites  calls  heads  agreed  coupled
        layers  8      2      24     24      0        confirmed
    """
    model = check_model(model)
    planned = [s for s in (find_sites(model) if sites is None else sites) if s.role in _ROLES]
    if has_no_numbers(model):
        raise ValueError("a model on the meta device cannot be run, so nothing can be verified")
    with torch.enable_grad(), _without_adapters(model):
        forward = record_forward(model, example_inputs, planned)
        return _report(model, planned, forward)


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Turn off the model's adapters within this context, because the plan is about the base."""
    active = [adapter for adapter in adapters(model).values() if adapter.active]
    try:
        for adapter in active:
            adapter.active = False
        yield
    finally:
        for adapter in active:
            adapter.active = True


def _first(lines: Iterable[str], most: int = 6) -> list[str]:
    lines = list(lines)
    return lines[:most] + ([f"  ... and {len(lines) - most} more"] if len(lines) > most else [])


class _Findings:
    """The findings of the calls of one stack."""

    def __init__(self) -> None:
        self.calls = 0
        self.layers: set[int] = set()
        self.states: dict[tuple[int, str, int], str] = {}
        self.missed: dict[str, None] = {}
        self.wrong: dict[str, None] = {}

    def add(self, match: CallFindings) -> None:
        """Add the findings of one call."""
        layer = match.block[1]
        self.calls += 1
        self.layers.add(layer)
        for (role, head), state in match.states.items():
            known = self.states.get((layer, role, head), "agreed")
            self.states[layer, role, head] = state if known == "agreed" else known
        self.missed |= dict.fromkeys(f"layer {layer}: {reason}" for reason in match.missed)
        self.wrong |= dict.fromkeys(f"layer {layer}: {reason}" for reason in match.wrong)

    def report(self, stack: str, sites: Sequence[Site]) -> StackReport:
        """Sum up the findings of all calls."""
        for site in sites:
            heads = {(site.layer, site.role, head) for head in range(site.heads)}
            unseen = len(heads - self.states.keys())
            what = f"layer {site.layer}: {site.path} (planned as {site.role})"
            if site.layer not in self.layers or site.role not in WORDS or not unseen:
                continue
            if unseen == site.heads:
                self.wrong[f"{what} takes part in no attention call"] = None
            elif not self.wrong:
                self.missed[f"{what}: {unseen} of {site.heads} heads were not seen"] = None
        states = list(self.states.values())
        return StackReport(
            stack=stack,
            sites=len(sites),
            calls=self.calls,
            checked=len(states),
            agreed=states.count("agreed"),
            coupled=states.count("coupled"),
            unseen=tuple(sorted({site.layer for site in sites} - self.layers)),
            missed=tuple(self.missed),
            disagreements=tuple(self.wrong),
        )


def _check_widths(planned: Sequence[Site], forward: Forward) -> None:
    """Refuse sites whose features lie outside their projections."""
    widths = {name: len(zeros) for name, zeros in forward.leaves.items()}
    widths |= {f"{path}.weight": probe.shape[-1] for f in forward.flows for path, probe, _ in f}
    for site in planned:
        last = int(features(site).max())
        if last >= widths.get(weight_name(site), last + 1):
            raise UnsupportedModelError(
                f"the plan does not fit: the {site.role} of {site.path} has feature {last}, but the "
                f"projection has only {widths[weight_name(site)]} features"
            )


def _report(model: nn.Module, planned: Sequence[Site], forward: Forward) -> Report:
    _check_widths(planned, forward)
    plan = PlannedBlocks(planned)
    findings: dict[str, _Findings] = defaultdict(_Findings)
    unplanned: dict[str, None] = {}
    most = max((site.query_heads for site in planned), default=1)
    for number, call in enumerate(forward.calls):
        units, queries, keys = call.weights.shape
        where = f"in {call.where or type(model).__name__}, {units} x {queries} queries, {keys} keys"
        try:
            found = plan.compare(trace_heads(forward, number, *whole_units(call, most)))
            if any(match.wrong or len(set(match.heads)) < match.planned for match in found):
                closer = plan.compare(
                    trace_heads(forward, number, *single_queries(call, _MOST_SINGLE))
                )
                if closer and not any(match.wrong for match in closer):
                    found = closer
        except RuntimeError as error:
            unplanned[f"{where}, could not be differentiated: {error}"] = None
            continue
        if not found:
            unplanned[where] = None
        for match in found:
            findings[match.block[0]].add(match)
    by_stack: dict[str, list[Site]] = defaultdict(list)
    for site in planned:
        by_stack[site.stack].append(site)
    stacks = tuple(findings[stack].report(stack, sites) for stack, sites in by_stack.items())
    called = {*forward.leaves, *(f"{path}.weight" for path in forward.written)}
    uncalled = dict.fromkeys(site.path for site in planned if weight_name(site) not in called)
    return Report(type(model).__name__, stacks, tuple(unplanned), tuple(uncalled))
