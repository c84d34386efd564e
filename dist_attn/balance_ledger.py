"""What each stretch of a sequence costs: its live pairs, and the keys that a cut there would make someone fetch.

Closed forms over all strips and stretches at once. A row's keys are counted by ``ceil((y - r) / step)`` at four corners
of its strip, so that the sum over rows up to any position is a difference of two values of one polynomial.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ringspan.kernels.mask import Mask, Span
from ringspan.kernels.masks.strips import aligned

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

LARGEST = 1 << 30  # tokens: squares of twice as many still fit 64 bits


class Ledger(NamedTuple):
    """A sequence in stretches of a few tokens, each within one document of every pattern; N stretches, M patterns.

    Args:
        start, size: [N] global positions and tokens.
        area: [N] live pairs of the stretch's queries, times the patterns' weights, summed.
        weight: [M] of each pattern.
        before: [2, M, N] keys left of a cut that rows right of it see: cut at the stretch's start, at its end.
        after: [2, M, N] keys right of a cut that rows left of it see, likewise.
    """

    start: Integers
    size: Integers
    area: Integers
    weight: Integers
    before: Floats
    after: Floats

    def take(self, order: Integers) -> Ledger:
        """Return the ledger with its stretches in another order."""
        start, size, area = (each[order] for each in (self.start, self.size, self.area))
        return Ledger(start, size, area, self.weight, self.before[..., order], self.after[..., order])

    def split(self, places: Integers) -> Ledger:
        """Return the ledger with its stretches cut, too, at these tokens of its order; in between it is linear."""
        edges = np.concatenate([[0], np.cumsum(self.size)])
        fine = np.union1d(edges, places)
        into = np.searchsorted(edges, fine[:-1], "right") - 1
        low, high = ((each - edges[into]) / self.size[into] for each in (fine[:-1], fine[1:]))
        under = np.concatenate([[0], np.cumsum(self.area)])[into] + (self.area[into] * low).astype(np.int64)
        area = np.diff(under, append=self.area.sum())
        start = self.start[into] + fine[:-1] - edges[into]
        before, after = (
            np.stack([each[0][:, into] * (1 - way) + each[1][:, into] * way for way in (low, high)])
            for each in (self.before, self.after)
        )
        return Ledger(start, np.diff(fine), area, self.weight, before, after)


def ledger(patterns: Sequence[tuple[Mask, int]], length: int, grain: int) -> Ledger:
    """Return the ledger of ``length`` tokens in stretches of at most ``grain``.

    Args:
        patterns: masks without heads and batch rows, each with how often it counts.
    """
    if length >= LARGEST:
        raise ValueError(f"length: {length} tokens are too many for Balanced; it counts up to {LARGEST - 1}")
    grid = np.arange(0, length, grain, dtype=np.int64)
    inner = [np.array(m.documents.edges[:-1], dtype=np.int64) for m, _ in patterns if m.documents is not None]
    edges = np.append(np.unique(np.concatenate([grid, *inner])), length)
    common = gcd(*(weight for _, weight in patterns))
    weight = np.array([each // common for _, each in patterns], dtype=np.int64)
    area = np.zeros(len(edges) - 1, dtype=np.int64)
    # Far beyond any model: pairs in units of 2**shift, so that their weighted sum fits 64 bits.
    shift = max(0, (int(weight.sum()) * length * length).bit_length() - 62)
    before, after = (np.zeros((2, len(patterns), len(edges) - 1)) for _ in range(2))
    for number, (mask, _) in enumerate(patterns):
        strips = _Strips(mask, length)
        area += (np.diff(strips.pairs_below(edges)) >> shift) * weight[number]
        before[:, number], after[:, number] = strips.halos(edges)
    return Ledger(edges[:-1], np.diff(edges), area, weight, before, after)


class _Strips:
    """All strips of a mask over a sequence, piece by piece, as columns of integers without "no bound"."""

    def __init__(self, mask: Mask, length: int) -> None:
        pieces = mask.pieces(Span(0, length))
        self.stop = np.array([rows.stop for rows, _ in pieces], dtype=np.int64)
        counts = np.array([len(strips) for _, strips in pieces], dtype=np.int64)
        self.first_strip = np.concatenate([[0], np.cumsum(counts)])  # of each piece
        table = [number for rows, strips in pieces for strip in strips for number in _bounded(*rows, *strip, length)]
        self.columns = np.array(table, dtype=np.int64).reshape(-1, 7).T

    def pairs_below(self, points: Integers) -> Integers:
        """Return how many live pairs the rows under each point have."""
        begin, end, *_ = self.columns
        whole = np.concatenate([[0], np.cumsum(_pairs(self.columns, end))])
        piece = np.searchsorted(self.stop, points, "left").clip(max=len(self.stop) - 1)
        first, count = self.first_strip[piece], np.diff(self.first_strip)[piece]
        strip, owner = _spread(first, count)
        partial = _pairs(self.columns[:, strip], np.clip(points[owner], begin[strip], end[strip]))
        return whole[first] + _sums(partial, owner, len(points))

    def halos(self, edges: Integers) -> tuple[list[Integers], list[Integers]]:
        """Return keys before and after a cut that the rows on its other side see: at starts, at ends of stretches."""
        before, after = [], []
        piece = np.searchsorted(self.stop, edges[:-1], "right")
        for points, inside in ((edges[:-1], piece), (edges[1:], np.searchsorted(self.stop, edges[1:], "left"))):
            strip, owner = _spread(self.first_strip[inside], np.diff(self.first_strip)[inside])
            _, _, first, last, low, high, _ = self.columns[:, strip]
            at = points[owner]
            left = np.minimum(at, last) - np.maximum(first, at + low)
            right = np.minimum(last, at + high - 1) - np.maximum(first, at)
            # Strips are disjoint pair by pair, yet two of them may show one key; no more keys than there are.
            before.append(np.minimum(_sums(left.clip(0), owner, len(points)), points))
            after.append(np.minimum(_sums(right.clip(0), owner, len(points)), edges[-1] - points))
        return before, after


def _bounded(
    start: int, stop: int, first: int, last: int, low: int, high: int, step: int, offset: int, length: int
) -> tuple[int, ...]:
    """Return (rows start, stop, first, last, low, high, step) with all bounds within the sequence's reach.

    Distances from low on, ``step`` apart, are the strip's; high is the first of them that is too far.
    """
    first, last = max(first, 0), min(last, length)
    low = aligned(max(low, -length), step, offset)
    high = low + max(0, -(-(min(high, length) - low) // step)) * step
    return start, stop, first, max(first, last), low, high, step


def _pairs(columns: Integers, until: Integers) -> Integers:
    """Return the live pairs of each strip's rows up to ``until``."""
    begin, _, first, last, low, high, step = columns
    total = np.zeros_like(begin)
    for corner, sign in ((last - low, 1), (last - high, -1), (first - low, -1), (first - high, 1)):
        total += sign * (_climb(corner - begin, step) - _climb(corner - until, step))
    return total


def _climb(top: Integers, step: Integers) -> Integers:
    """Return the sum of ceil(y / step) over 1 <= y <= top."""
    turns, rest = np.divmod(top.clip(0), step)
    return step * (turns * (turns + 1) // 2) + rest * (turns + 1)


def _spread(first: Integers, count: Integers) -> tuple[Integers, Integers]:
    """Return first[i], ..., first[i] + count[i] - 1 for every i, and the i of each."""
    owner = np.repeat(np.arange(len(count)), count)
    return np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + first[owner], owner


def _sums(values: Integers, owner: Integers, count: int) -> Integers:
    """Return the sum of the values of each owner; exact, unlike a weighted bincount."""
    found = np.zeros(count, dtype=np.int64)
    np.add.at(found, owner, values)
    return found
