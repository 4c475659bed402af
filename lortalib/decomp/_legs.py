"""Answers questions about a parsed line of legs: its modes, bonds, sizes and rank limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ._modes import MODES
from ._notation import LegsError, Term, check_bounds, closest, read_line


@dataclass(frozen=True)
class Legs:
    """A parsed line, which names the legs of each parameter of a network.

    Two of them are equal if their parameters have the same legs and marks in the same order.

    Example:
        >>> legs = Legs.parse("in r, out r (zero), layer r")
        >>> str(legs), legs.bonds(["layer", "in", "out"])
        ('in r, out r (zero), layer r', ('r',))
        >>> legs.terms[1].legs, legs.terms[1].zero
        (('out', 'r'), True)
    """

    terms: tuple[Term, ...]
    line: str = field(default="", compare=False, repr=False)

    @classmethod
    def parse(cls, line: str) -> Legs:
        """Read a line of legs.

        Args:
            line: parameters separated by commas; each is its legs, separated by spaces, and perhaps a
                mark ``(frozen)``, ``(zero)`` or ``(tied)``.

        Raises:
            LegsError: an empty parameter, an ill-formed or repeated leg, an unknown mark, another mark
                together with ``(tied)``; or more than 10,000 characters, 64 parameters, 52 legs or 100
                characters in a name.

        Example:
            >>> [term.legs for term in Legs.parse("in r, layer out r (zero)").terms]
            [('in', 'r'), ('layer', 'out', 'r')]
        """
        line, terms = read_line(line)
        return cls(terms, line)

    def __str__(self) -> str:
        return ", ".join(str(term) for term in self.terms)

    @cached_property
    def carriers(self) -> dict[str, tuple[int, ...]]:
        """The positions of the parameters that carry each leg; legs in order of first appearance."""
        carriers: dict[str, list[int]] = {}
        for position, term in enumerate(self.terms):
            for leg in term.legs:
                carriers.setdefault(leg, []).append(position)
        return {leg: tuple(positions) for leg, positions in carriers.items()}

    def bonds(self, modes: Iterable[str]) -> tuple[str, ...]:
        """List the legs that are summed over, in order of first appearance.

        Args:
            modes: the names of the tensor's axes; all other legs are bonds.

        Example:
            >>> Legs.parse("in p, layer p q, out q").bonds(["layer", "in", "out"])
            ('p', 'q')
        """
        modes = set(modes)
        return tuple(leg for leg in self.carriers if leg not in modes)

    def check(self, modes: Sequence[str]) -> None:
        """Check that the line describes a tensor with these modes.

        Args:
            modes: the names of the tensor's axes.

        Raises:
            LegsError: a mode that no parameter carries, a reserved mode name that the tensor does
                not have, a bond that only one parameter carries, or ``in`` on several parameters; more
                than one parameter marked ``(zero)``, a zero one that is frozen or tied; a tied one that
                comes first or has another number of legs than the parameter before it; more
                parameters or legs than `parse` reads.

        Example:
            >>> Legs.parse("in r, out r").check(["in", "out"])
            >>> Legs.parse("in r, out r").check(["layer", "in", "out"])
            Traceback (most recent call last):
            lortalib.decomp._notation.LegsError: no parameter carries the mode 'layer' of the tensor, in
                in r, out r
        """
        check_bounds(self.terms)
        axes = set(modes)
        if len(axes) < len(modes):
            raise LegsError(
                f"a mode stands twice among {', '.join(modes)}; its axes need names, for", self.line
            )
        for leg, carriers in self.carriers.items():
            if leg in axes:
                continue
            if leg in MODES:
                raise LegsError(
                    f"unknown leg {leg!r}: it names a mode, but the tensor's modes are "
                    f"{', '.join(modes)} (add it to the shape, or choose a line without it), in",
                    *self._at(leg),
                )
            if len(carriers) == 1:
                raise LegsError(
                    f"unknown leg {leg!r}{closest(leg, modes)}: it is none of the tensor's modes "
                    f"({', '.join(modes)}), and as a bond it needs a second parameter to join, in",
                    *self._at(leg),
                )
        missing = [mode for mode in modes if mode not in self.carriers]
        if missing:
            raise LegsError(
                f"no parameter carries the mode {', '.join(map(repr, missing))} of the tensor, in",
                self.line or str(self),
            )
        if len(self.carriers.get("in", ())) > 1:
            raise LegsError(
                "'in' stands on several parameters; an update is cut at the one that carries it, "
                "so exactly one can, in",
                *self._at("in", self.carriers["in"][1]),
            )
        zeros = [term for term in self.terms if term.zero]
        if len(zeros) > 1 or any(term.frozen for term in zeros):
            raise LegsError("one trainable parameter can be marked (zero), in", self.line)
        self._check_tied()

    def _check_tied(self) -> None:
        for k, term in enumerate(self.terms):
            if not term.tied:
                continue
            if k == 0 or len(term.legs) != len(self.terms[k - 1].legs):
                raise LegsError(
                    "(tied) stands for the parameter before it, so there has to be one, with as many "
                    "legs; found another in",
                    *self._at(term.legs[0], k),
                )
            if self.terms[self.owners[k]].zero:
                raise LegsError(
                    "a parameter that is used twice cannot be (zero): its gradient would be zero too; in",
                    *self._at(term.legs[0], k),
                )

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The position of each term's parameter: the term's own position, or that of the one it is tied to.

        Example:
            >>> Legs.parse("in r, out r (tied), layer r").owners
            (0, 0, 2)
        """
        owners: list[int] = []
        for position, term in enumerate(self.terms):
            owners.append(owners[-1] if term.tied and owners else position)
        return tuple(owners)

    @property
    def zero(self) -> int:
        """The position of the parameter that starts at zero.

        It is the parameter marked ``(zero)``, else the trainable one that carries ``out``, else the
        first trainable one. A parameter that others are tied to is never chosen: at zero, its gradient
        would be zero too.

        Raises:
            ValueError: every parameter is frozen or tied.

        Example:
            >>> Legs.parse("in r, out r, layer r").zero
            1
        """
        once = (k for k in range(len(self.terms)) if self.owners.count(self.owners[k]) == 1)
        trainable = [k for k in once if not self.terms[k].frozen]
        if not trainable:
            raise ValueError(
                f"every parameter is frozen or tied, so none can start at zero, in\n    {self}"
            )
        terms = self.terms
        return min(trainable, key=lambda k: (not terms[k].zero, "out" not in terms[k].legs))

    def leaves_to_root(self, modes: Iterable[str]) -> list[tuple[int, str]]:
        """List all parameters except the root (the one that starts at zero), leaves first, each with its
        bond towards the root.

        Args:
            modes: the names of the tensor's axes.

        Raises:
            ValueError: the bonds do not form a tree that contains every parameter.

        Example:
            >>> Legs.parse("in p, layer p q (zero), out q").leaves_to_root(["layer", "in", "out"])
            [(2, 'q'), (0, 'p')]
        """
        bonds = self.bonds(modes)
        order, queue = list[tuple[int, str]](), [self.zero]
        met, crossed = set(queue), set[str]()
        while queue:
            near = queue.pop(0)
            for bond in self.terms[near].legs:
                ends = [k for k in self.carriers[bond] if k != near] if bond in bonds else []
                if bond in crossed or not ends:
                    continue
                crossed.add(bond)
                if len(ends) > 1 or ends[0] in met:
                    raise ValueError(
                        f"bond {bond!r} closes a loop or joins {len(ends) + 1} parameters; a start along "
                        "a tensor needs a tree, such as 'tucker', 'tt', 'lotr', 'lora' or 'lora_xs'; "
                        f"found\n    {self}"
                    )
                met.add(ends[0])
                queue.append(ends[0])
                order.append((ends[0], bond))
        if len(met) < len(self.terms):
            raise ValueError(
                f"not every parameter is joined to the one that starts at zero, in\n    {self}"
            )
        return order[::-1]

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Find the size of each leg from the shapes of the parameters.

        Args:
            shapes: one shape for each parameter, in the order of the line.

        Example:
            >>> Legs.parse("in r, out r").sizes([(64, 2), (16, 2)])
            {'in': 64, 'r': 2, 'out': 16}

        Raises:
            LegsError: a parameter with another number of axes than legs, a leg whose sizes
                on two parameters disagree.
        """
        if len(shapes) != len(self.terms):
            raise LegsError(
                f"{len(self.terms)} parameters are named but {len(shapes)} tensors were given, in",
                self.line or str(self),
            )
        sizes: dict[str, int] = {}
        for position, (term, shape) in enumerate(zip(self.terms, shapes)):
            if len(shape) != len(term.legs):
                raise LegsError(
                    f"parameter {position} ({term}) has {len(term.legs)} legs but its tensor has "
                    f"shape {tuple(shape)}, in",
                    *self._at(term.legs[0], position),
                )
            for leg, size in zip(term.legs, shape):
                if sizes.setdefault(leg, size) != size:
                    raise LegsError(
                        f"leg {leg!r} has size {size} here but {sizes[leg]} on an earlier "
                        "parameter, in",
                        *self._at(leg, position),
                    )
        self.check_tied_sizes(sizes)
        return sizes

    def check_tied_sizes(self, sizes: Mapping[str, int]) -> None:
        """Check that a tied term has the same sizes as its parameter, leg by leg.

        Args:
            sizes: the size of every leg.

        Raises:
            LegsError: the shapes differ.
        """
        for k, (term, owner) in enumerate(zip(self.terms, self.owners)):
            own = [sizes[leg] for leg in term.legs]
            wanted = [sizes[leg] for leg in self.terms[owner].legs]
            if own != wanted:
                raise LegsError(
                    f"a tied parameter has the shape {tuple(wanted)} at ({self.terms[owner]}) and "
                    f"{tuple(own)} here; its legs need equal sizes, in",
                    *self._at(term.legs[0], k),
                )

    def limits(self, sizes: Mapping[str, int], modes: Iterable[str]) -> dict[str, int]:
        """Compute the largest useful size of each bond.

        A bond joins its parameters to a tensor over all their other legs. With one parameter that holds
        the entries of that tensor, and the others only ones and zeros, the bond needs one position for
        each position of the legs that this parameter lacks; more add nothing. The parameter may be any
        that trains freely, and so may the others, but for a bond of two, where a frozen or tied one only
        lowers the rank. A smaller bond lowers the limits of its neighbours, so this repeats until nothing
        changes.
        """
        sizes = dict(sizes)
        joined = {
            leg: [set(self.terms[k].legs) for k in self.carriers[leg]] for leg in self.bonds(modes)
        }
        free = {leg: self._holders(leg) for leg in joined}
        changed = True
        while changed:
            changed = False
            for leg, legs in joined.items():
                every = set().union(*legs)
                for holder in free[leg]:
                    limit = math.prod(sizes[other] for other in every - legs[holder])
                    if limit < sizes[leg]:
                        sizes[leg], changed = limit, True
        return {leg: sizes[leg] for leg in self.bonds(modes)}

    def _holders(self, leg: str) -> list[int]:
        """Which of a bond's parameters can hold every entry while the others hold ones and zeros."""
        carriers = self.carriers[leg]
        if len(carriers) == 2:
            return [0, 1]
        if any(self.terms[k].frozen for k in carriers):
            return []
        tied = {
            k
            for k in carriers
            for other in carriers
            if k != other and self.owners[k] == self.owners[other]
        }
        return [place for place, k in enumerate(carriers) if k not in tied]

    def _at(self, leg: str, position: int | None = None) -> tuple[str, tuple[int, int] | None]:
        position = self.carriers[leg][0] if position is None else position
        term = self.terms[position]
        if not self.line or not term.spans:
            return str(self), None
        return self.line, term.spans[term.legs.index(leg)]
