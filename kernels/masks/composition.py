"""Masks as values: what every mask answers, and their composition by ``&`` and ``|``.

``allowed`` is the definition. Everything else follows from ``pieces`` by arithmetic on intervals, so that a plan over a
million tokens never builds a table of pairs. The two are written independently of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from math import lcm
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from ringspan.kernels.masks import measure
from ringspan.kernels.masks.pieces import Piece, Shape, both, cuts, either, pieces
from ringspan.kernels.masks.span import END, Span, overlap, union
from ringspan.kernels.masks.strips import Strip

WALK = 1 << 16  # rows after which the question whether a mask is causal is given up, and answered no


class Packing(Protocol):
    """What expressions need of their Documents."""

    @property
    def rows(self) -> tuple[tuple[int, ...], ...] | None:
        """The boundaries of each batch row, or None where one sequence serves every row."""
        ...

    @property
    def edges(self) -> tuple[int, ...]:
        """The boundaries of the one sequence."""
        ...

    @property
    def spans(self) -> tuple[Span, ...]:
        """The documents of all rows."""
        ...

    def starts(self, positions: Tensor) -> Tensor:
        """Return the first position of each position's document."""
        ...

    def check(self, length: int) -> None:
        """Raise ValueError if the last boundary is not ``length``."""
        ...


