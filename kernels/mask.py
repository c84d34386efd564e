"""Masks as values: which keys a query may see.

A mask is a frozen, hashable expression over global positions. ``allowed`` is the definition; ``reach`` and ``full``
answer for a whole span of queries by arithmetic on intervals, so that a plan over a million tokens never builds a
table of pairs.

Letters: a position is a token's index in the global sequence; a ``Span`` is half-open, ``[start, stop)``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

END = 1 << 62  # stands for "to the end of any sequence" in what ``Full`` reaches; callers intersect with real spans


class Span(NamedTuple):
    """Half-open range of global positions ``[start, stop)``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of positions; never negative for a span made by this package."""
        return self.stop - self.start

    def intersect(self, other: Span) -> Span | None:
        """Return the common part, or None where there is none."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Span(start, stop) if start < stop else None


def union(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sort, drop empty spans, and join the ones that touch or overlap."""
    joined: list[Span] = []
    for span in sorted(s for s in spans if s.start < s.stop):
        if joined and span.start <= joined[-1].stop:
            joined[-1] = Span(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return tuple(joined)


def overlap(left: Sequence[Span], right: Sequence[Span]) -> tuple[Span, ...]:
    """Intersect two sorted lists of disjoint spans."""
    common: list[Span] = []
    i = j = 0
    while i < len(left) and j < len(right):
        part = left[i].intersect(right[j])
        if part is not None:
            common.append(part)
        if left[i].stop <= right[j].stop:
            i += 1
        else:
            j += 1
    return tuple(common)


class Mask:
    """Base of all masks. Combine with ``&``; every answer is about global positions."""

    def allowed(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Return whether each query sees each key: bool, in the broadcast shape of both arguments."""
        raise NotImplementedError

    def reach(self, q_span: Span) -> tuple[Span, ...]:
        """Return the keys that at least one query of ``q_span`` sees, exactly."""
        raise NotImplementedError

    def full(self, q_span: Span) -> tuple[Span, ...]:
        """Return the keys that every query of ``q_span`` sees, exactly."""
        raise NotImplementedError

    def cuts(self, q_span: Span) -> tuple[Span, ...]:
        """Split ``q_span`` where the mask changes its rule (document edges), in order."""
        return (q_span,)

    def check(self, length: int) -> None:
        """Raise ValueError if the mask does not fit a sequence of ``length`` tokens."""

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key."""
        return False

    def __and__(self, other: Mask) -> Mask:
        return And(_parts(self) + _parts(other))


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    @override
    def allowed(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return torch.ones_like(q_pos - k_pos, dtype=torch.bool)

    @override
    def reach(self, q_span: Span) -> tuple[Span, ...]:
        return (Span(0, END),)

    full = reach


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees itself and every earlier key."""

    @override
    def allowed(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return q_pos >= k_pos

    @override
    def reach(self, q_span: Span) -> tuple[Span, ...]:
        return (Span(0, q_span.stop),)

    @override
    def full(self, q_span: Span) -> tuple[Span, ...]:
        return (Span(0, q_span.start + 1),)

    @property
    @override
    def causal(self) -> bool:
        return True


@dataclass(frozen=True, init=False)
class Documents(Mask):
    """A query sees only keys of its own document; used under ``&``.

    Args:
        boundaries: strictly increasing positions, 0 first and the length last; document i is
            ``[boundaries[i], boundaries[i + 1])``. One sequence for all batch rows, or a list of one per row.
    """

    boundaries: tuple[int, ...] | tuple[tuple[int, ...], ...]

    def __init__(self, boundaries: Sequence[int] | Sequence[Sequence[int]]) -> None:
        if len(boundaries) and not isinstance(boundaries[0], int):
            rows = tuple(_checked_boundaries(row) for row in boundaries)  # pyright: ignore[reportArgumentType]
            object.__setattr__(self, "boundaries", rows)
        else:
            object.__setattr__(self, "boundaries", _checked_boundaries(boundaries))

    @property
    def rows(self) -> tuple[tuple[int, ...], ...] | None:
        """The per-row boundaries, or None where one sequence serves every row."""
        return self.boundaries if isinstance(self.boundaries[0], tuple) else None  # pyright: ignore[reportReturnType]

    @property
    def _edges(self) -> tuple[int, ...]:
        if self.rows is not None:
            raise ValueError(
                f"Documents of {len(self.rows)} batch rows answers no question about one row; "
                "take one with of_row(mask, i)"
            )
        return self.boundaries  # pyright: ignore[reportReturnType]

    @override
    def allowed(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        inner = torch.tensor(self._edges[1:], device=q_pos.device)
        return torch.bucketize(q_pos, inner, right=True) == torch.bucketize(k_pos, inner, right=True)

    @override
    def reach(self, q_span: Span) -> tuple[Span, ...]:
        # Documents between the first and the last query's are neighbours, so what they see together is one span.
        edges = self._edges
        return (Span(edges[bisect_right(edges, q_span.start) - 1], edges[bisect_left(edges, q_span.stop)]),)

    @override
    def full(self, q_span: Span) -> tuple[Span, ...]:
        edges = self._edges
        first = bisect_right(edges, q_span.start) - 1
        return (Span(edges[first], edges[first + 1]),) if q_span.stop <= edges[first + 1] else ()

    @override
    def cuts(self, q_span: Span) -> tuple[Span, ...]:
        edges = self._edges
        inner = edges[bisect_right(edges, q_span.start) : bisect_left(edges, q_span.stop)]
        points = (q_span.start, *inner, q_span.stop)
        return tuple(Span(a, b) for a, b in zip(points, points[1:], strict=False))

    @override
    def check(self, length: int) -> None:
        for edges in self.rows or (self.boundaries,):
            if edges[-1] != length:
                raise ValueError(
                    f"mask: Documents ends at {edges[-1]} but the sequence has {length} tokens; "
                    "the last boundary must be the global length"
                )


@dataclass(frozen=True)
class And(Mask):
    """A query sees a key where every part allows it. Made by ``&``."""

    parts: tuple[Mask, ...]

    def __post_init__(self) -> None:
        found = sum(isinstance(part, Documents) for part in self.parts)
        if found > 1:
            raise ValueError(
                f"mask: {found} Documents in {self}; a mask holds at most one, give their common boundaries"
            )

    @override
    def allowed(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return reduce(torch.logical_and, (part.allowed(q_pos, k_pos) for part in self.parts))

    @override
    def reach(self, q_span: Span) -> tuple[Span, ...]:
        # Exact for these parts: within one document each part's reach is an interval that ends or starts with the
        # query, and the documents of a span are neighbours. Masks with gaps are cut at their edges first.
        return reduce(overlap, (part.reach(q_span) for part in self.parts))

    @override
    def full(self, q_span: Span) -> tuple[Span, ...]:
        return reduce(overlap, (part.full(q_span) for part in self.parts))

    @override
    def cuts(self, q_span: Span) -> tuple[Span, ...]:
        pieces: tuple[Span, ...] = (q_span,)
        for part in self.parts:
            pieces = tuple(cut for piece in pieces for cut in part.cuts(piece))
        return pieces

    @override
    def check(self, length: int) -> None:
        for part in self.parts:
            part.check(length)

    @property
    @override
    def causal(self) -> bool:
        return any(part.causal for part in self.parts)

    def __str__(self) -> str:
        return " & ".join(str(part) for part in self.parts)


def of_row(mask: Mask, row: int) -> Mask:
    """Return the mask of one batch row: Documents with a boundary list per row keep only that row's."""
    if isinstance(mask, And):
        return And(tuple(of_row(part, row) for part in mask.parts))
    if isinstance(mask, Documents) and mask.rows is not None:
        return Documents(mask.rows[row])
    return mask


def batch_rows(mask: Mask | Sequence[Mask], batch: int) -> list[Mask]:
    """Return one mask per batch row.

    Raises:
        ValueError: if a list of masks, or Documents with one boundary list per row, has another length than ``batch``.
    """
    if not isinstance(mask, Mask):
        if len(mask) != batch:
            raise ValueError(f"mask: {len(mask)} masks for {batch} batch rows; give one mask, or one per row")
        return [of_row(each, row) for row, each in enumerate(mask)]
    rows = row_count(mask)
    if rows is not None and rows != batch:
        raise ValueError(f"mask: Documents has {rows} boundary lists for {batch} batch rows; give one, or one per row")
    return [of_row(mask, row) for row in range(batch)]


def row_count(mask: Mask) -> int | None:
    """Return for how many batch rows the mask is written, or None where it serves any number."""
    for part in _parts(mask):
        if isinstance(part, Documents) and part.rows is not None:
            return len(part.rows)
    return None


def _parts(mask: Mask) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, And) else (mask,)


def _checked_boundaries(boundaries: Iterable[object]) -> tuple[int, ...]:
    edges = tuple(boundaries)
    if any(isinstance(edge, bool) or not isinstance(edge, int) for edge in edges):
        raise ValueError(f"Documents boundaries must be ints, got {edges!r}")
    if len(edges) < 2 or edges[0] != 0 or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):  # pyright: ignore[reportOperatorIssue]
        raise ValueError(
            f"Documents boundaries must be strictly increasing, 0 first and the length last; got {edges!r}"
        )
    return edges  # pyright: ignore[reportReturnType]
