"""Which blocks of keys a block of rows meets, as runs: all a blocked kernel needs to know of a mask.

From strips by arithmetic, vectorised over (item, block) pairs: the cost and the size are blocks x intervals, never
blocks x blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Runs:
    """CSR of runs per block: int32 on the CPU.

    ``runs`` [R, 2] are half-open, in blocks of the other side, ascending within a block and kind. Those of block b in
    ``pointers[2b] : pointers[2b + 1]`` are full (every pair is live, and the other side's blocks are whole); those in
    ``pointers[2b + 1] : pointers[2b + 2]`` hold at least one live pair per tile and need masking.
    """

    pointers: Tensor
    runs: Tensor

    @property
    def blocks(self) -> int:
        """Number of blocks of this side."""
        return (self.pointers.numel() - 1) // 2

    def tiles(self) -> Tensor:
        """Return the number of tiles per block and kind: [blocks, 2], full and masked."""
        sizes = (self.runs[:, 1] - self.runs[:, 0]).long()
        before = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return before[self.pointers.long()].diff().view(-1, 2)


def runs_of(items: Tensor, height: int, width: int, block: int, other: int) -> Runs:
    """Return the runs of every block of ``block`` rows over blocks of ``other`` columns.

    Args:
        items: int64 [I, 6]: rows [0]..[1] each see columns max([2], r + [4]) <= n < min([3], r + [5]), and see at least
            one; the items' areas are disjoint.
        height, width: rows and columns in all.
    """
    blocks = -(-height // block)
    row_start, row_stop, first, last, low, high = items.unbind(1)
    opening = row_start // block
    counts = torch.where(row_stop > row_start, (row_stop - 1) // block + 1 - opening, 0)
    item = torch.repeat_interleave(torch.arange(len(items)), counts)
    index = opening[item] + torch.arange(len(item)) - (counts.cumsum(0) - counts)[item]
    start = torch.maximum(row_start[item], index * block)
    stop = torch.minimum(row_stop[item], (index + 1) * block)
    first, last, low, high = first[item], last[item], low[item], high[item]
    # A row's columns only move up from row to row, so the first row sees the lowest and the last row the highest.
    seen = _Line(width, other, index)
    seen.add(torch.maximum(first, start + low), torch.minimum(last, stop - 1 + high))
    whole = (start == index * block) & (stop == torch.clamp((index + 1) * block, max=height))
    full_start = torch.maximum(first, stop - 1 + low)
    full_stop = torch.minimum(last, start + high)
    full = _Line(width, other, index)
    full.add(torch.where(whole, full_start, 0), torch.where(whole, full_stop, 0))
    full_runs = full.inner()
    masked_runs = _difference(seen.outer(), full_runs)
    return _csr(blocks, seen.pitch, full_runs, masked_runs)


class _Line:
    """Intervals of columns of every block laid end to end on one line, so that one sort joins those of all blocks."""

    def __init__(self, width: int, other: int, index: Tensor) -> None:
        self.other, self.index = other, index
        self.pitch = -(-width // other) + 2  # in blocks: neighbours on the line never touch
        self.spans = torch.zeros(2, 0, dtype=torch.int64)

    def add(self, start: Tensor, stop: Tensor) -> None:
        keep = start < stop
        base = self.index[keep] * self.pitch * self.other
        self.spans = torch.stack([base + start[keep], base + stop[keep]])

    def outer(self) -> Tensor:
        """Return the blocks that hold part of an interval, as joined runs [2, R]."""
        return _union(torch.stack([self.spans[0] // self.other, -(-self.spans[1] // self.other)]))

    def inner(self) -> Tensor:
        """Return the blocks that lie wholly within the joined intervals."""
        joined = _union(self.spans)
        return _union(torch.stack([-(-joined[0] // self.other), joined[1] // self.other]))


def _union(spans: Tensor) -> Tensor:
    """Join intervals [2, R] that touch or overlap; empty ones vanish."""
    spans = spans[:, spans[0] < spans[1]]
    if not spans.shape[1]:
        return spans
    spans = spans[:, spans[0].argsort(stable=True)]
    reach = spans[1].cummax(0).values
    opens = torch.cat([torch.ones(1, dtype=torch.bool), spans[0, 1:] > reach[:-1]])
    closes = torch.cat([opens[1:], torch.ones(1, dtype=torch.bool)])
    return torch.stack([spans[0, opens], reach[closes]])


def _difference(spans: Tensor, holes: Tensor) -> Tensor:
    """Return joined ``spans`` without joined ``holes``, which lie within them."""
    points = torch.cat([spans[0], holes[1], spans[1], holes[0]])
    change = torch.ones_like(points)
    change[spans.shape[1] + holes.shape[1] :] = -1
    order = points.argsort(stable=True)
    points, depth = points[order], change[order].cumsum(0)
    live = (depth[:-1] > 0) & (points[:-1] < points[1:])
    return torch.stack([points[:-1][live], points[1:][live]])


def _csr(blocks: int, pitch: int, full: Tensor, masked: Tensor) -> Runs:
    spans = torch.cat([full, masked], 1)
    kind = torch.cat([torch.zeros(full.shape[1], dtype=torch.int64), torch.ones(masked.shape[1], dtype=torch.int64)])
    index = spans[0] // pitch
    slot = 2 * index + kind
    order = slot.argsort(stable=True)  # ascending within a slot, as both lists are
    counts = torch.bincount(slot, minlength=2 * blocks)
    pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Runs(pointers.int(), (spans - index * pitch)[:, order].t().contiguous().int())
