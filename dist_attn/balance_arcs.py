"""Sharing out a sequence in arcs: every rank the same tokens, about the same area, few cuts.

Lay the sequence on a circle and slide an arc of one share round it: on average over all places its area is the mean, so
somewhere it is exactly that, whatever the mask and the documents. Take that arc out, close the circle, and go on. Each
arc makes two cuts, so a rank holds two stretches on average; for a dense causal mask the arcs are zigzag's. Among the
places where the area is right the arc is taken that makes ranks fetch the fewest keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ringspan.dist_attn.balance_ledger import Floats, Integers, Ledger

NOWHERE = -(1 << 60)  # the place before the sequence: so far away that no gap to it is ever filled
PLACES = 2048  # how many starts and ends of arcs are looked at, beside seams and documents' starts


class Sharing(NamedTuple):
    """Who holds what: per rank its spans as an array [n, 2]; keys that all fetch; greatest over mean area."""

    spans: tuple[Integers, ...]
    fetched: float
    imbalance: float


class _Cuts(NamedTuple):
    """Places on the circle: tokens and pairs that lie before them; the part they are in, and tokens into it."""

    token: Integers
    area: Floats
    part: Integers
    offset: Integers

    def take(self, chosen: Integers | np.int64) -> _Cuts:
        return _Cuts(self.token[chosen], self.area[chosen], self.part[chosen], self.offset[chosen])

    def swapped(self, other: _Cuts, where: NDArray[np.bool_]) -> _Cuts:
        """Return these cuts, but the other's where it says so."""
        return _Cuts(
            np.where(where, other.token, self.token),
            np.where(where, other.area, self.area),
            np.where(where, other.part, self.part),
            np.where(where, other.offset, self.offset),
        )


class _Side(NamedTuple):
    """What touches a cut from one side: the stretch, tokens into it, and the place in the book's order."""

    stretch: Integers
    into: Integers
    place: Integers


def share_out(book: Ledger, shares: Sequence[int], tolerance: float) -> Sharing:
    """Deal the stretches of ``book`` to ranks, in arcs.

    Args:
        book: stretches in the order in which they lie on the circle.
        shares: tokens of each rank; together all.
        tolerance: how far above the mean, relative to it, an area may be to save keys.
    """
    circle = Circle(book)
    return judged(circle, take_arcs(circle, shares, circle.pairs / max(len(shares), 1), tolerance))


def take_arcs(circle: Circle, shares: Sequence[int], mean: float, tolerance: float) -> list[Integers]:
    """Return the parts of each rank; together all that was left of the circle. ``mean``: pairs a rank should have."""
    return [circle.take(share, len(shares) - number, mean, tolerance) for number, share in enumerate(shares)]


def judged(circle: Circle, parts: Sequence[Integers]) -> Sharing:
    """Return spans, keys to fetch and imbalance of parts that hold everything."""
    spans = tuple(_joined(circle.book.start[each[0]] + each[1], each[2]) for each in parts)
    areas = [int(each[3].sum()) for each in parts]
    fetched = sum(circle.fetched(each) for each in parts)
    return Sharing(spans, fetched, max(areas) * len(areas) / sum(areas) if any(areas) else 1.0)


