"""The gradient of the queries: one block of query rows of one head against the keys its rows see."""

from __future__ import annotations

import triton
import triton.language as tl

from ringspan.kernels.triton_common import LN2, add_tile, edges, place, sees, tile


@triton.jit
def _over(
    total,
    query,
    dout,
    level,
    delta,
    k,
    v,
    k_strides,
    v_strides,
    batch,
    group,
    starts,
    stops,
    runs,
    first,
    last,
    columns,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the key blocks of some runs to the gradient of the scaled queries."""
    for run in range(first, last):
        for block in range(tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)):
            start = block * BLOCK_N
            keys = tile(k, k_strides, batch, group, start, columns, D, BLOCK_N, BLOCK_D, MASKED, DESCRIPTORS)
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
            weights = tl.exp2(scores * scale - level[:, None])
            if MASKED:
                seen = sees(starts, stops, start + tl.arange(0, BLOCK_N), INTERVALS, 1)
                weights = tl.where(seen, weights, 0.0)
            values = tile(v, v_strides, batch, group, start, columns, D, BLOCK_N, BLOCK_D, MASKED, DESCRIPTORS)
            slopes = tl.dot(dout, tl.trans(values), input_precision=PRECISION)
            slopes = weights * (slopes - delta[:, None])
            total = tl.dot(slopes.to(keys.dtype), keys, total, input_precision=PRECISION)
    return total


@triton.jit
def _block(
    item,
    tensors,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
    height,
    padded,
    columns,
    heads,
    group_size,
    count,
    lanes,
    together,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    q, k, v, dout, dq, levels, deltas, bounds, blocks, pointers, runs = tensors
    entry, lane = place(item, count, lanes, together)  # pyright: ignore[reportGeneralTypeIssues]
    batch, head = lane // heads, lane % heads
    group = head // group_size
    start = tl.load(blocks + entry) * BLOCK_M
    first, middle = tl.load(pointers + 2 * entry), tl.load(pointers + 2 * entry + 1)
    last = tl.load(pointers + 2 * entry + 2)
    rows = start + tl.arange(0, BLOCK_M)
    query = tile(q, q_strides, batch, head, start, height, D, BLOCK_M, BLOCK_D, True, False)
    slope = tile(dout, dout_strides, batch, head, start, height, D, BLOCK_M, BLOCK_D, True, False)
    level = tl.load(levels + tl.cast(lane, tl.int64) * padded + rows)
    delta = tl.load(deltas + tl.cast(lane, tl.int64) * padded + rows)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = _over(
        total, query, slope, level, delta, k, v, k_strides, v_strides, batch, group, (), (), runs, first, middle,
        columns, scale, D, BLOCK_D, BLOCK_N, INTERVALS, False, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    starts, stops = edges(bounds, rows, height, INTERVALS)
    total = _over(
        total, query, slope, level, delta, k, v, k_strides, v_strides, batch, group, starts, stops, runs, middle, last,
        columns, scale, D, BLOCK_D, BLOCK_N, INTERVALS, True, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    dq += tl.cast(batch, tl.int64) * dq_strides[0] + tl.cast(head, tl.int64) * dq_strides[2]
    add_tile(dq, total * (scale * LN2), start, height, dq_strides[1], D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["height", "columns", "heads", "group_size", "count", "lanes", "together", "items"])
def query_kernel(
    q,
    k,
    v,
    dout,
    dq,
    levels,
    deltas,
    bounds,
    blocks,
    pointers,
    runs,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    dout_batch,
    dout_row,
    dout_head,
    dq_batch,
    dq_row,
    dq_head,
    height,
    padded,
    columns,
    heads,
    group_size,
    count,
    lanes,
    together,
    items,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to dq from ``count`` scheduled blocks of query rows on ``lanes`` batch rows and query heads.

    Args:
        q, dout: [B, M, H, D]; k, v: [B, N, G, D], descriptors of their [B, G, N, D] where DESCRIPTORS.
        dq: [B, M, H, D] fp32, added to.
        levels, deltas: fp32 [B, H, padded] contiguous, as triton_merge.prepare makes them; padded: M rounded up to
            what any block needs.
        bounds: int32 [2, INTERVALS, M]; blocks, pointers, runs: the schedule (triton_schedule.Schedule).
        height: M; columns: N; heads: H; group_size: H / G; scale: times log2(e).
    """
    q_strides, k_strides = (q_batch, q_row, q_head), (k_batch, k_row, k_head)
    v_strides, dout_strides = (v_batch, v_row, v_head), (dout_batch, dout_row, dout_head)
    dq_strides = (dq_batch, dq_row, dq_head)
    tensors = (q, k, v, dout, dq, levels, deltas, bounds, blocks, pointers, runs)
    if PERSISTENT:
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            _block(
                item, tensors, q_strides, k_strides, v_strides, dout_strides, dq_strides, height, padded, columns,
                heads, group_size, count, lanes, together, scale,
                D, BLOCK_D, BLOCK_M, BLOCK_N, INTERVALS, DESCRIPTORS, PRECISION,
            )  # fmt: skip
    else:
        _block(
            tl.program_id(0), tensors, q_strides, k_strides, v_strides, dout_strides, dq_strides, height, padded,
            columns, heads, group_size, count, lanes, together, scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, INTERVALS, DESCRIPTORS, PRECISION,
        )  # fmt: skip
