"""Per row, the intervals of local columns that it sees: what a kernel compares column numbers with.

Local memory holds spans of positions laid end to end, so an interval of positions is an interval of local columns,
whatever was cut out between the spans.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.kernels.masks.span import END, Span
from ringspan.kernels.masks.strips import Strip

_FEW = 8  # spans up to which a sum over them is faster than a search


class Piece(NamedTuple):
    """Rows under one rule, and their strips; positions, not local numbers."""

    rows: Span
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class Side:
    """Spans of one side and where they lie in local memory, end to end from ``base``."""

    spans: tuple[Span, ...]
    base: int

    @cached_property
    def offsets(self) -> list[int]:
        """Where each span begins."""
        return list(accumulate((span.size for span in self.spans), initial=self.base))[:-1]

    @cached_property
    def starts(self) -> list[int]:
        """The first position of each span."""
        return [span.start for span in self.spans]

    @property
    def stop(self) -> int:
        """Where the last span ends."""
        return self.base + sum(span.size for span in self.spans)

    def parts(self, span: Span) -> Iterator[tuple[Span, int]]:
        """Yield what is held of ``span``: (part, local minus global)."""
        index = max(bisect_right(self.starts, span.start) - 1, 0)
        while index < len(self.spans) and self.spans[index].start < span.stop:
            part = self.spans[index].intersect(span)
            if part:
                yield part, self.offsets[index] - self.spans[index].start
            index += 1

    def below(self, positions: Tensor) -> Tensor:
        """Return the local place of each position: how many held positions, counted from the base, are smaller."""
        if len(self.spans) <= _FEW:
            place = torch.full_like(positions, self.base)
            for span in self.spans:
                place += (positions - span.start).clamp_(0, span.size)
            return place
        starts, sizes, offsets = torch.tensor(
            [self.starts, [span.size for span in self.spans], self.offsets], device=positions.device
        )
        index = torch.searchsorted(starts, positions.contiguous(), right=True) - 1
        safe = index.clamp(min=0)
        inside = torch.minimum(positions - starts[safe], sizes[safe])
        return torch.where(index < 0, self.base, offsets[safe] + inside)


@dataclass(frozen=True)
class Class:
    """The rows and columns of one residue class (all of them where nothing is dilated), in the class's own numbers."""

    pieces: tuple[Piece, ...]
    rows: Side
    columns: Side


def bounds_of(each: Class, depth: int, device: torch.device) -> Tensor:
    """Return int32 [2, depth, rows]: the columns that each row of a class sees, up to ``depth`` intervals of them."""
    count = each.rows.stop - each.rows.base
    bounds = torch.zeros(2, depth, count, dtype=torch.int32, device=device)
    table, starts, places, sizes = [], [], [], []
    for piece in each.pieces:
        strips = [strip[:4] for strip in piece.strips]
        strips += [(0, 0, -END, END)] * (depth - len(strips))
        for part, down in each.rows.parts(piece.rows):
            table.append(strips)
            starts.append(part.start)
            places.append(part.start + down - each.rows.base)
            sizes.append(part.size)
    if not table:
        return bounds
    counts = torch.tensor(sizes, device=device)
    spread = lambda x: torch.repeat_interleave(torch.tensor(x, device=device), counts)  # noqa: E731
    step = torch.arange(int(sum(sizes)), device=device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    position, place = spread(starts) + step, spread(places) + step
    for slot in range(depth):
        first, last, low, high = (spread([strips[slot][i] for strips in table]) for i in range(4))
        start = each.columns.below(torch.maximum(first, position + low))
        stop = each.columns.below(torch.minimum(last, position + high))
        live = start < stop
        bounds[0, slot, place] = torch.where(live, start, 0).int()
        bounds[1, slot, place] = torch.where(live, stop, 0).int()
    return bounds
