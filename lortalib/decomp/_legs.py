"""Answers questions about a parsed line of legs: its modes, bonds, sizes and rank limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ._bond_tree import Edge, bond_tree
from ._carriers import check_carriers
from ._factors import is_factor, mode_of, open_legs, sizes_of_factors
from ._limits import rank_limits
from ._marks import check_marks, zeroable
from ._modes import Shape
from ._notation import LegsError, Term, check_bounds, read_line, vectors_of
from ._tensor_sizes import check_tied_sizes, sizes_of_tensors


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
                mark, such as ``(frozen)``, ``(tied)`` or ``(of n)``; ``(of n, seed 7, zero)`` is three.

        Raises:
            LegsError: an empty parameter, an ill-formed or repeated leg, an unknown mark, another mark
                together with ``(tied)``, a second vector or seed; or more than 10,000 characters,
                64 parameters, 52 legs or 100 characters in a name.

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
        kept = set(self.open_legs(modes))
        return tuple(leg for leg in self.carriers if leg not in kept)

    def open_legs(self, modes: Iterable[str]) -> tuple[str, ...]:
        """List the legs that are not summed over: each mode, or its factors where it is split.

        Args:
            modes: the names of the tensor's axes.

        Example:
            >>> Legs.parse("in.1 a, layer in.2 a b, out b").open_legs(["layer", "in", "out"])
            ('layer', 'in.1', 'in.2', 'out')
        """
        return open_legs(tuple(modes), tuple(leg for term in self.terms for leg in term.legs))

    @cached_property
    def factors(self) -> dict[str, int]:
        """The sizes that the line gives to factors of modes, as ``in.1:8`` does."""
        return {leg: size for term in self.terms for leg, size in term.factors}

    def split(self, shape: Shape) -> Shape:
        """Split the modes of a shape as the line does: the shape of the network over the factors.

        Args:
            shape: the modes and their sizes.

        Raises:
            LegsError: sizes of factors that disagree or do not multiply to that of the mode; or a size
                without so many factors above 1, where none are given.

        Example:
            >>> Legs.parse("in.1 a, in.2:12 a b, in.3 b c, out c").split(Shape({"in": 768, "out": 5}))
            Shape({'in.1': 8, 'in.2': 12, 'in.3': 8, 'out': 5})
        """
        sizes: dict[str, int] = {}
        for mode, size in shape.items():
            own = self.open_legs([mode])
            try:
                found = sizes_of_factors(mode, size, own, self.factors, shape.factors.get(mode))
            except LegsError as error:
                raise LegsError(f"{error}, in", *self._place(own[0])) from None
            sizes |= zip(own, found)
        return Shape(sizes)

    def with_factors(self, sizes: Mapping[str, int]) -> Legs:
        """Write the sizes of all factors of modes into the line, so that it says how each mode is split.

        Args:
            sizes: the size of every leg.

        Example:
            >>> str(Legs.parse("in.1 a, in.2 a, out a").with_factors({"in.1": 3, "in.2": 4}))
            'in.1:3 a, in.2:4 a, out a'
        """
        if not any(map(is_factor, self.carriers)):
            return self
        own = [
            tuple((leg, sizes[leg]) for leg in term.legs if is_factor(leg) and leg in sizes)
            for term in self.terms
        ]
        terms = tuple(replace(term, factors=pairs) for term, pairs in zip(self.terms, own))
        return replace(self, terms=terms)

    def ranked(self, modes: Iterable[str]) -> tuple[str, ...]:
        """List what ``rank=`` gives a size: bonds and vectors, in order of first appearance.

        Args:
            modes: the names of the tensor's axes.

        Example:
            >>> Legs.parse("in p (of n), out q, p q").ranked(["in", "out"])
            ('p', 'n', 'q')
        """
        kept = {*self.bonds(modes), *self.vectors}
        named = (name for term in self.terms for name in (*term.legs, term.of))
        return tuple(dict.fromkeys(name for name in named if name in kept))

    @cached_property
    def vectors(self) -> tuple[str, ...]:
        """The vectors that parameters are hashed from, the n of ``(of n)``, in order of first appearance."""
        return vectors_of(self.terms)

    @property
    def unhashed(self) -> Legs:
        """The line of the same network when every hashed parameter has entries of its own.

        Example:
            >>> str(Legs.parse("in r (of n), out r (of n, zero)").unhashed)
            'in r, out r (zero)'
        """
        if not any(term.of for term in self.terms):
            return self
        return Legs(tuple(replace(term, of="", seed=0, spans=()) for term in self.terms))

    @property
    def unmarked(self) -> Legs:
        """The line without the marks that do not change which tensor its parameters make.

        Example:
            >>> str(Legs.parse("in r (shared), out r (frozen), layer r (zero)").unmarked)
            'in r, out r, layer r'
        """
        return Legs(tuple(term.unmarked for term in self.terms))

    def check(self, modes: Sequence[str]) -> None:
        """Check that the line describes a tensor with these modes.

        Args:
            modes: the names of the tensor's axes.

        Raises:
            LegsError: a mode that no parameter carries, a reserved mode name that the tensor does
                not have, a bond that only one parameter carries, or ``in`` on several parameters; more
                than one parameter marked ``(zero)``, a zero one that is frozen or tied; a tied one that
                comes first or has another number of legs than the parameter before it; a vector with
                the name of a leg, or with some of its parameters frozen or shared; more parameters or
                legs than `parse` reads.

        Example:
            >>> Legs.parse("in r, out r").check(["in", "out"])
            >>> Legs.parse("in r, out r").check(["layer", "in", "out"])
            Traceback (most recent call last):
            lortalib.decomp._notation.LegsError: no parameter carries the mode 'layer' of the tensor, in
                in r, out r
        """
        check_bounds(self.terms)
        check_carriers(self.carriers, modes, self.line or str(self), self._place)
        check_marks(self.terms, self.owners, modes, lambda k: self._place(self.terms[k].legs[0], k))

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

    @cached_property
    def holders(self) -> tuple[int, ...]:
        """The position, for each term, of the first that uses the same stored tensor: one that it is tied to,
        or one that is hashed from the same vector."""
        vectors = [term.of for term in self.terms]
        return tuple(
            vectors.index(vectors[owner]) if vectors[owner] else owner for owner in self.owners
        )

    @cached_property
    def zeroable(self) -> tuple[int, ...]:
        """The positions of the parameters that can start at zero, in the order of the line; see `zero`."""
        return zeroable(self.terms, self.owners, self.holders)

    @property
    def zero(self) -> int:
        """The position of the parameter that starts at zero.

        It is the parameter marked ``(zero)``, else the trainable one that carries ``out``, else the
        first trainable one. A parameter that others are tied to, or that has a vector together with
        others, is never chosen: at zero, its gradient would be zero too. One that is hashed and marked
        ``(zero)`` has numbers of its own in the vector.

        Raises:
            ValueError: every parameter is frozen, tied, or hashed together with others.

        Example:
            >>> Legs.parse("in r, out r, layer r").zero
            1
        """
        if not self.zeroable:
            raise ValueError(
                "every parameter is frozen or tied, or hashed together with others, so none can start at "
                f"zero; a hashed one can where it is marked (zero), in\n    {self}"
            )
        terms = self.terms
        return min(
            self.zeroable,
            key=lambda k: (not terms[k].zero, "out" not in map(mode_of, terms[k].legs)),
        )

    def tree(self, modes: Iterable[str], root: int) -> tuple[Edge, ...]:
        """List the bonds of a tree, those of children before those of their parents.

        Args:
            modes: the names of the tensor's axes.
            root: the position of the root.

        Raises:
            ValueError: the bonds do not form a tree that contains every parameter.

        Example:
            >>> for edge in Legs.parse("in p, layer p q, out q").tree(["layer", "in", "out"], root=1):
            ...     print(edge)
            Edge(child=2, parent=1, bond='q')
            Edge(child=0, parent=1, bond='p')
        """
        return bond_tree(self.terms, self.carriers, self.bonds(modes), root)

    def sizes(
        self, shapes: Sequence[Sequence[int]], known: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Find the size of each leg and each vector from the shapes of the stored tensors.

        Args:
            shapes: one shape for each parameter, in the order of the line; for a hashed one that of its
                vector, (n,).
            known: sizes of legs, for those that only hashed parameters carry.

        Example:
            >>> Legs.parse("in r, out r").sizes([(64, 2), (16, 2)])
            {'in': 64, 'r': 2, 'out': 16}

        Raises:
            LegsError: a parameter with another number of axes than legs, a leg whose sizes
                on two parameters disagree, or a leg without a size.
        """
        given, line = {**self.factors, **(known or {})}, self.line or str(self)
        sizes = sizes_of_tensors(
            self.terms, self.owners, self.carriers, shapes, given, line, self._place
        )
        self.check_tied_sizes(sizes)
        return sizes

    def stored_shapes(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """List the shape of each term's stored tensor: that of its parameter, or (n,) for its vector.

        Args:
            sizes: the size of every leg and every vector.

        Example:
            >>> Legs.parse("in r (of n), out r").stored_shapes({"in": 6, "out": 5, "r": 2, "n": 4})
            [(4,), (5, 2)]
        """
        terms = [self.terms[owner] for owner in self.owners]
        return [tuple(sizes[leg] for leg in ((t.of,) if t.of else t.legs)) for t in terms]

    def check_tied_sizes(self, sizes: Mapping[str, int]) -> None:
        """Check that a tied term has the same sizes as its parameter, leg by leg.

        Args:
            sizes: the size of every leg.

        Raises:
            LegsError: the shapes differ.
        """
        check_tied_sizes(self.terms, self.owners, sizes, self._place)

    def limits(self, sizes: Mapping[str, int], modes: Iterable[str]) -> dict[str, int]:
        """Compute the largest useful size of each bond and each vector.

        A bond joins its parameters to a tensor over all their other legs. With one parameter that holds
        the entries of that tensor, and the others only ones and zeros, the bond needs one position for
        each position of the legs that this parameter lacks; more add nothing. The parameter may be any
        that trains freely, and so may the others, but for a bond of two, where a frozen, tied or hashed
        one only lowers the rank. A smaller bond lowers the limits of its neighbours, so this repeats until
        nothing changes. A vector has at most as many numbers as entries are hashed from it.

        Args:
            sizes: the size of every mode, bond and vector.
            modes: the names of the tensor's axes.
        """
        return rank_limits(self.terms, self.owners, self.carriers, self.bonds(modes), sizes)

    def _place(self, leg: str, position: int | None = None) -> tuple[str, tuple[int, int] | None]:
        position = self.carriers[leg][0] if position is None else position
        term = self.terms[position]
        if not self.line or not term.spans:
            return str(self), None
        return self.line, term.spans[term.legs.index(leg)]