class Mask:
    """Base of all masks: frozen values over global positions. Combine with ``&`` and ``|``.

    Documents with one boundary list per batch row, and masks that differ by head, answer no question about positions:
    take one row with ``of_row`` and one pattern with ``by_head`` first.
    """

    parts: tuple[Mask, ...] = ()  # what & or | put together
    cutting = False  # whether the rule changes at group edges
    anchored = False  # whether the rule counts from document starts
    heads = False  # whether KV heads differ

    def allowed(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Return whether each query sees each key: bool, in the broadcast shape of both arguments (int64)."""
        self.one_pattern()
        documents = self.documents
        if documents is None:
            q_start = k_start = torch.zeros((), dtype=torch.int64, device=q_pos.device)
        else:
            q_start, k_start = documents.starts(q_pos), documents.starts(k_pos)
        shape = torch.broadcast_shapes(q_pos.shape, k_pos.shape)
        return self.sees(q_pos, k_pos, q_start, k_start).expand(shape).clone()

    def pieces(self, q_span: Span) -> tuple[Piece, ...]:
        """Return ``q_span`` cut where the rule changes, in order, each piece with its strips.

        The strips of a piece are disjoint: no row sees a key by two of them. Each serves at least one row.

        Raises:
            ValueError: if ``q_span`` is not within the documents, or the mask differs by batch row or head.
        """
        return pieces(self.shape, q_span)

    def reach(self, q_span: Span) -> tuple[Span, ...]:
        """Return the keys that at least one query of ``q_span`` sees, exactly; END where nothing ends them."""
        return union(key for rows, strips in self.pieces(q_span) for key in measure.reach_of(strips, rows))

    def full(self, q_span: Span) -> tuple[Span, ...]:
        """Return the keys that every query of ``q_span`` sees.

        Exact, but for two or more queries of an ``|`` with Dilated: then contained in the truth.
        """
        found: tuple[Span, ...] = (Span(0, END),)
        for rows, strips in self.pieces(q_span):
            found = overlap(found, measure.full_of(strips, rows))
            if not found:
                break
        return found

    def area(self, q_span: Span, k_span: Span) -> int:
        """Return how many pairs of ``q_span`` and ``k_span`` are live, exactly."""
        return sum(measure.area(s, rows, k_span) for rows, strips in self.pieces(q_span) for s in strips)

    def cuts(self, q_span: Span) -> tuple[Span, ...]:
        """Split ``q_span`` where the mask changes its rule (document and group edges), in order."""
        return tuple(rows for rows, _, _ in cuts(self.shape, q_span))

    def check(self, length: int) -> None:
        """Raise ValueError if the mask does not fit a sequence of ``length`` tokens."""
        if self.documents is not None:
            self.documents.check(length)

    @cached_property
    def causal(self) -> bool:
        """Whether no query sees a later key, in a sequence of any length (Documents: of theirs).

        Exact, but for masks that differ by head, where False may be too careful.
        """
        # No mask lets a query see a later key without the very next one, so that one decides. Where it is seen depends
        # on its place in the groups: if classes of m group sizes cover 2**m positions in a row, they cover all.
        sizes = [leaf.period for leaf in self.leaves() if leaf.cutting]
        period = min(1 << len(sizes), lcm(*sizes))
        if period > WALK:
            return any(part.causal for part in self.parts)
        spans = self.documents.spans if self.documents else (Span(0, END),)
        return not any(
            self.next_seen(key, span.start)
            for span in spans
            for key in range(span.start + 1, min(span.stop, span.start + 1 + period))
        )

    @property
    def documents(self) -> Packing | None:
        """The Documents of this expression, if there is one."""
        return None

    @property
    def rule(self) -> Mask | None:
        """What holds within a document: this expression without its Documents."""
        return self

    @cached_property
    def shape(self) -> Shape:
        """What ``pieces`` and ``cuts`` need to know."""
        self.one_pattern()
        edges = self.documents.edges if self.documents else (0, END)
        leaves = tuple(self.rule.leaves()) if self.rule else ()
        cutters = tuple(leaf for leaf in leaves if leaf.cutting)
        return Shape(edges, self.rule, cutters, any(leaf.anchored for leaf in leaves))

    def one_pattern(self) -> None:
        """Raise ValueError if KV heads differ."""
        if self.heads:
            text = str(self) if len(str(self)) <= 200 else f"{str(self)[:197]}..."
            raise ValueError(f"mask: {text} differs by KV head; take it apart with by_head(mask, first, count, total)")

    def of_head(self, head: int) -> Mask:
        """Return what one of the model's KV heads sees: a mask without heads."""
        return self

    def leaves(self) -> Iterator[Mask]:
        """Yield the masks that the expression is made of, from left to right."""
        yield self

    # What a mask defines. Positions are global; a start is the first position of a document (0 without Documents).

    def sees(self, q: Tensor, k: Tensor, q_start: Tensor, k_start: Tensor) -> Tensor:
        """Return whether queries see keys, given the document starts of both: bool, broadcastable."""
        raise NotImplementedError

    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        """Return disjoint strips for rows of one document; each cutting mask takes its group from ``groups``."""
        raise NotImplementedError

    def next_seen(self, key: int, document: int) -> bool:
        """Return whether query ``key - 1`` sees ``key``; both lie in the document that starts at ``document``."""
        raise NotImplementedError

    def group(self, row: int, document: int) -> Span:
        """Return the group of a row, if the mask is ``cutting``."""
        raise NotImplementedError

    @property
    def period(self) -> int:
        """After how many rows the groups repeat, if the mask is ``cutting``."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return And((self, other))

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Or((self, other))

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class _Composed(Mask):
    parts: tuple[Mask, ...] = field()

    def __post_init__(self) -> None:
        # (a & b) & c is a & b & c: one value for what is written alike.
        flat = tuple(one for part in self.parts for one in (part.parts if type(part) is type(self) else (part,)))
        if len(flat) < 2:
            raise ValueError(f"mask: {type(self).__name__} takes two or more masks, got {len(flat)}")
        object.__setattr__(self, "parts", flat)

    @property
    def heads(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(part.heads for part in self.parts)

    @override
    def of_head(self, head: int) -> Mask:
        return type(self)(tuple(part.of_head(head) for part in self.parts)) if self.heads else self

    @override
    def leaves(self) -> Iterator[Mask]:
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True, repr=False)
class And(_Composed):
    """A query sees a key where every part allows it. Made by ``&``."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        found = sum(part.documents is not None for part in self.parts)
        if found > 1:
            raise ValueError(
                f"mask: {found} Documents under one &; a mask holds at most one, give their common boundaries"
            )

    @property
    @override
    def documents(self) -> Packing | None:
        return next((part.documents for part in self.parts if part.documents is not None), None)

    @property
    @override
    def rule(self) -> Mask | None:
        left = [part for part in self.parts if part.documents is None]
        return And(tuple(left)) if len(left) > 1 else left[0]

    @override
    def sees(self, q: Tensor, k: Tensor, q_start: Tensor, k_start: Tensor) -> Tensor:
        return reduce(torch.logical_and, (part.sees(q, k, q_start, k_start) for part in self.parts))

    @override
    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        return both([part.strips(document, groups) for part in self.parts])

    @override
    def next_seen(self, key: int, document: int) -> bool:
        return all(part.next_seen(key, document) for part in self.parts)

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Or) else str(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Or(_Composed):
    """A query sees a key where any part allows it. Made by ``|``."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if any(part.documents is not None for part in self.parts):
            raise ValueError(
                "mask: Documents under |; it restricts everything else, so write (... | ...) & Documents(...)"
            )

    @override
    def sees(self, q: Tensor, k: Tensor, q_start: Tensor, k_start: Tensor) -> Tensor:
        return reduce(torch.logical_or, (part.sees(q, k, q_start, k_start) for part in self.parts))

    @override
    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        return either([part.strips(document, groups) for part in self.parts])

    @override
    def next_seen(self, key: int, document: int) -> bool:
        return any(part.next_seen(key, document) for part in self.parts)

    def __str__(self) -> str:
        return " | ".join(str(part) for part in self.parts)
