"""Whose queries see whose keys: for every pair of ranks the query rows that do, and how many pairs are live.

Strips of the mask meet key spans in one pass of array arithmetic, without a loop over ranks or spans; exact for every
mask. Integers only, no process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.moves import Integers
from ringspan.kernels.mask import Mask, Span

CHUNK = 1 << 20  # entries (a strip and a key span, or a strip and a rank) that are worked out at once


@dataclass(frozen=True, eq=False)
class Meetings:
    """Whose queries see whose keys, for one mask; made by ``meetings``.

    Args:
        runs: [n, 3] int64: source * world + target, start, stop. Query rows of ``source`` that see a key of ``target``,
            also of itself; sorted, those of one pair are disjoint and do not touch.
        areas: [world, world] int64: live (query, key) pairs of source and target.
    """

    world: int
    runs: Integers
    areas: Integers

    def rows(self, source: int, target: int) -> tuple[Span, ...]:
        """Return the query rows of ``source`` that see a key of ``target``, in order."""
        pair = source * self.world + target
        first, last = np.searchsorted(self.runs[:, 0], (pair, pair + 1))
        return tuple(Span(start, stop) for start, stop in self.runs[first:last, 1:].tolist())

    @cached_property
    def visitors(self) -> Integers:
        """How many query rows of each source see keys of each target: [world, world], 0 where they are the same."""
        sizes = np.zeros(self.world * self.world, dtype=np.int64)
        np.add.at(sizes, self.runs[:, 0], self.runs[:, 2] - self.runs[:, 1])
        sizes = sizes.reshape(self.world, self.world)
        np.fill_diagonal(sizes, 0)
        return sizes

    @cached_property
    def distances(self) -> tuple[int, ...]:
        """Distances from source to target, round the ranks, at which somebody has a visitor; ascending."""
        sources, targets = np.nonzero(self.visitors)
        return tuple(np.unique((targets - sources) % self.world).tolist())


@lru_cache(maxsize=32)
def meetings(mask: Mask, layout: Layout, kv_layout: Layout, world: int, length: int) -> Meetings:
    """Find whose queries see whose keys. Pure: the same arguments give the same tables on every rank.

    Args:
        mask: of one batch row and one pattern of heads.
        layout: who holds which queries; kv_layout: who holds which keys.

    Raises:
        ValueError: if the mask does not fit ``length``.
    """
    mask.check(length)
    strips = _strips(mask, layout, world, length)
    held = sorted((*span, rank) for rank in range(world) for span in kv_layout.spans(rank, world, length))
    keys = np.array(held, dtype=np.int64).reshape(-1, 3)
    edges = _edges(strips, keys)
    counts = edges[:, 1] - edges[:, 0] + edges[:, 3] - edges[:, 2] + world * (edges[:, 2] > edges[:, 1])
    areas = np.zeros(world * world, dtype=np.int64)
    runs: list[Integers] = [np.zeros((0, 3), dtype=np.int64)]
    for chosen in _chunks(strips[:, 0], counts):
        some = [_cut(strips[chosen], edges[chosen], keys, world), _whole(strips[chosen], edges[chosen], keys, world)]
        for met in some:
            np.add.at(areas, met.pair, met.area)
        runs.append(_joined(np.concatenate([met.runs for met in some]), length))
    return Meetings(world, np.concatenate(runs), areas.reshape(world, world))


def _strips(mask: Mask, layout: Layout, world: int, length: int) -> Integers:
    """Return all strips with the rows they serve: rank, start, stop, then the strip; ranks ascend."""
    found = [
        (rank, *rows, *strip)
        for rank in range(world)
        for held in layout.spans(rank, world, length)
        for rows, strips in mask.pieces(held)
        for strip in strips
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 9)


def _edges(strips: Integers, keys: Integers) -> Integers:
    """Return which key spans, by number, the rows of each strip reach (from column 0 to 3) and see whole (1 to 2)."""
    _, start, stop, first, last, low, high, step, _ = strips.T
    begin = np.searchsorted(keys[:, 1], np.maximum(first, start + low), "right")
    end = np.searchsorted(keys[:, 0], np.minimum(last, stop - 1 + high), "left")
    end = np.maximum(begin, end)
    full = np.searchsorted(keys[:, 0], np.maximum(first, stop - 1 + low), "left")
    last_full = np.searchsorted(keys[:, 1], np.minimum(last, start + high), "right")
    full = np.where(step > 1, end, np.clip(full, begin, end))  # neighbouring rows never see a key by one class
    return np.stack([begin, full, np.clip(last_full, full, end), end], 1)


def _chunks(owner: Integers, counts: Integers) -> Iterator[slice]:
    """Cut the strips, between ranks, so that the counts of a part add up to about CHUNK."""
    edges = np.flatnonzero(np.diff(owner, prepend=-1, append=-1))
    sums = np.concatenate([[0], np.cumsum(counts)])[edges]
    begin = 0
    for number in range(1, len(edges)):
        if number + 1 == len(edges) or sums[number + 1] - sums[begin] > CHUNK:
            yield slice(int(edges[begin]), int(edges[number]))
            begin = number


def _spread(counts: Integers) -> tuple[Integers, Integers]:
    """Return, for each of counts[i] entries of line i, the line and the entry's number within it."""
    line = np.repeat(np.arange(len(counts)), counts)
    return line, np.arange(len(line)) - np.repeat(np.cumsum(counts) - counts, counts)


