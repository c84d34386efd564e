"""The forward kernel: one block of query rows of one head against the keys its rows see."""

from __future__ import annotations

import triton
import triton.language as tl

from ringspan.kernels.triton_common import LN2, LOG2E, LOWEST, edges, place, sees, tile


@triton.jit
def _over(
    state,
    query,
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
    """Carry (sum of weighted values, sum of weights, maximum in base 2) over the key blocks of some runs."""
    total, norm, peak = state
    for run in range(first, last):
        for block in range(tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)):
            start = block * BLOCK_N
            keys = tile(k, k_strides, batch, group, start, columns, D, BLOCK_N, BLOCK_D, MASKED, DESCRIPTORS)
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
            if MASKED:
                seen = sees(starts, stops, start + tl.arange(0, BLOCK_N), INTERVALS, 1)
                scores = tl.where(seen, scores * scale, -float("inf"))
                higher = tl.maximum(peak, tl.max(scores, 1))
                weights = tl.exp2(scores - higher[:, None])
            else:  # scaled after the maximum, so that the exponent is one fused multiply-add
                higher = tl.maximum(peak, tl.max(scores, 1) * scale)
                weights = tl.exp2(scores * scale - higher[:, None])
            decay = tl.exp2(peak - higher)
            norm = norm * decay + tl.sum(weights, 1)
            total = total * decay[:, None]
            values = tile(v, v_strides, batch, group, start, columns, D, BLOCK_N, BLOCK_D, MASKED, DESCRIPTORS)
            total = tl.dot(weights.to(values.dtype), values, total, input_precision=PRECISION)
            peak = higher
    return total, norm, peak


@triton.jit
def _begin(
    out_pointers, lse_pointers, inside, valid, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, FRESH: tl.constexpr
):
    """Return the state of no keys, or that of the result that stands there: out with weight 1 at its lse.

    Going on from it is the guarded merge: a row without a key so far (lse -inf) has weight 0 at the finite start.
    """
    if FRESH:
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        norm, peak = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], LOWEST, tl.float32)
    else:
        level = tl.load(lse_pointers, mask=valid, other=-float("inf"))
        total = tl.load(out_pointers, mask=inside, other=0.0)
        empty = level == -float("inf")
        norm, peak = tl.where(empty, 0.0, 1.0), tl.where(empty, LOWEST, level * LOG2E)
    return total, norm, peak


@triton.jit
def _block(
    item,
    tensors,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    lse_strides,
    height,
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
    ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    q, k, v, out, lse, bounds, blocks, pointers, runs = tensors
    entry, lane = place(item, count, lanes, together)  # pyright: ignore[reportGeneralTypeIssues]
    batch, head = lane // heads, lane % heads
    group = head // group_size
    start = tl.load(blocks + entry) * BLOCK_M
    first, middle = tl.load(pointers + 2 * entry), tl.load(pointers + 2 * entry + 1)
    last = tl.load(pointers + 2 * entry + 2)
    rows = start + tl.arange(0, BLOCK_M)
    query = tile(q, q_strides, batch, head, start, height, D, BLOCK_M, BLOCK_D, True, False)

    valid, dims, wide = rows < height, tl.arange(0, BLOCK_D), tl.cast(rows, tl.int64)
    inside = valid[:, None] & (dims < D)[None, :]
    wide_batch, wide_head = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
    lse_pointers = lse + wide_batch * lse_strides[0] + wide_head * lse_strides[2] + wide * lse_strides[1]
    out_pointers = out + wide_batch * out_strides[0] + wide_head * out_strides[2]
    out_pointers = out_pointers + (wide * out_strides[1])[:, None] + dims[None, :]
    state = _begin(out_pointers, lse_pointers, inside, valid, BLOCK_M, BLOCK_D, not ACCUMULATE)
    state = _over(
        state, query, k, v, k_strides, v_strides, batch, group, (), (), runs, first, middle, columns, scale,
        D, BLOCK_D, BLOCK_N, INTERVALS, False, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    starts, stops = edges(bounds, rows, height, INTERVALS)
    state = _over(
        state, query, k, v, k_strides, v_strides, batch, group, starts, stops, runs, middle, last, columns, scale,
        D, BLOCK_D, BLOCK_N, INTERVALS, True, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    # A row without a key ends with out 0 and lse -inf.
    total, norm, peak = state
    safe = tl.where(norm > 0, norm, 1.0)
    tl.store(out_pointers, total * (1.0 / safe)[:, None], mask=inside)
    tl.store(lse_pointers, tl.where(norm > 0, (peak + tl.log2(safe)) * LN2, -float("inf")), mask=valid)


@triton.jit(do_not_specialize=["height", "columns", "heads", "group_size", "count", "lanes", "together", "items"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    out_batch,
    out_row,
    out_head,
    lse_batch,
    lse_row,
    lse_head,
    height,
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
    ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend from ``count`` scheduled blocks of query rows on ``lanes`` batch rows and query heads.

    Args:
        q: [B, M, H, D]; k, v: [B, N, G, D], descriptors of their [B, G, N, D] where DESCRIPTORS; out: [B, M, H, D]
            and lse [B, M, H], fp32.
        bounds: int32 [2, INTERVALS, M]; blocks, pointers, runs: the schedule (triton_schedule.Schedule).
        height: M; columns: N; heads: H; group_size: H / G; scale: times log2(e), positive.
    """
    q_strides, k_strides = (q_batch, q_row, q_head), (k_batch, k_row, k_head)
    v_strides, out_strides = (v_batch, v_row, v_head), (out_batch, out_row, out_head)
    lse_strides = (lse_batch, lse_row, lse_head)
    tensors = (q, k, v, out, lse, bounds, blocks, pointers, runs)
    if PERSISTENT:
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            _block(
                item, tensors, q_strides, k_strides, v_strides, out_strides, lse_strides, height, columns, heads,
                group_size, count, lanes, together, scale,
                D, BLOCK_D, BLOCK_M, BLOCK_N, INTERVALS, ACCUMULATE, DESCRIPTORS, PRECISION,
            )  # fmt: skip
    else:
        _block(
            tl.program_id(0), tensors, q_strides, k_strides, v_strides, out_strides, lse_strides, height, columns,
            heads, group_size, count, lanes, together, scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, INTERVALS, ACCUMULATE, DESCRIPTORS, PRECISION,
        )  # fmt: skip
