"""One kernel call's integers: which local rows meet which local columns, whatever the mask and however the spans lie.

A ``Work`` is a mask over a table of query spans and a table of key spans. Its sweeps say it in local coordinates:
strips for kernels that compute rectangles and bands, bounds per row and runs per block for kernels that mask by
comparing column numbers. No kernel ever learns which mask it computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.kernels.bounds import Class, Piece, Side, bounds_of
from ringspan.kernels.mask import Mask
from ringspan.kernels.masks.span import END, Span
from ringspan.kernels.masks.strips import Strip
from ringspan.kernels.runs import Runs, runs_of


class Item(NamedTuple):
    """Local rows and the strip of local columns that they see; every row sees at least one."""

    rows: Span
    strip: Strip


@dataclass(frozen=True, eq=False)
class Sweep:
    """One pass over rows and columns in an order in which every row sees a few intervals of columns.

    ``rows`` and ``keys`` are the local rows and columns in the order of this sweep (int64), or None for as they lie;
    ``items`` and ``bounds`` speak of that order.

    Args:
        height, width: rows and columns.
        items: disjoint areas, strips with step 1.
        classes: what the bounds are made of.
    """

    rows: Tensor | None
    keys: Tensor | None
    height: int
    width: int
    items: tuple[Item, ...]
    classes: tuple[Class, ...] = field(repr=False)
    _runs: dict[tuple[bool, int, int], Runs] = field(default_factory=dict, repr=False)

    @cached_property
    def bounds(self) -> Tensor:
        """Row m sees columns ``bounds[0, s, m] <= n < bounds[1, s, m]``: int32 [2, S, M] on the CPU, disjoint over s.

        An empty interval is 0, 0.
        """
        return self.bounds_on(torch.device("cpu"))

    def bounds_on(self, device: torch.device) -> Tensor:
        """Return the bounds, worked out on ``device``."""
        depth = max(len(piece.strips) for each in self.classes for piece in each.pieces)
        return torch.cat([bounds_of(each, depth, device) for each in self.classes], 2)

    def row_runs(self, block_rows: int, block_columns: int) -> Runs:
        """Return for each block of rows the blocks of columns it meets; see ``Runs``."""
        return self._cached(False, block_rows, block_columns)

    def column_runs(self, block_rows: int, block_columns: int) -> Runs:
        """Return for each block of columns the blocks of rows that meet it; full ones lie wholly within the rows."""
        return self._cached(True, block_rows, block_columns)

    def _cached(self, turned: bool, block_rows: int, block_columns: int) -> Runs:
        key = (turned, block_rows, block_columns)
        if key not in self._runs:
            if turned:
                self._runs[key] = runs_of(self._turned, self.width, self.height, block_columns, block_rows)
            else:
                self._runs[key] = runs_of(self._table, self.height, self.width, block_rows, block_columns)
        return self._runs[key]

    @cached_property
    def _table(self) -> Tensor:
        rows = [(*item.rows, *item.strip[:4]) for item in self.items]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 6)

    @cached_property
    def _turned(self) -> Tensor:
        """The same items seen from the columns: column n is seen by rows n - high < m <= n - low."""
        start, stop, first, last, low, high = self._table.unbind(1)
        lowest = torch.maximum(first, start + low)
        highest = torch.minimum(last, stop - 1 + high)
        return torch.stack([lowest, highest, start, stop, 1 - high, 1 - low], 1)


@dataclass(frozen=True)
class Work:
    """A mask over the query spans and key spans of one kernel call; made by ``work``."""

    mask: Mask
    queries: tuple[Span, ...]
    keys: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """Local query rows, M."""
        return sum(span.size for span in self.queries)

    @property
    def columns(self) -> int:
        """Local key rows, N."""
        return sum(span.size for span in self.keys)

    @cached_property
    def area(self) -> int:
        """Live (query, key) pairs."""
        return sum(self.mask.area(q, k) for q in self.queries for k in self.keys)

    @cached_property
    def sweeps(self) -> tuple[Sweep, ...]:
        """The passes that together compute every live pair once; none where nothing is live."""
        found: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        row = 0
        for held in self.queries:
            for piece, strips in self.mask.pieces(held):
                sorts = sorted({(strip.step, strip.offset) for strip in strips})
                for sort in sorts:
                    mine = tuple(strip for strip in strips if (strip.step, strip.offset) == sort)
                    found[sort].append(Piece(piece, mine))
            row += held.size
        sweeps = (_sweep(self.queries, self.keys, pieces, *sort) for sort, pieces in sorted(found.items()))
        return tuple(sweep for sweep in sweeps if sweep.items)


@lru_cache(maxsize=1024)
def work(mask: Mask, queries: tuple[Span, ...], keys: tuple[Span, ...]) -> Work:
    """Return the (cached) work of a mask without heads and rows of its own over ascending, disjoint spans."""
    return Work(mask, queries, keys)


def _sweep(queries: tuple[Span, ...], keys: tuple[Span, ...], pieces: Sequence[Piece], step: int, offset: int) -> Sweep:
    """Lay one kind of strips out in local coordinates, residue class by residue class of ``step``."""
    items: list[Item] = []
    classes: list[Class] = []
    row = column = 0
    for residue in range(step):
        rows = Side(_members(queries, residue, step), row)
        columns = Side(_members(keys, residue - offset, step), column)
        mine = tuple(pieces) if step == 1 else tuple(_of_class(piece, residue, step, offset) for piece in pieces)
        items += _items(mine, rows, columns)
        classes.append(Class(mine, rows, columns))
        row, column = rows.stop, columns.stop
    order = (None, None) if step == 1 else (_order(queries, step, 0), _order(keys, step, offset))
    return Sweep(*order, row, column, tuple(items), tuple(classes))


def _members(spans: Sequence[Span], residue: int, step: int) -> tuple[Span, ...]:
    """Return the numbers i for which residue + step * i lies in each span."""
    if step == 1 and residue == 0:
        return tuple(spans)
    each = (Span(-((residue - span.start) // step), -((residue - span.stop) // step)) for span in spans)
    return tuple(span for span in each if span.size)


def _order(spans: Sequence[Span], step: int, offset: int) -> Tensor:
    """Return the local places of the held positions, sorted by the residue class of position + offset."""
    positions = torch.cat([torch.arange(*span) for span in spans]) if spans else torch.zeros(0, dtype=torch.int64)
    return ((positions + offset) % step).argsort(stable=True)


def _of_class(piece: Piece, residue: int, step: int, offset: int) -> Piece:
    """Write a piece in class coordinates: row residue + step * i, column residue - offset + step * j."""
    rows = Span(-((residue - piece.rows.start) // step), -((residue - piece.rows.stop) // step))
    up = lambda x: x if abs(x) >= END else -(-x // step)  # noqa: E731
    strips = []
    for strip in piece.strips:
        first, last = (x if abs(x) >= END else up(x + offset - residue) for x in (strip.first, strip.last))
        low, high = (x if abs(x) >= END else up(x + offset) for x in (strip.low, strip.high))
        strips.append(Strip(first, last, low, high))
    return Piece(rows, tuple(strips))


def _items(pieces: Sequence[Piece], rows: Side, columns: Side) -> list[Item]:
    items: list[Item] = []
    for piece in pieces:
        for part, down in rows.parts(piece.rows):
            for strip in piece.strips:
                items += _local(part, down, strip, columns)
    return items


def _local(part: Span, down: int, strip: Strip, columns: Side) -> Iterator[Item]:
    """Yield a strip over rows ``part`` in local coordinates, one item per span of keys that it meets."""
    first, last, low, high = strip[:4]
    seen = Span(max(first, part.start + low), min(last, part.stop - 1 + high))
    if seen.start >= seen.stop or low >= high:
        return
    for keys, right in columns.parts(seen):
        start, stop = max(first, keys.start), min(last, keys.stop)
        live = Span(max(part.start, start - high + 1), min(part.stop, stop - low))
        if live.start < live.stop:
            shift = right - down
            local = Strip(
                start + right,
                stop + right,
                low if abs(low) >= END else low + shift,
                high if abs(high) >= END else high + shift,
            )
            yield Item(Span(live.start + down, live.stop + down), local)
