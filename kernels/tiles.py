"""From strips to tiles: what a CPU operator computes in one call.

An item's strip is cut where its edges begin and end to run along a diagonal. Between the cuts its rows are taken in
blocks: the columns that every row of a block sees are one full tile, and what is left of it along the edges is computed
in smaller blocks of rows, under a mask. Tiles of one shape are listed together, so that a kernel can compute them as
one batch: the blocks of a window, the groups of S2, a thousand short documents. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ringspan.kernels.masks.span import END, Span
from ringspan.kernels.masks.strips import Strip

BLOCK = 256  # rows of a full tile beside an edge
STEP = 64  # rows of a tile along an edge
TRIANGLE = 4096  # rows from which the operator's own causal form visits less in vain than it costs to cut


class Shape(NamedTuple):
    """A tile's extent and edges, counted within the tile.

    Row i sees columns ``max(0, i + low) <= c < min(width, i + high)`` that are not in ``hole``; -END and END stand for
    no edge. ``causal``: a square, low -END and high 1, that is left to the operator to cut.
    """

    rows: int
    width: int
    low: int = -END
    high: int = END
    hole: Span = Span(0, 0)
    causal: bool = False

    @property
    def keys(self) -> int:
        """Columns that are computed with."""
        return self.width - self.hole.size

    @property
    def full(self) -> bool:
        """Whether every row sees every column that is computed with."""
        return self.low == -END and self.high == END

    @property
    def visited(self) -> int:
        """Pairs that are computed; of a causal tile the live ones."""
        return self.rows * (self.rows + 1) // 2 if self.causal else self.rows * self.keys


class Tiles(NamedTuple):
    """Tiles of one shape: tile i starts at row ``rows[i]`` and column ``columns[i]``.

    Rows ascend and are disjoint. Columns ascend and are disjoint too, or are those of a window: equal steps.
    """

    shape: Shape
    rows: list[int]
    columns: list[int]

    @property
    def visited(self) -> int:
        """Pairs that are computed."""
        return self.shape.visited * len(self.rows)


def tiles_of(items: Iterable[tuple[Span, Strip]], triangle: int | None = None) -> tuple[Tiles, ...]:
    """Cut items (rows and the strip of columns that they see) into tiles; every live pair lies in exactly one.

    Args:
        items: rows and strips with disjoint areas; every row sees at least one column.
        triangle: rows from which a triangle stays whole; None: ``TRIANGLE``.
    """
    least = TRIANGLE if triangle is None else triangle
    found: list[Tiles] = []
    for rows, strip in join(items):
        for piece, part in _between_knees(rows, strip):
            found += _tiles(piece, part, least)
    return tuple(_together(found))


def canonical(rows: Span, strip: Strip) -> Strip:
    """Return the one strip that shows these rows the same columns and says nothing it need not.

    Edges that do not bind are -END or END; ``first`` and ``last`` are the lowest start and the highest stop.
    """
    low, high = strip.low, strip.high
    first, last = max(strip.first, rows.start + low), min(strip.last, rows.stop - 1 + high)
    if max(strip.first, rows.stop - 1 + low) == first:
        low = -END
    if min(strip.last, rows.start + high) == last:
        high = END
    return Strip(first, last, low, high)


def join(items: Iterable[tuple[Span, Strip]]) -> list[tuple[Span, Strip]]:
    """Join items that are neighbours in memory, so that tiles are as large as they can be.

    Two strips of the same rows become one where the first ends as the second starts; then two strips of adjoining rows
    become one where one strip says both. A zigzag rank's own two chunks are so a single causal item.
    """
    beside: list[tuple[Span, Strip]] = []
    for rows, strip in items:
        strip = canonical(rows, strip)
        if beside and beside[-1][0] == rows and (wider := _beside(rows, beside[-1][1], strip)):
            beside[-1] = (rows, wider)
        else:
            beside.append((rows, strip))
    joined: list[tuple[Span, Strip]] = []
    above: list[int] = []  # those of ``joined`` that end where the rows at hand start
    ahead: list[int] = []  # those of the rows at hand
    for rows, strip in beside:
        if ahead and joined[ahead[-1]][0].stop <= rows.start:
            above, ahead = [i for i in ahead if joined[i][0].stop == rows.start], []
        for index in above:
            taller = _below(*joined[index], rows, strip) if joined[index][0].stop == rows.start else None
            if taller:
                joined[index] = (Span(joined[index][0].start, rows.stop), taller)
                ahead.append(index)
                break
        else:
            ahead.append(len(joined))
            joined.append((rows, strip))
    return joined


def _beside(rows: Span, left: Strip, right: Strip) -> Strip | None:
    """Return the union of two strips of the same rows where, for every row, one stops as the other starts."""
    if left.first > right.first:
        left, right = right, left
    flat = left.high == END and right.low == -END and left.last == right.first
    # Along a diagonal: no row may stop short of it on the left, or start beyond it on the right.
    slanted = (
        left.high == right.low and left.last == rows.stop - 1 + left.high and right.first == rows.start + right.low
    )
    if not flat and not slanted:
        return None
    return canonical(rows, Strip(left.first, right.last, left.low, right.high))


def _below(upper: Span, above: Strip, lower: Span, below: Strip) -> Strip | None:
    """Return one strip that says both, for adjoining rows, or None."""
    low, high = max(above.low, below.low), min(above.high, below.high)  # the edge that binds, where only one does
    whole = Strip(min(above.first, below.first), max(above.last, below.last), low, high)
    if canonical(upper, whole) == above and canonical(lower, whole) == below:
        return canonical(Span(upper.start, lower.stop), whole)
    return None


def _between_knees(rows: Span, strip: Strip) -> Iterator[tuple[Span, Strip]]:
    """Cut where an edge leaves the diagonal: in a piece, each edge runs along one for all rows or for none."""
    knees = {strip.first - strip.low, strip.last - strip.high + 1}
    cuts = [rows.start, *sorted(knee for knee in knees if rows.start < knee < rows.stop), rows.stop]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        piece = Span(start, stop)
        yield piece, canonical(piece, strip)


def _tiles(rows: Span, strip: Strip, triangle: int) -> Iterator[Tiles]:
    first, last, low, high = strip[:4]
    if low == -END and high == END:
        yield Tiles(Shape(rows.size, last - first), [rows.start], [first])
    elif low == -END and rows.size >= triangle:
        square = rows.start + high - 1
        if first < square:
            yield Tiles(Shape(rows.size, square - first), [rows.start], [first])
        yield Tiles(Shape(rows.size, rows.size, high=1, causal=True), [rows.start], [square])
    else:
        yield from _blocks(rows, strip)


def _blocks(rows: Span, strip: Strip) -> Iterator[Tiles]:
    """Cut rows whose edges bind throughout into blocks, each a full tile and the steps of its edges."""
    width = strip.high - strip.low if strip.low > -END and strip.high < END else END
    step = min(STEP, max(16, width // 4))
    size = BLOCK if width >= 2 * BLOCK else step
    for start in range(rows.start, rows.stop, size):
        block = Span(start, min(start + size, rows.stop))
        middle = Span(max(strip.first, block.stop - 1 + strip.low), min(strip.last, block.start + strip.high))
        if block.size > 1:  # the row that sees no more than the middle keeps a column at its one edge
            middle = Span(middle.start + (strip.high == END), middle.stop - (strip.low == -END))
        if middle.size >= size:
            yield Tiles(Shape(block.size, middle.size), [block.start], [middle.start])
        else:
            middle = None
        for top in range(block.start, block.stop, step):
            yield from _edges(Span(top, min(top + step, block.stop)), strip, middle)


def _edges(rows: Span, strip: Strip, middle: Span | None) -> Iterator[Tiles]:
    """Yield the tile of some rows of a block without the columns ``middle`` that all rows of the block see."""
    first, last, low, high = canonical(rows, strip)[:4]
    hole = Span(0, 0)
    if middle:
        if middle.start <= first:
            first, middle = middle.stop, None
        elif last <= middle.stop:
            last, middle = middle.start, None
    if middle:
        hole = Span(middle.start - first, middle.stop - first)
    shift = rows.start - first
    low = low if low == -END else low + shift
    high = high if high == END else high + shift
    if first < last:
        yield Tiles(Shape(rows.size, last - first, low, high, hole), [rows.start], [first])


def _together(found: Iterable[Tiles]) -> list[Tiles]:
    """List tiles of one shape together where their rows ascend, disjoint, and so do their columns or in equal steps."""
    result: list[Tiles] = []
    latest: dict[Shape, int] = {}
    for tiles in found:
        shape, index = tiles.shape, latest.get(tiles.shape)
        if index is not None and _follows(result[index], tiles):
            result[index].rows.extend(tiles.rows)
            result[index].columns.extend(tiles.columns)
            continue
        latest[shape] = len(result)
        result.append(tiles)
    return result


def _follows(before: Tiles, tiles: Tiles) -> bool:
    shape = before.shape
    row, column = tiles.rows[0] - before.rows[-1], tiles.columns[0] - before.columns[-1]
    if row < shape.rows or column <= 0:
        return False
    if len(before.rows) == 1:
        return True
    even = before.columns[-1] - before.columns[-2]
    if even < shape.width:  # windows that overlap
        return column == even and row == before.rows[-1] - before.rows[-2]
    return column >= shape.width