class _Met(NamedTuple):
    """Pairs of ranks with live pairs of rows and keys, and the runs of rows (pair, start, stop) that have any."""

    pair: Integers
    area: Integers
    runs: Integers


def _whole(strips: Integers, edges: Integers, keys: Integers, world: int) -> _Met:
    """Take the key spans that all rows of a strip see, rank by rank."""
    chosen = edges[:, 2] > edges[:, 1]
    owner, start, stop = strips[chosen, :3].T
    # Key spans by owner, then position: those of one rank within a range of numbers are neighbours.
    order = np.argsort(keys[:, 2], kind="stable")
    places = keys[order, 2] * (len(keys) + 1) + order
    sums = np.concatenate([[0], np.cumsum(keys[order, 1] - keys[order, 0])])
    ranks = np.arange(world) * (len(keys) + 1)
    first, last = (np.searchsorted(places, edges[chosen, column, None] + ranks) for column in (1, 2))
    line, target = np.nonzero(last > first)
    seen = (sums[last] - sums[first])[line, target]
    pair = owner[line] * world + target
    return _Met(pair, seen * (stop - start)[line], np.stack([pair, start[line], stop[line]], 1))


def _cut(strips: Integers, edges: Integers, keys: Integers, world: int) -> _Met:
    """Take the key spans that only some rows of a strip see, or of which they see some keys; as ``measure`` does."""
    before, after = edges[:, 1] - edges[:, 0], edges[:, 3] - edges[:, 2]
    line, count = _spread(before + after)
    keys = keys[np.where(count < before[line], edges[line, 0] + count, edges[line, 2] + count - before[line])]
    owner, start, stop, first, last, low, high, step, offset = strips[line].T
    first, last = np.maximum(first, keys[:, 0]), np.minimum(last, keys[:, 1])
    low = _aligned(np.maximum(low, first - stop + 1), step, offset)
    high = np.minimum(high, last - start) - 1
    high = high - (high + offset) % step

    def ramp(corner: Integers) -> Integers:
        """Sum of max(0, d - corner) over the distances d from low to high."""
        begin = np.maximum(low, _aligned(corner + 1, step, offset))
        count = np.maximum((high - begin) // step + 1, 0)
        return count * (begin - corner) + step * (count * (count - 1) // 2)

    area = ramp(first - stop) - ramp(first - start) - ramp(last - stop)
    # A class of distances steps over keys that are fewer than its step: each distance has rows of its own.
    single = (step > 1) & (last - first < step)
    line, count = _spread(np.where(low > high, 0, np.where(single, (high - low) // step + 1, 1)))
    far = high[line] - count * step[line]
    near = np.where(single[line], far, low[line])
    pair = owner * world + keys[:, 2]
    runs = [pair[line], np.maximum(start[line], first[line] - far), np.minimum(stop[line], last[line] - near)]
    return _Met(pair, area, np.stack(runs, 1))


def _aligned(low: Integers, step: Integers, offset: Integers) -> Integers:
    """Return the smallest distance of each class that is not below ``low``."""
    return low + (-offset - low) % step


def _joined(runs: Integers, length: int) -> Integers:
    """Sort the runs and join those of one pair that touch or overlap."""
    # One line for all pairs, each with a stretch of its own that the next one does not touch.
    shift = runs[:, 0] * (length + 1)
    order = np.argsort(runs[:, 1] + shift, kind="stable")
    runs, shift = runs[order], shift[order]
    ends = np.maximum.accumulate(runs[:, 2] + shift)
    begins = np.flatnonzero(np.concatenate([[True], (runs[:, 1] + shift)[1:] > ends[:-1]])[: len(runs)])
    stops = np.append(begins[1:], len(runs))[: len(begins)] - 1
    return np.stack([runs[begins, 0], runs[begins, 1], ends[stops] - shift[begins]], 1)
