"""Compares one attention call with the plan: whose heads take part, and which are not as planned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._anatomy import Site
from .heads import Trace, weight_name

WORDS = {"q": "queries", "k": "keys", "v": "values", "o": "output"}


_LATENT = {"q": "q_a", "k": "kv_a", "v": "kv_a"}


#: Gradients smaller than the largest by this factor count as zero.
_FLOOR = 1e-7


#: Heads are coupled, not confused, if the planned one has this many times the energy of any other.
_DOMINANCE = 4


Block = tuple[str, int]


@dataclass
class CallFindings:
    """Findings of one attention call about the plan.

    Attributes:
        block: stack and layer of the projections that take part in the call.
        planned: the number of query heads of the block.
        heads: the query head of each traced unit; -1 if it could not be found.
        states: for each (role, head) ``"agreed"``, ``"coupled"`` or ``"wrong"``.
        missed: projections that take part and are not planned.
        wrong: a sentence for each disagreement with the plan.
    """

    block: Block
    planned: int
    heads: list[int] = field(default_factory=list)
    states: dict[tuple[str, int], str] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def refute(self, site: Site | None, reason: str) -> None:
        """Record that every head of a site is wrong, with the reason."""
        self.wrong.append(reason)
        if site:
            self.states |= {(site.role, head): "wrong" for head in range(site.heads)}


class PlannedBlocks:
    """The planned sites, by their block and by their weight."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self.blocks: dict[Block, dict[str, Site]] = defaultdict(dict)
        self.owners: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            self.blocks[site.stack, site.layer][site.role] = site
            self.owners[weight_name(site)].append(site)

    def compare(self, trace: Trace) -> list[CallFindings]:
        """Compare a trace with the blocks that it belongs to; no planned site may take part.

        A joint call, as of the pictures and words of SD3, belongs to several blocks: its queries, keys and
        values come from each of them, and its output goes to each.
        """
        main = self._block_of(trace)
        if main is None:
            return []
        blocks = [main, *(block for block in self._joint(trace) if block != main)]
        found = []
        for block in blocks:
            planned = max(site.query_heads for site in self.blocks[block].values())
            match = CallFindings(block, planned)
            readings = {role: self._read(role, trace.sources[role], match) for role in "qkv"}
            readings["o"] = self._read_output(trace.sinks, match, blocks)
            _compare_heads(readings, match)
            found.append(match)
        return found

    def _joint(self, trace: Trace) -> list[Block]:
        """Find the blocks from which queries, keys and values of the call all come."""
        return [
            block
            for block, roles in self.blocks.items()
            if all(
                role in roles and weight_name(roles[role]) in trace.sources[role] for role in "qkv"
            )
        ]

    def _block_of(self, trace: Trace) -> Block | None:
        """Find the block with the most sites in the call; among equals, the one whose output reads it."""
        fed = {name for role in trace.sources.values() for name in role}
        if not fed:
            return None
        taking: dict[Block, set[str]] = defaultdict(set)
        for name, owners in self.owners.items():
            for site in owners:
                if name in fed or (site.writer and site.path in trace.sinks):
                    taking[site.stack, site.layer].add(site.role)
        votes = {block: (len(roles), "o" in roles, "q" in roles) for block, roles in taking.items()}
        return max(votes, key=votes.__getitem__, default=None)

    def _read(self, role: str, fed: Mapping[str, Tensor], match: CallFindings) -> list[_Reading]:
        """Find which heads of which sites feed the queries, keys or values; sites of the block come first."""
        word, own = WORDS[role], self.blocks[match.block].get(role)
        if not fed:
            if not own:  # else it can feed another call of the block, as in VITS
                match.missed.append(f"its {word} come from no planned projection")
            return []
        lit = {name: _nonzero(signal).any(0) for name, signal in fed.items()}
        others = [
            site
            for name in lit
            for site in self.owners[name]
            if site.role == role and site != own and _feeds(site, lit)
        ]
        if own and not _feeds(own, lit):
            match.refute(own, f"its {word} do not come from {_name(own)}")
        # If the block has no planned site for this role, accept a site of another layer (or its keys, for
        # values). If it has one, accept further sites: some models add the scores of two blocks (LiLT).
        keys = self.blocks[match.block].get("k") if role == "v" and not own else None
        sites = [own, *others] if own else others or ([keys] if keys else [])
        latents = [self.blocks[s.stack, s.layer].get(_LATENT[role]) for s in sites]
        for name, some in lit.items():
            stray = some.clone()
            for site in (*sites, *latents):
                if site and weight_name(site) == name:
                    stray[features(site)] = False
            if stray.any():
                text = f"its {word} come from {self._describe(name, stray)}"
                if own or self._owners(name, stray):
                    match.refute(own, text)
                else:
                    match.missed.append(text)
        for site in filter(None, latents):
            if not _feeds(site, lit):
                match.refute(own, f"its {word} do not come from {_name(site)}")
        if own and (role, 0) in match.states:
            return []  # every site found was refuted
        return [
            _Reading.of(site, fed[weight_name(site)], match) for site in sites if _feeds(site, lit)
        ]

    def _read_output(
        self, sinks: Mapping[str, Tensor], match: CallFindings, joint: Sequence[Block]
    ) -> list[_Reading]:
        """Find which heads of the output projection read the call; two blocks can share one projection.

        The projections of the other blocks of a joint call read it too.
        """
        own = self.blocks[match.block].get("o")
        writers = {s.path: s for block in self.blocks.values() for s in block.values() if s.writer}
        sites = [own] if own else [writers[path] for path in sinks]
        known = [*sites, *(self.blocks[block]["o"] for block in joint if "o" in self.blocks[block])]
        others = [path for path in sinks if path not in {site.path for site in known}]
        if others:
            match.refute(own, f"its output is read by {', '.join(others)}")
        if not sites:
            match.missed.append("its output is read by no planned projection")
        if own and own.path not in sinks:
            match.refute(own, f"its output is not read by {own.path}")
            return []
        return [_Reading.of(site, sinks[site.path], match) for site in sites]

    def _owners(self, name: str, lit: Tensor) -> list[Site]:
        """Find the planned sites of some of a projection's features."""
        return [site for site in self.owners[name] if lit[features(site)].any()]

    def _describe(self, name: str, lit: Tensor) -> str:
        """Describe a projection's features and the sites that they are planned as."""
        roles = [f"{site.role} of layer {site.layer}" for site in self._owners(name, lit)]
        where = f"features {_ranges(lit.nonzero().flatten().tolist())} of {name.rpartition('.')[0]}"
        return f"{where}, planned as {' and '.join(roles) or 'nothing'}"


