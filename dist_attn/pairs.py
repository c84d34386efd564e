"""What a rank computes, in global positions: which of its query spans meet which key spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ringspan.kernels.mask import Mask, Span, overlap, union


class Pair(NamedTuple):
    """Queries ``q`` and keys ``k`` that meet; ``full``: every query sees every key, else some see some."""

    q: Span
    k: Span
    full: bool


def pairs_of(mask: Mask, queries: Sequence[Span], keys: Sequence[Span]) -> tuple[Pair, ...]:
    """Return the pairs of ``queries`` x ``keys`` that are not empty, cut at the mask's edges; disjoint, all live ones.

    A part of a key span that no query of a piece sees is left out, and a part that all see is a pair of its own.
    """
    found: list[Pair] = []
    for held in queries:
        for q in mask.cuts(held):
            seen = overlap(sorted(keys), mask.reach(q))
            full = overlap(seen, mask.full(q))
            found += [Pair(q, k, True) for k in full]
            found += [Pair(q, k, False) for k in without(seen, full)]
    return tuple(found)


def missing(mask: Mask, queries: Sequence[Span], held: Sequence[Span], length: int) -> tuple[Span, ...]:
    """Return the keys under ``length`` that some query sees and that are not ``held``."""
    seen = union(span for own in queries for cut in mask.cuts(own) for span in mask.reach(cut))
    return without(overlap(seen, [Span(0, length)]), union(held))


def without(spans: Sequence[Span], holes: Sequence[Span]) -> tuple[Span, ...]:
    """Return what is left of sorted, disjoint ``spans`` outside sorted, disjoint ``holes``."""
    rest: list[Span] = []
    index = 0
    for span in spans:
        start = span.start
        while index < len(holes) and holes[index].stop <= start:
            index += 1
        at = index
        while at < len(holes) and holes[at].start < span.stop:
            if start < holes[at].start:
                rest.append(Span(start, holes[at].start))
            start = max(start, holes[at].stop)
            at += 1
        if start < span.stop:
            rest.append(Span(start, span.stop))
    return tuple(rest)
