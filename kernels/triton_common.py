"""What the Triton kernels share: which item a program takes, how it loads a tile, which keys a row sees."""

from __future__ import annotations

import triton
import triton.language as tl

# A finite start for the running maximum: exp2(start - start) is 1 where exp2(-inf - -inf) would be NaN.
LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(item, count, lanes, together):
    """Return (entry of the schedule, lane) of a work item; a lane is a batch row and head.

    ``together`` lanes go through the schedule side by side, longest entries first, so that their keys stay in cache.
    """
    first = item // (count * together) * together
    size = tl.minimum(lanes - first, together)
    rest = item - first * count
    return rest // size, first + rest % size


@triton.jit
def tile(
    x,
    strides,
    batch,
    head,
    start,
    limit,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Load rows ``start`` and on of one batch row and head: [BLOCK, BLOCK_D], zero outside the tensor.

    ``x`` is a descriptor of [B, H, rows, D], or a pointer with strides (batch, row, head). CUT: rows may lie beyond
    ``limit``. Offsets are 64 bits wide: a million rows of 32 heads have 2^32 elements.
    """
    if DESCRIPTORS:
        block = x.load([batch, head, start, 0]).reshape(BLOCK, BLOCK_D)
    else:
        rows, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        x += tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[2]
        x += tl.cast(start, tl.int64) * strides[1]
        pointers = x + (tl.cast(rows, tl.int64) * strides[1])[:, None] + dims[None, :]
        if CUT:
            block = tl.load(pointers, mask=(start + rows < limit)[:, None] & (dims < D)[None, :], other=0.0)
        elif D != BLOCK_D:
            block = tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
        else:
            block = tl.load(pointers)
    return block


@triton.jit
def edges(bounds, rows, height, INTERVALS: tl.constexpr):
    """Load where the intervals of ``rows`` start and stop: two tuples of INTERVALS vectors; rows beyond see nothing."""
    starts = ()
    stops = ()
    for s in tl.static_range(INTERVALS):  # pyright: ignore[reportGeneralTypeIssues]
        starts += (tl.load(bounds + s * height + rows, mask=rows < height, other=0),)
        stops += (tl.load(bounds + (INTERVALS + s) * height + rows, mask=rows < height, other=0),)
    return starts, stops


@triton.jit
def sees(starts, stops, columns, INTERVALS: tl.constexpr, AXIS: tl.constexpr):
    """Return which row sees which column; the columns lie along AXIS of the result."""
    columns = tl.expand_dims(columns, 1 - AXIS)
    seen = (columns >= tl.expand_dims(starts[0], AXIS)) & (columns < tl.expand_dims(stops[0], AXIS))
    for s in tl.static_range(1, INTERVALS):  # pyright: ignore[reportGeneralTypeIssues]
        seen |= (columns >= tl.expand_dims(starts[s], AXIS)) & (columns < tl.expand_dims(stops[s], AXIS))
    return seen


@triton.jit
def add_tile(x, block, start, limit, row_stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add a block to rows ``start`` and on of ``x``, the base of one batch row and head; the caller alone owns them."""
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = x + (tl.cast(start + rows, tl.int64) * row_stride)[:, None] + dims[None, :]
    inside = (start + rows < limit)[:, None] & (dims < D)[None, :]
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + block, mask=inside)