@dataclass(frozen=True)
class _Reading:
    """The head of a site that each traced unit depends on; -1 for a unit without one, such as padding."""

    site: Site
    heads: list[int]
    coupled: list[bool]
    sound: bool

    @classmethod
    def of(cls, site: Site, signal: Tensor, match: CallFindings) -> _Reading:
        """Find the heads from a signal (units, features of the module)."""
        shape = site.heads, site.head_dim
        lit = _nonzero(signal)[:, features(site)].unflatten(1, shape)
        relative = signal / signal.amax(1, keepdim=True).clamp(min=torch.finfo(signal.dtype).tiny)
        energy = relative[:, features(site)].unflatten(1, shape).square().sum(2)
        best, heads = energy.max(1)
        # In low precision, single numbers can cancel to zero, but not those of half a head.
        filled = lit[range(len(heads)), heads].double().mean(1) > 0.5
        alone = lit.any(2).sum(1) == 1
        second = energy.scatter(1, heads[:, None], 0).amax(1)
        coupled = lit.any(2).all(1) & (best > _DOMINANCE * second) & ~alone
        unreached = ~lit.flatten(1).any(1)
        sound = unreached | (filled & (alone | coupled))
        if not sound.all():
            index = lit[int(sound.int().argmin())].flatten().nonzero().flatten().tolist()
            match.refute(
                site,
                f"its {WORDS[site.role]}: one head has the components {_ranges(index)} of {_name(site)}, "
                f"planned are heads of {site.head_dim} components",
            )
        heads = heads.masked_fill(unreached, -1)
        return cls(site, heads.tolist(), coupled.tolist(), bool(sound.all()))


def _compare_heads(readings: Mapping[str, list[_Reading]], match: CallFindings) -> None:
    """Compare the heads of keys, values and output with the heads of the queries."""
    base = next(iter((*readings["q"], *readings["o"])), None)
    if base is None:
        return
    match.heads = base.heads
    order = list(dict.fromkeys(head for head in base.heads if head >= 0))
    if base.sound and order != sorted(order):
        match.wrong.append(f"its heads stand in the order {', '.join(map(str, order))}")
    for role, found in readings.items():
        for k, reading in enumerate(found):
            confused = _confused(base, reading)
            if reading.sound and confused:
                query, head, planned = confused
                match.wrong.append(
                    f"query head {query} meets head {head} of its {WORDS[role]} in "
                    f"{_name(reading.site)}, planned is head {planned}"
                )
            for head, coupled in zip(reading.heads, reading.coupled):
                if head >= 0 and k == 0:
                    state = "coupled" if coupled else "agreed"
                    sound = reading.sound and not confused
                    match.states[reading.site.role, head] = state if sound else "wrong"


def _confused(base: _Reading, reading: _Reading) -> tuple[int, int, int] | None:
    """Find the first query head that meets another head than planned, as (query head, met, planned)."""
    group = max(1, base.site.heads // reading.site.heads)
    for query, head in zip(base.heads, reading.heads):
        if query >= 0 and head >= 0 and head != query // group:
            return query, head, query // group
    return None


def features(site: Site) -> Tensor:
    """Return the indices of a site's features in its module, in the order (head, component)."""
    return site.rows.index() if site.rows else torch.arange(site.features)


def _nonzero(signal: Tensor) -> Tensor:
    """Return which features have a gradient, as (units, features)."""
    return signal > _FLOOR * signal.amax(1, keepdim=True)


def _feeds(site: Site, lit: Mapping[str, Tensor]) -> bool:
    """Return True if some feature of a site has a gradient."""
    return weight_name(site) in lit and bool(lit[weight_name(site)][features(site)].any())


def _name(site: Site) -> str:
    return f"{site.path} (planned as {site.role})"


def _ranges(index: Sequence[int]) -> str:
    """Write numbers as ranges: ``0-3, 8`` for 0, 1, 2, 3, 8; at most four ranges."""
    starts = [k for n, k in enumerate(index) if n == 0 or index[n - 1] != k - 1]
    ends = [k for n, k in enumerate(index) if n + 1 == len(index) or index[n + 1] != k + 1]
    words = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends)]
    return ", ".join(words[:4]) + (", ..." if len(words) > 4 else "")