class Circle:
    """What is not yet dealt. Rows of ``parts``: the book's stretch, tokens cut off its left, tokens, pairs."""

    def __init__(self, book: Ledger) -> None:
        self.book = book
        self.place = np.cumsum(book.size) - book.size
        self.lone = book.before[0].max(0) == 0  # stretches whose tokens see nothing to their left
        self.keep(self.whole(np.arange(len(book.size))))

    def whole(self, stretches: Integers) -> Integers:
        """Return these stretches of the book as parts."""
        return np.stack([stretches, np.zeros_like(stretches), self.book.size[stretches], self.book.area[stretches]])

    def keep(self, parts: Integers) -> None:
        """Let these parts be all that is left."""
        self.parts = parts
        self.token, self.area = (np.concatenate([[0], np.cumsum(parts[row])]) for row in (2, 3))
        self.tokens, self.pairs = int(self.token[-1]), float(self.area[-1])

    def take(self, share: int, left: int, mean: float, tolerance: float) -> Integers:
        """Take out an arc of ``share`` tokens, and return its parts.

        Args:
            left: ranks that have nothing yet; mean: pairs that each should have.
        """
        if share in (0, self.tokens):
            arc = self.parts[:, : self.parts.shape[1] if share else 0]
            self.keep(self.parts[:, arc.shape[1] :])
            return arc
        target = self.pairs / left
        # Not so few pairs that the ranks to come could not keep to half of the tolerance.
        low = max(self.pairs - (left - 1) * mean * (1 + tolerance / 2), mean * (1 - 2 * tolerance))
        for places in (self._some_places(), np.arange(self.parts.shape[1])):
            starts, ends, areas = self._arcs(share, target, places)
            right = np.flatnonzero((areas >= low) & (areas <= mean * (1 + tolerance)))
            if len(right):
                break
        off = np.abs(areas - target)
        if not len(right):
            right = np.flatnonzero(off == off.min())
        cost = self._cost(starts.take(right), ends.take(right))
        cheap = np.flatnonzero(cost < cost.min() + 1)
        best = cheap[np.argmin(off[right[cheap]])]
        return self._take_out(starts.take(right[best]), ends.take(right[best]))

    def fetched(self, parts: Integers) -> float:
        """Return how many keys a rank that holds these parts sees and does not hold."""
        stretch, skipped, size, _ = parts[:, np.argsort(self.place[parts[0]] + parts[1], kind="stable")]
        if not len(stretch):
            return 0.0
        right = _Side(stretch, skipped, self.place[stretch] + skipped)
        left = _Side(stretch, skipped + size, right.place + size)
        left = _Side(*(np.roll(each, 1) for each in left))
        around = left.place > right.place  # behind the last part comes the first: nobody sees across
        keys = np.where(around, self._seen(left, None) + self._seen(None, right), self._seen(left, right))
        return float(keys.sum())

    def _some_places(self) -> Integers:
        """Return the parts to start and end arcs at: those at a seam or a document's start, and evenly some others."""
        stretch, skipped, size, _ = self.parts
        place = self.place[stretch] + skipped
        look = self.lone[stretch] & (skipped == 0)
        look[0] = True
        look[1:] |= place[1:] != (place + size)[:-1]
        look[:: -(-len(look) // PLACES)] = True
        return np.flatnonzero(look)

    def _arcs(self, share: int, target: float, places: Integers) -> tuple[_Cuts, _Cuts, Floats]:
        """Return arcs that start or end where a part does, and those in between whose area is the target's.

        Args:
            places: the parts to look at, ascending.

        Returns:
            Their starts, their ends (round the circle), their areas.
        """
        edges = _Cuts(self.token[places], self.area[places].astype(np.float64), places, np.zeros_like(places))
        ends, starts = (self._cuts((edges.token + step) % self.tokens) for step in (share, -share))
        # From one place to the next the area passes the target: about where a straight line would.
        over = self._between(edges, ends) - target
        following = np.roll(over, -1)
        passing = np.flatnonzero((over < 0) != (following < 0))
        way = over[passing] / (over[passing] - following[passing])
        span = np.diff(edges.token, append=self.tokens)[passing]
        inner = self._cuts((edges.token[passing] + (way * span).astype(np.int64)) % self.tokens)
        beyond = self._cuts((inner.token + share) % self.tokens)
        first, last = _chained(edges, starts, inner), _chained(ends, edges, beyond)
        return first, last, self._between(first, last)

    def _cuts(self, token: Integers) -> _Cuts:
        part = np.searchsorted(self.token, token, "right") - 1
        offset = token - self.token[part]
        return _Cuts(token, self.area[part] + self.parts[3, part] * (offset / self.parts[2, part]), part, offset)

    def _between(self, start: _Cuts, end: _Cuts) -> Floats:
        return end.area - start.area + self.pairs * (end.token <= start.token)

    def _cost(self, start: _Cuts, end: _Cuts) -> Floats:
        """Return how many more keys are fetched once the arc between these cuts is out.

        A rank fetches what the gaps between its tokens hide from it. The arc and what is left of the circle have the
        gaps that one holder of both had, but for those at the cuts; instead each cut has tokens that see nothing
        beyond it, and of what lies before the lower and behind the upper cut, one sees the other over a new gap.
        """
        swap = start.token > end.token
        low, high = start.swapped(end, swap), end.swapped(start, swap)
        (low_left, low_right), (high_left, high_right) = self._sides(low), self._sides(high)
        made = self._seen(None, low_right) + self._seen(high_left, None) + self._seen(low_left, high_right)
        return made - self._seen(low_left, low_right) - self._seen(high_left, high_right)

    def _sides(self, cuts: _Cuts) -> tuple[_Side, _Side]:
        """Return what lies left and right of each cut; left of the circle's start is nowhere."""
        stretch = self.parts[0, cuts.part]
        into = self.parts[1, cuts.part] + cuts.offset
        right = _Side(stretch, into, self.place[stretch] + into)
        part = np.where(cuts.offset > 0, cuts.part, cuts.part - 1)
        stretch = self.parts[0, part]
        into = self.parts[1, part] + np.where(cuts.offset > 0, cuts.offset, self.parts[2, part])
        return _Side(stretch, into, np.where(part < 0, NOWHERE, self.place[stretch] + into)), right

    def _seen(self, left: _Side | None, right: _Side | None) -> Floats:
        """Return the keys in the gap between two sides that tokens beyond it see; None: there is no other side."""
        book, keys = self.book, np.zeros(())
        if right is not None:
            way = right.into / book.size[right.stretch]
            keys = keys + book.before[0][:, right.stretch] * (1 - way) + book.before[1][:, right.stretch] * way
        if left is not None:
            way = left.into / book.size[left.stretch]
            seen = book.after[0][:, left.stretch] * (1 - way) + book.after[1][:, left.stretch] * way
            keys = keys + np.where(left.place < 0, 0, seen)
        if left is not None and right is not None:
            keys = np.minimum(keys, right.place - left.place)
        return (keys * book.weight[:, None]).sum(0)

    def _take_out(self, start: _Cuts, end: _Cuts) -> Integers:
        """Take out the arc from ``start`` to ``end``, round the circle where the end is not behind the start."""
        inside = bool(start.token < end.token)
        low, high = (start, end) if inside else (end, start)
        parts, stop = _split(self.parts, int(high.part), int(high.offset))
        parts, first = _split(parts, int(low.part), int(low.offset))
        stop += int(low.offset > 0)
        middle, outer = parts[:, first:stop], np.concatenate([parts[:, :first], parts[:, stop:]], axis=1)
        self.keep(outer if inside else middle)
        return middle if inside else outer


def _chained(*several: _Cuts) -> _Cuts:
    return _Cuts(
        np.concatenate([each.token for each in several]),
        np.concatenate([each.area for each in several]),
        np.concatenate([each.part for each in several]),
        np.concatenate([each.offset for each in several]),
    )


def _split(parts: Integers, index: int, offset: int) -> tuple[Integers, int]:
    """Cut a part in two, unless the cut is at its start; return the parts, and which lies right of the cut."""
    if offset == 0:
        return parts, index
    stretch, skipped, size, area = parts[:, index].tolist()
    under = area * offset // size
    both = np.array([[stretch] * 2, [skipped, skipped + offset], [offset, size - offset], [under, area - under]])
    return np.concatenate([parts[:, :index], both, parts[:, index + 1 :]], axis=1), index + 1


def _joined(start: Integers, size: Integers) -> Integers:
    """Return spans [n, 2] in order, those that touch as one."""
    order = np.argsort(start, kind="stable")
    start, stop = start[order], (start + size)[order]
    new = np.append(start[1:] != stop[:-1], True)
    return np.stack([start[np.roll(new, 1)], stop[new]], axis=1) if len(start) else np.zeros((0, 2), dtype=np.int64)
