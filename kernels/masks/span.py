"""Spans: half-open ranges of global positions, and lists of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

END = 1 << 62  # stands for "to the end of any sequence"; whoever asks intersects with real spans


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


def gaps(spans: Iterable[Span], inside: Span) -> tuple[Span, ...]:
    """Return what ``spans`` (sorted, disjoint) leave of ``inside``."""
    free: list[Span] = []
    start = inside.start
    for span in spans:
        if start < min(span.start, inside.stop):
            free.append(Span(start, min(span.start, inside.stop)))
        start = max(start, span.stop)
    if start < inside.stop:
        free.append(Span(start, inside.stop))
    return tuple(free)
