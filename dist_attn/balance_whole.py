"""Sharing out packed documents whole: only those that are too much for one rank are cut, and a few to fill up.

A document whose pairs, or tokens, are more than a rank's gives pieces from its end, each as much work as leaves room
for tokens of short documents. Then all go to ranks, those with the most pairs first, each to the rank that has the
most work per token to come. What fits nowhere any more fills the gaps, cut where a gap is full. How much work the short
documents bring is seen when that is done, and done again with it. Ranks that are still above the mean are shared out
anew, in arcs, together with ranks below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ringspan.dist_attn.balance_arcs import Circle, Sharing, judged, take_arcs
from ringspan.dist_attn.balance_ledger import Floats, Integers, Ledger

ROUNDS = 6  # of cutting and packing, each with the last one's filling


class _Item(NamedTuple):
    """Tokens [start, stop) of the book's order, all of one document, and their pairs."""

    start: int
    stop: int
    area: float

    @property
    def size(self) -> int:
        return self.stop - self.start


def share_whole(book: Ledger, document: Integers, shares: Sequence[int], tolerance: float) -> Sharing | None:
    """Deal the stretches of ``book`` to ranks, documents whole where that is even; None where it cannot be.

    Args:
        book: stretches, those of a document together and in order.
        document: [N] the number of each stretch's document.
        shares: tokens of each rank; together all.
        tolerance: how far above the mean, relative to it, an area may be.
    """
    if not book.area.any() or not min(shares):
        return None
    cutter = _Pieces(book, document, sum(shares) / len(shares), len(shares), tolerance)
    held = _rounds(cutter, shares, 1 + tolerance)
    if held is None:
        return None
    numbered = sorted((item.start, rank) for rank, items in enumerate(held) for item in items)
    starts, ranks = np.array(numbered, dtype=np.int64).reshape(-1, 2).T
    circle = Circle(book.split(starts))
    owner = ranks[np.searchsorted(starts, circle.place, "right") - 1]
    return _evened(circle, owner, shares, tolerance)


def _rounds(cutter: _Pieces, shares: Sequence[int], enough: float) -> list[list[_Item]] | None:
    """Return the most even packing of a few rounds; None if there is none."""
    best: list[list[_Item]] | None = None
    least, filling = np.inf, 0.0
    for _ in range(ROUNDS):
        found = cutter.found(filling)
        if found is None:
            break
        pieces, items = found
        held = _packed(pieces, items, shares, cutter.mean)
        worst = max(sum(item.area for item in each) for each in held) / cutter.mean
        if worst < least:
            best, least = held, worst
        if not pieces or worst <= enough:
            break
        cut = {piece.start for piece in pieces}
        filled = [item for each in held if each[0].start in cut for item in each[1:]]
        filling = sum(item.area for item in filled) / max(1, sum(item.size for item in filled))
    return best


class _Pieces:
    """Cuts documents that are too much for one rank."""

    def __init__(self, book: Ledger, document: Integers, share: float, world: int, tolerance: float) -> None:
        self.share, self.world = share, world
        self.token, self.area = (np.concatenate([[0], np.cumsum(each)]) for each in (book.size, book.area))
        first = np.flatnonzero(np.diff(document, prepend=-1))
        edges = np.append(first, len(document))
        self.edges = self.token[edges]
        self.sizes, self.areas = np.diff(self.edges), np.diff(self.area[edges])
        self.mean = float(self.area[-1]) / world
        self.most = self.mean * (1 + tolerance / 2)

    def found(self, filling: float) -> tuple[list[_Item], list[_Item]] | None:
        """Return pieces, which want a rank each, and all else; None where there are too few short documents to fill.

        Args:
            filling: pairs per token of the documents that fill up a piece's rank.
        """
        large = (self.areas + (self.share - self.sizes) * filling > self.most) | (self.sizes > self.share)
        pieces: list[_Item] = []
        rest: list[_Item] = []
        for number in np.flatnonzero(large):
            self._cut(int(self.edges[number]), int(self.edges[number + 1]), filling, pieces, rest)
        short = np.flatnonzero(~large)
        room = sum(self.share - piece.size for piece in pieces)
        if len(pieces) > self.world or room > self.sizes[short].sum():
            return None
        return pieces, rest + [_Item(int(self.edges[n]), int(self.edges[n + 1]), float(self.areas[n])) for n in short]

    def _cut(self, start: int, stop: int, filling: float, pieces: list[_Item], rest: list[_Item]) -> None:
        """Cut a document from its end while what is left is too much for a rank."""
        first = int(np.searchsorted(self.token, start))
        while stop > start and len(pieces) <= self.world:
            last = int(np.searchsorted(self.token, stop))
            edge = np.append(self.token[first:last], stop)
            under = float(np.interp(stop, self.token, self.area))
            area = under - np.append(self.area[first:last], under)
            work = area + (self.share - (stop - edge)) * filling
            if work[0] <= self.most and stop - start <= self.share:
                rest.append(_Item(start, stop, float(area[0])))
                return
            place = max(_passing(edge, work, self.mean), stop - int(self.share), start)
            area_of = under - float(np.interp(place, self.token, self.area))
            pieces.append(_Item(place, stop, area_of))
            stop = place


