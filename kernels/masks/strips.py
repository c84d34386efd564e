"""Strips: the shape that every mask takes within one document and one group, and the algebra on them.

A strip is where two conditions meet: the key lies in a range, and the distance ``d = key - row`` lies in a range (with
a step, in one residue class of it). Strips are closed under intersection, and the difference of two is a handful of
disjoint strips; so each composition of masks is a list of disjoint strips, found by arithmetic on a few integers.
How far strips reach and how many pairs they hold is in ``measure.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd
from typing import NamedTuple

from ringspan.kernels.masks.span import END


class Strip(NamedTuple):
    """Row r sees ``max(first, r + low) <= k < min(last, r + high)`` with ``(r - k) % step == offset``.

    ``-END`` and ``END`` stand for no bound.
    """

    first: int
    last: int
    low: int = -END
    high: int = END
    step: int = 1
    offset: int = 0


EVERYTHING = Strip(-END, END)


def aligned(low: int, step: int, offset: int) -> int:
    """Return the smallest distance d of the class ``-d % step == offset`` with d >= low."""
    return low + (-offset - low) % step


def tidy(strip: Strip) -> Strip | None:
    """Return the strip with its distances tight around its class, or None if no row could see a key by it."""
    first, last, low, high, step, offset = strip
    if first >= last or low >= high:
        return None
    if step == 1:
        return strip
    if low > -END:
        low = aligned(low, step, offset)
    if high < END:
        high -= (high - 1 + offset) % step
    if low >= high:
        return None
    return Strip(first, last, low, high) if high - low == 1 else Strip(first, last, low, high, step, offset)


def intersect(a: Strip, b: Strip) -> Strip | None:
    """Return the pairs of both, or None where there are none."""
    first, last = max(a.first, b.first), min(a.last, b.last)
    low, high = max(a.low, b.low), min(a.high, b.high)
    if first >= last or low >= high:
        return None
    if a.step == b.step == 1:
        return Strip(first, last, low, high)
    common = gcd(a.step, b.step)
    if (b.offset - a.offset) % common:
        return None
    # The Chinese remainder theorem: the one class modulo the least common multiple that lies in both.
    other = b.step // common
    turns = (b.offset - a.offset) // common * pow(a.step // common, -1, other) % other
    step = a.step * other
    return tidy(Strip(first, last, low, high, step, (a.offset + a.step * turns) % step))


def subtract(a: Strip, b: Strip) -> list[Strip]:
    """Return disjoint strips with the pairs of ``a`` that are not in ``b``."""
    shared = intersect(a, b)
    if shared is None:
        return [a]
    around = (
        Strip(-END, b.first),
        Strip(b.first, END, high=b.low),
        Strip(b.last, END, low=b.low),
        Strip(b.first, b.last, low=b.high),
    )
    parts = [intersect(a, side) for side in around if side.first < side.last and side.low < side.high]
    if b.step > 1:
        # Within b's bounds its other residue classes remain, each a strip of its own.
        bounds = b._replace(step=1, offset=0)
        step = a.step * b.step // gcd(a.step, b.step)
        classes = (o for o in range(a.offset, step, a.step) if o % b.step != b.offset)
        parts += [intersect(a, bounds._replace(step=step, offset=o)) for o in classes]
    return [part for part in parts if part is not None]


def unite(strips: Iterable[Strip]) -> tuple[Strip, ...]:
    """Return disjoint strips with the pairs of all, joined where one strip holds two."""
    done: list[Strip] = []
    # Plain strips first: what they leave of a stepped one is few strips, what a stepped one leaves of them is many.
    for strip in sorted(join(strips), key=lambda each: each.step):
        rest = [strip]
        for other in done:
            rest = [part for each in rest for part in subtract(each, other)]
        done += rest
    return join(done)


def meet(left: Sequence[Strip], right: Sequence[Strip]) -> tuple[Strip, ...]:
    """Intersect two lists of disjoint strips; the result is disjoint too."""
    if len(left) == len(right) == 1:
        both = intersect(left[0], right[0])
        return () if both is None else (both,)
    return join(both for a in left for b in right if (both := intersect(a, b)) is not None)


def join(strips: Iterable[Strip]) -> tuple[Strip, ...]:
    """Join strips pair by pair, as long as two of them are together one strip."""
    done: list[Strip] = []
    for strip in strips:
        place = 0
        while place < len(done):
            whole = _joined(done[place], strip)
            if whole is None:
                place += 1
            else:
                del done[place]
                strip, place = whole, 0  # the wider strip may meet those that the narrow one did not
        done.append(strip)
    return tuple(done)


def _joined(a: Strip, b: Strip) -> Strip | None:
    """Return the one strip that holds exactly the pairs of both, if there is one."""
    if _holds(a, b):
        return a
    if _holds(b, a):
        return b
    if a[4:] != b[4:]:
        return None
    if a[2:4] == b[2:4] and a.first <= b.last and b.first <= a.last:
        return a._replace(first=min(a.first, b.first), last=max(a.last, b.last))
    # Distances of one class stand a step apart.
    if a[:2] == b[:2] and a.low < b.high + a.step and b.low < a.high + a.step:
        return a._replace(low=min(a.low, b.low), high=max(a.high, b.high))
    return None


def _holds(a: Strip, b: Strip) -> bool:
    within = a.first <= b.first and b.last <= a.last and a.low <= b.low and b.high <= a.high
    if not within or a.step == 1:
        return within
    if b.high - b.low == 1:  # a single distance
        return (b.low + a.offset) % a.step == 0
    return b.step % a.step == 0 and b.offset % a.step == a.offset
