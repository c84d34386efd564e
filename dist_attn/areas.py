"""Live pairs of one rank's queries with many key segments at once; closed forms, vectorised over segments.

With ``below(x)`` the live pairs whose key lies under x, a segment's area is a difference of two values. A strip's rows
are the same arithmetic progression for every x, cut by ``x``: each sum of minima and maxima splits at one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ringspan.dist_attn.moves import Integers
from ringspan.kernels.mask import Mask, Span

_CHUNK = 1 << 20  # cells of one (strips x points) table


def areas_by_segment(mask: Mask, queries: Sequence[Span], points: Integers) -> Integers:
    """Return live pairs of ``queries`` with keys ``points[i]`` to ``points[i + 1]``, exactly.

    Args:
        mask: without heads and rows of its own.
        queries: disjoint spans.
        points: ascending.
    """
    found = np.zeros(max(len(points) - 1, 0), dtype=np.int64)
    if not found.size:
        return found
    end = max(int(points[-1]), max((span.stop for span in queries), default=0)) + 1
    plain: list[tuple[int, ...]] = []
    stepped = False
    for held in queries:
        for rows, strips in mask.pieces(held):
            for first, last, low, high, step, _ in strips:
                if step > 1:
                    stepped = True
                else:
                    plain.append((*rows, min(first, end), min(last, end), max(low, -end), min(high, end)))
    if stepped:  # rare: exact, one segment at a time
        pairs = zip(points.tolist(), points[1:].tolist(), strict=False)
        return np.array([sum(mask.area(q, Span(*pair)) for q in queries) for pair in pairs], dtype=np.int64)
    table = np.array(plain, dtype=np.int64).reshape(-1, 6)
    at_once = max(1, _CHUNK // len(points))
    for start in range(0, len(table), at_once):
        found += np.diff(_below(table[start : start + at_once], points).sum(0))
    return found


def _below(strips: Integers, points: Integers) -> Integers:
    """Return [strips, points]: pairs of each strip whose key lies under each point.

    Row r of [a, b) sees max(first, r + low) <= k < min(last, r + high).
    """
    a, b, first, last, low, high = (column[:, None] for column in strips.T)
    stop = np.minimum(last, points[None, :])
    start_row = np.maximum(a, first - high + 1)
    stop_row = np.where(stop > first, np.minimum(b, stop - low), start_row)
    stop_row = np.maximum(stop_row, start_row)
    # Sum of min(stop, r + high): r + high up to the row where stop is less.
    turn = np.clip(stop - high, start_row, stop_row)
    ends = _ramp(start_row, turn) + (turn - start_row) * high + (stop_row - turn) * stop
    # Sum of max(first, r + low): first up to the row where r + low is more.
    turn = np.clip(first - low, start_row, stop_row)
    starts = (turn - start_row) * first + _ramp(turn, stop_row) + (stop_row - turn) * low
    return np.where(low < high, ends - starts, 0)


def _ramp(start: Integers, stop: Integers) -> Integers:
    """Return the sum of the integers from start to stop, exclusive."""
    return (stop - start) * (start + stop - 1) // 2


def halving_row(mask: Mask, queries: Sequence[Span], keys: Sequence[Span], block: int) -> int:
    """Return how many of ``keys``' rows, a multiple of ``block``, hold about half of the live pairs; 0 where none do.

    Args:
        mask, queries: as for ``areas_by_segment``.
        keys: ascending, disjoint spans, whose rows lie end to end.
        block: where a cut may be.
    """
    cuts = [range(span.start, span.stop, block) for span in keys]
    points = np.array(sorted({point for cut in cuts for point in cut} | {p for span in keys for p in span}))
    if len(points) < 3:
        return 0
    areas = areas_by_segment(mask, queries, points)
    held = np.zeros(len(points) - 1, dtype=bool)
    for span in keys:
        held |= (points[:-1] >= span.start) & (points[1:] <= span.stop)
    done = np.append(0, (areas * held).cumsum())
    rows = np.append(0, (np.diff(points) * held).cumsum())
    inner = slice(1, len(points) - 1)
    best = 1 + int(np.abs(done[inner] * 2 - done[-1]).argmin())
    return int(rows[best]) if 0 < done[best] < done[-1] else 0
