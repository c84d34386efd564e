"""From masks to rectangles: which query and key spans meet, and where they lie in this rank's memory.

A ``Pair`` speaks of global positions; a ``Tile`` of the rows of a rank's queries and of the key buffer at hand.
Either is a full rectangle or a causal triangle (a square whose diagonal is the sequence's own).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from ringspan.kernels.mask import Mask, Span, overlap


class Pair(NamedTuple):
    """Queries ``q`` and keys ``k`` in global positions; ``causal``: a triangle (q equals k), else a full rectangle."""

    q: Span
    k: Span
    causal: bool


@dataclass(frozen=True)
class Tile:
    """Rows ``q`` of the local queries against rows ``k`` of the key buffer.

    ``first`` says that no earlier tile touched these query rows, so that the result is stored instead of merged.
    """

    q: Span
    k: Span
    causal: bool
    first: bool = False


def area(pair: Pair) -> int:
    """Return the number of live (query, key) pairs."""
    return pair.q.size * (pair.q.size + 1) // 2 if pair.causal else pair.q.size * pair.k.size


def pairs_of(mask: Mask, queries: Sequence[Span], keys: Sequence[Span]) -> tuple[Pair, ...]:
    """Cut the live area of ``queries`` x ``keys`` into full rectangles and causal triangles, disjoint and exact."""
    found: list[Pair] = []
    for held in queries:
        for q in mask.cuts(held):
            reach = mask.reach(q)
            for k in (part for key in keys for part in overlap([key], reach)):
                found += _causal_pairs(q, k) if mask.causal else [Pair(q, k, False)]
    return tuple(found)


def _causal_pairs(q: Span, k: Span) -> list[Pair]:
    """Split one rectangle under the diagonal: the part before the queries, the square on it, the part below it."""
    found: list[Pair] = []
    before = k.intersect(Span(k.start, q.start))
    if before:
        found.append(Pair(q, before, False))
    square = k.intersect(q)
    if square:
        found.append(Pair(square, square, True))
        if square.stop < q.stop:
            found.append(Pair(Span(square.stop, q.stop), square, False))
    return found


def tiles_of(pairs: Sequence[Pair], queries: Sequence[Span], keys: Sequence[Span]) -> list[Tile]:
    """Translate global pairs into rows of the local queries and of the key buffer (spans laid end to end)."""
    q_row, k_row = _Rows(queries), _Rows(keys)
    return [Tile(q_row.of(pair.q), k_row.of(pair.k), pair.causal) for pair in pairs]


class _Rows:
    def __init__(self, spans: Sequence[Span]) -> None:
        order = sorted(range(len(spans)), key=lambda i: spans[i].start)
        offsets = [0, *accumulate(span.size for span in spans)]
        self.starts = [spans[i].start for i in order]
        self.offsets = [offsets[i] for i in order]

    def of(self, span: Span) -> Span:
        index = bisect_right(self.starts, span.start) - 1
        first = self.offsets[index] + span.start - self.starts[index]
        return Span(first, first + span.size)


def coalesce(tiles: Sequence[Tile]) -> list[Tile]:
    """Join tiles that are neighbours in memory, so that a kernel call is as large as it can be.

    Two rectangles with the same queries and adjoining keys (or the reverse) become one; a triangle, the rectangle below
    it and the next triangle become one larger triangle. A zigzag rank's own two chunks are so a single causal call.
    """
    joined = list(tiles)
    changed = True
    while changed:
        changed = False
        joined, changed = _join_rectangles(joined)
        grown, more = _join_triangles(joined)
        joined, changed = grown, changed or more
    return joined


def _join_rectangles(tiles: list[Tile]) -> tuple[list[Tile], bool]:
    result: list[Tile] = []
    changed = False
    for tile in tiles:
        last = result[-1] if result else None
        if last and not last.causal and not tile.causal:
            if last.q == tile.q and last.k.stop == tile.k.start:
                result[-1] = replace(last, k=Span(last.k.start, tile.k.stop))
                changed = True
                continue
            if last.k == tile.k and last.q.stop == tile.q.start:
                result[-1] = replace(last, q=Span(last.q.start, tile.q.stop))
                changed = True
                continue
        result.append(tile)
    return result, changed


def _join_triangles(tiles: list[Tile]) -> tuple[list[Tile], bool]:
    for index in range(len(tiles) - 2):
        upper, below, lower = tiles[index : index + 3]
        fits = (
            upper.causal
            and not below.causal
            and lower.causal
            and below.q == lower.q
            and below.k == upper.k
            and upper.q.stop == lower.q.start
            and upper.k.stop == lower.k.start
        )
        if fits:
            whole = Tile(Span(upper.q.start, lower.q.stop), Span(upper.k.start, lower.k.stop), True)
            return tiles[:index] + [whole] + tiles[index + 3 :], True
    return tiles, False


def mark_first(tiles: Sequence[Tile], touched: bytearray) -> tuple[Tile, ...]:
    """Mark the tiles whose query rows no earlier tile touched; ``touched`` has a byte per local row and is updated."""
    marked: list[Tile] = []
    for tile in tiles:
        marked.append(replace(tile, first=touched.find(1, tile.q.start, tile.q.stop) < 0))
        touched[tile.q.start : tile.q.stop] = b"\1" * tile.q.size
    return tuple(marked)
