"""The gradients of keys and values: one block of keys of one KV head against the rows of its query heads that see it.

No atomics: a program alone owns what it adds to. A block that far more rows see than others (sink tokens) is cut into
slices, each with its own place in a workspace; a second kernel adds them up in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringspan.kernels.triton_common import LN2, add_tile, edges, place, sees, tile


@triton.jit
def _over(
    state,
    keys,
    values,
    q,
    dout,
    levels,
    deltas,
    bounds,
    q_strides,
    dout_strides,
    batch,
    group,
    group_size,
    runs,
    first,
    last,
    height,
    padded,
    key_rows,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INTERVALS: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the row blocks of some runs of one query head; every tile is transposed: keys down, rows across."""
    dk, dv = state
    for run in range(first, last):
        begin, end = tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)
        turn, block = 0, begin
        for _ in range(0, (end - begin) * group_size):
            head, start = group * group_size + turn, block * BLOCK_M
            rows = start + tl.arange(0, BLOCK_M)
            queries = tile(q, q_strides, batch, head, start, height, D, BLOCK_M, BLOCK_D, MASKED, DESCRIPTORS)
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            offset = tl.cast(turn, tl.int64) * padded + start
            level = tl.load(levels + offset + tl.arange(0, BLOCK_M))
            weights = tl.exp2(scores * scale - level[None, :])
            if MASKED:
                starts, stops = edges(bounds, rows, height, INTERVALS)
                weights = tl.where(sees(starts, stops, key_rows, INTERVALS, 0), weights, 0.0)
            slopes = tile(dout, dout_strides, batch, head, start, height, D, BLOCK_M, BLOCK_D, MASKED, DESCRIPTORS)
            dv = tl.dot(weights.to(slopes.dtype), slopes, dv, input_precision=PRECISION)
            shares = tl.dot(values, tl.trans(slopes), input_precision=PRECISION)
            shares = weights * (shares - tl.load(deltas + offset + tl.arange(0, BLOCK_M))[None, :])
            dk = tl.dot(shares.to(queries.dtype), queries, dk, input_precision=PRECISION)
            # One loop over heads and blocks: a second one inside would cost registers and refill the pipeline.
            block += 1
            turn = tl.where(block == end, turn + 1, turn)
            block = tl.where(block == end, begin, block)
    return dk, dv