def _passing(edge: Integers, work: Floats, mean: float) -> int:
    """Return the last place from which on the work is the mean; the first place if it is nowhere."""
    enough = np.flatnonzero(work >= mean)
    if not len(enough) or enough[-1] + 1 == len(edge):
        return int(edge[0]) if not len(enough) else int(edge[-2])
    at = enough[-1]
    way = (work[at] - mean) / (work[at] - work[at + 1])
    return min(int(edge[at] + way * (edge[at + 1] - edge[at])), int(edge[-1]) - 1)


def _packed(pieces: list[_Item], items: list[_Item], shares: Sequence[int], mean: float) -> list[list[_Item]]:
    """Return the items of each rank; its share of tokens exactly, its work as near the mean as they allow."""
    tokens, work = np.array(shares, dtype=np.int64), np.full(len(shares), mean)
    held: list[list[_Item]] = [[] for _ in shares]
    loose: list[_Item] = []
    for item in [*pieces, *sorted(items, key=lambda one: (-one.area, one.start))]:
        fitting = np.flatnonzero(tokens >= item.size)
        if not len(fitting):
            loose.append(item)
            continue
        rank = int(fitting[np.argmax(work[fitting] / np.maximum(tokens[fitting], 1))])
        held[rank].append(item)
        tokens[rank] -= item.size
        work[rank] -= item.area
    # The rank with the least work to come per token takes the lightest.
    for rank in np.argsort(work / np.maximum(tokens, 1), kind="stable"):
        while tokens[rank]:
            item = loose.pop()
            place = min(item.start + int(tokens[rank]), item.stop)
            area = item.area * (place - item.start) / item.size
            held[rank].append(_Item(item.start, place, area))
            tokens[rank] -= place - item.start
            if place < item.stop:
                loose.append(_Item(place, item.stop, item.area - area))
    return held


def _evened(circle: Circle, owner: Integers, shares: Sequence[int], tolerance: float) -> Sharing | None:
    """Share out anew, in arcs, what ranks above the mean hold together with ranks below it."""
    areas = np.zeros(len(shares), dtype=np.int64)
    np.add.at(areas, owner, circle.book.area)
    mean = float(areas.sum()) / len(shares)
    parts = [circle.whole(np.flatnonzero(owner == rank)) for rank in range(len(shares))]
    free = [int(rank) for rank in np.argsort(areas, kind="stable")]
    level = mean * (1 + 0.9 * tolerance)  # of a group, so that arcs have some choice
    while free and areas[free[-1]] > mean * (1 + tolerance):
        group = [free.pop()]
        while (over := areas[group].sum() - len(group) * level) > 0:
            if not free:
                return None
            # The fullest rank that will do; else the emptiest, and another.
            place = int(np.searchsorted(areas[free], level - over, "right")) - 1
            group.append(free.pop(max(place, 0)))
        circle.keep(circle.whole(np.flatnonzero(np.isin(owner, group))))
        arcs = take_arcs(circle, [shares[rank] for rank in group], mean, tolerance)
        for rank, arc in zip(group, arcs, strict=True):
            parts[rank] = arc
    return judged(circle, parts)