@triton.jit
def _block(
    item,
    tensors,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    height,
    padded,
    columns,
    groups,
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
    q, k, v, dout, dk, dv, parts, levels, deltas, bounds, blocks, slots, pointers, runs = tensors
    entry, lane = place(item, count, lanes, together)  # pyright: ignore[reportGeneralTypeIssues]
    batch, group = lane // groups, lane % groups
    start = tl.load(blocks + entry) * BLOCK_N
    first, middle = tl.load(pointers + 2 * entry), tl.load(pointers + 2 * entry + 1)
    last = tl.load(pointers + 2 * entry + 2)
    key_rows = start + tl.arange(0, BLOCK_N)
    keys = tile(k, k_strides, batch, group, start, columns, D, BLOCK_N, BLOCK_D, True, False)
    values = tile(v, v_strides, batch, group, start, columns, D, BLOCK_N, BLOCK_D, True, False)

    # A whole block starts from what stands in dk and dv (adding that at the end costs registers and spills), a slice
    # from zero in its slot of the workspace.
    slot = tl.load(slots + entry)
    whole = slot < 0
    wide_batch, wide_group = tl.cast(batch, tl.int64), tl.cast(group, tl.int64)
    part = (tl.cast(slot, tl.int64) * lanes + lane) * (2 * BLOCK_N * BLOCK_D)
    dk += wide_batch * dk_strides[0] + wide_group * dk_strides[2] + tl.cast(start, tl.int64) * dk_strides[1]
    dv += wide_batch * dv_strides[0] + wide_group * dv_strides[2] + tl.cast(start, tl.int64) * dv_strides[1]
    dk, dk_row = tl.where(whole, dk, parts + part), tl.where(whole, dk_strides[1], BLOCK_D)
    dv, dv_row = tl.where(whole, dv, parts + part + BLOCK_N * BLOCK_D), tl.where(whole, dv_strides[1], BLOCK_D)
    rows, dims = tl.cast(tl.arange(0, BLOCK_N), tl.int64), tl.arange(0, BLOCK_D)
    dk_pointers = dk + (rows * dk_row)[:, None] + dims[None, :]
    dv_pointers = dv + (rows * dv_row)[:, None] + dims[None, :]
    inside = (key_rows < columns)[:, None] & (dims < D)[None, :]
    before = inside & whole
    factor = scale * LN2
    state = tl.load(dk_pointers, mask=before, other=0.0) / factor, tl.load(dv_pointers, mask=before, other=0.0)

    offset = tl.cast(lane, tl.int64) * group_size * padded
    state = _over(
        state, keys, values, q, dout, levels + offset, deltas + offset, bounds, q_strides, dout_strides, batch,
        group, group_size, runs, first, middle, height, padded, key_rows, scale,
        D, BLOCK_D, BLOCK_M, INTERVALS, False, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    state = _over(
        state, keys, values, q, dout, levels + offset, deltas + offset, bounds, q_strides, dout_strides, batch,
        group, group_size, runs, middle, last, height, padded, key_rows, scale,
        D, BLOCK_D, BLOCK_M, INTERVALS, True, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    tl.store(dk_pointers, state[0] * factor, mask=inside)
    tl.store(dv_pointers, state[1], mask=inside)


@triton.jit(do_not_specialize=["height", "columns", "groups", "group_size", "count", "lanes", "together", "items"])
def keys_kernel(
    q,
    k,
    v,
    dout,
    dk,
    dv,
    parts,
    levels,
    deltas,
    bounds,
    blocks,
    slots,
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
    dk_batch,
    dk_row,
    dk_head,
    dv_batch,
    dv_row,
    dv_head,
    height,
    padded,
    columns,
    groups,
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
    """Add to dk and dv from ``count`` scheduled entries on ``lanes`` batch rows and KV heads.

    Args:
        q, dout: [B, M, H, D], descriptors of their [B, H, M, D] where DESCRIPTORS; k, v: [B, N, G, D].
        dk, dv: [B, N, G, D] fp32, added to. parts: fp32 [slots, lanes, 2, BLOCK_N, BLOCK_D], written by slices.
        levels, deltas: fp32 [B, H, padded] contiguous, as triton_merge.prepare makes them.
        bounds: int32 [2, INTERVALS, M]; blocks, slots, pointers, runs: the schedule (triton_schedule.Schedule).
        height: M; columns: N; groups: G; group_size: H / G; scale: times log2(e).
    """
    q_strides, k_strides = (q_batch, q_row, q_head), (k_batch, k_row, k_head)
    v_strides, dout_strides = (v_batch, v_row, v_head), (dout_batch, dout_row, dout_head)
    dk_strides, dv_strides = (dk_batch, dk_row, dk_head), (dv_batch, dv_row, dv_head)
    tensors = (q, k, v, dout, dk, dv, parts, levels, deltas, bounds, blocks, slots, pointers, runs)
    if PERSISTENT:
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            _block(
                item, tensors, q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, height, padded,
                columns, groups, group_size, count, lanes, together, scale,
                D, BLOCK_D, BLOCK_M, BLOCK_N, INTERVALS, DESCRIPTORS, PRECISION,
            )  # fmt: skip
    else:
        _block(
            tl.program_id(0), tensors, q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, height,
            padded, columns, groups, group_size, count, lanes, together, scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, INTERVALS, DESCRIPTORS, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["columns", "groups", "lanes"])
def reduce_kernel(
    dk,
    dv,
    parts,
    splits,
    dk_batch,
    dk_row,
    dk_head,
    dv_batch,
    dv_row,
    dv_head,
    columns,
    groups,
    lanes,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
):
    """Add the slices of one cut block of keys to dk and dv, in their order; PART rows of the block per program.

    Args:
        dk, dv, parts: as in ``keys_kernel``. splits: int32 [cut blocks, 3]: block of keys, first slot, slots.
    """
    split, lane, part = splits + 3 * tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block, slot, slots = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    place_of = (part * PART + tl.arange(0, PART))[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    dk_sum = tl.zeros([PART, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([PART, BLOCK_D], tl.float32)
    for one in range(slot, slot + slots):
        base = parts + (tl.cast(one, tl.int64) * lanes + lane) * (2 * BLOCK_N * BLOCK_D)
        dk_sum += tl.load(base + place_of)
        dv_sum += tl.load(base + BLOCK_N * BLOCK_D + place_of)
    start = block * BLOCK_N + part * PART
    batch, group = tl.cast(lane // groups, tl.int64), tl.cast(lane % groups, tl.int64)
    add_tile(dk + batch * dk_batch + group * dk_head, dk_sum, start, columns, dk_row, D, PART, BLOCK_D)
    add_tile(dv + batch * dv_batch + group * dv_head, dv_sum, start, columns, dv_row, D, PART, BLOCK_D)
