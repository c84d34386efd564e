"""Fused (out, lse) algebra for GPUs: merge.py's functions in one pass over memory each, and the backward's row data."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringspan.kernels.state import Saved
from ringspan.kernels.triton_common import LOG2E

PADDING = 256  # rows: a multiple of every tile's, so that the backward loads row data without a bound
_BLOCK = 16


@triton.jit
def _merge_kernel(
    out,
    lse,
    part,
    part_lse,
    out_0,
    out_1,
    out_2,
    lse_0,
    lse_1,
    lse_2,
    part_0,
    part_1,
    part_2,
    part_lse_0,
    part_lse_1,
    part_lse_2,
    rows,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, head = tl.cast(tl.program_id(1) // heads, tl.int64), tl.cast(tl.program_id(1) % heads, tl.int64)
    wide, dims = tl.cast(row, tl.int64), tl.arange(0, BLOCK_D)
    valid = row < rows
    inside = valid[:, None] & (dims < D)[None, :]
    lse_here = lse + batch * lse_0 + wide * lse_1 + head * lse_2
    out_here = out + batch * out_0 + head * out_2 + (wide * out_1)[:, None] + dims[None, :]
    part_here = part + batch * part_0 + head * part_2 + (wide * part_1)[:, None] + dims[None, :]
    mine = tl.load(lse_here, mask=valid, other=0.0)
    other = tl.load(part_lse + batch * part_lse_0 + wide * part_lse_1 + head * part_lse_2, mask=valid, other=0.0)
    peak = tl.maximum(mine, other)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    old, new = tl.exp(mine - peak), tl.exp(other - peak)
    safe = tl.where(old + new == 0, 1.0, old + new)
    result = tl.load(out_here, mask=inside, other=0.0) * (old / safe)[:, None]
    result += tl.load(part_here, mask=inside, other=0.0) * (new / safe)[:, None]
    tl.store(out_here, result, mask=inside)
    tl.store(lse_here, tl.where(old + new == 0, -float("inf"), peak + tl.log(safe)), mask=valid)


@triton.jit
def _join_kernel(
    out,
    lse,
    sinks,
    joined_out,
    joined_lse,
    out_0,
    out_1,
    out_2,
    lse_0,
    lse_1,
    lse_2,
    rows,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, head = tl.cast(tl.program_id(1) // heads, tl.int64), tl.cast(tl.program_id(1) % heads, tl.int64)
    wide, dims = tl.cast(row, tl.int64), tl.arange(0, BLOCK_D)
    valid = row < rows
    inside = valid[:, None] & (dims < D)[None, :]
    mine = tl.load(lse + batch * lse_0 + wide * lse_1 + head * lse_2, mask=valid, other=0.0)
    sink = tl.load(sinks + head)
    peak = tl.maximum(mine, sink)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    own = tl.exp(mine - peak)
    both = own + tl.exp(sink - peak)
    safe = tl.where(both == 0, 1.0, both)
    place = (batch * rows + wide) * heads + head
    result = tl.load(
        out + batch * out_0 + head * out_2 + (wide * out_1)[:, None] + dims[None, :], mask=inside, other=0.0
    )
    tl.store(joined_out + (place * D)[:, None] + dims[None, :], result * (own / safe)[:, None], mask=inside)
    tl.store(joined_lse + place, tl.where(both == 0, -float("inf"), peak + tl.log(safe)), mask=valid)


@triton.jit
def _rows_kernel(
    dout,
    out,
    lse,
    dlse,
    levels,
    deltas,
    dout_0,
    dout_1,
    dout_2,
    out_0,
    out_1,
    out_2,
    lse_0,
    lse_1,
    lse_2,
    dlse_0,
    dlse_1,
    dlse_2,
    rows,
    heads,
    padded,
    WITH_DLSE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.program_id(1)
    batch, head = tl.cast(lane // heads, tl.int64), tl.cast(lane % heads, tl.int64)
    wide, dims = tl.cast(row, tl.int64), tl.arange(0, BLOCK_D)
    valid = row < rows
    inside = valid[:, None] & (dims < D)[None, :]
    slope = tl.load(
        dout + batch * dout_0 + head * dout_2 + (wide * dout_1)[:, None] + dims[None, :], mask=inside, other=0.0
    )
    result = tl.load(
        out + batch * out_0 + head * out_2 + (wide * out_1)[:, None] + dims[None, :], mask=inside, other=0.0
    )
    delta = tl.sum(slope.to(tl.float32) * result.to(tl.float32), 1)
    if WITH_DLSE:
        delta -= tl.load(dlse + batch * dlse_0 + wide * dlse_1 + head * dlse_2, mask=valid, other=0.0)
    level = tl.load(lse + batch * lse_0 + wide * lse_1 + head * lse_2, mask=valid, other=-float("inf"))
    level = tl.where(level == -float("inf"), float("inf"), level * LOG2E)
    place = tl.cast(lane, tl.int64) * padded + row
    tl.store(levels + place, level, mask=row < padded)
    tl.store(deltas + place, delta, mask=row < padded)


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a partial result into a running one, in place: merge.merge in one pass.

    Args:
        out: [B, M, H, D] fp32 accumulator, last stride 1; lse: [B, M, H] fp32.
        part_out, part_lse: the partial, over keys not merged before; same shapes and dtype.
    """
    batch, rows, heads, dim = _fp32(out, lse, part_out, part_lse)
    if not out.is_contiguous() and out.stride(-1) != 1 and dim > 1:
        raise ValueError("the running out must have a contiguous last dimension")
    part_out = part_out if part_out.stride(-1) == 1 or dim == 1 else part_out.contiguous()
    tensors = (out, lse, part_out, part_lse)
    steps = [*out.stride()[:3], *lse.stride(), *part_out.stride()[:3], *part_lse.stride()]
    if out.numel():
        with torch.cuda.device_of(out):
            _run(_merge_kernel, rows, batch * heads, *tensors, *steps, rows, heads, dim, _width(dim), _BLOCK)


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add one learned key without a value per head, after all shards: merge.join_sinks in one pass.

    Args:
        out: [B, L, H, D] fp32, merged over every shard; lse: [B, L, H] fp32.
        sinks: [H] logits, any float dtype; computed in fp32.
    """
    batch, rows, heads, dim = _fp32(out, lse)
    out = out if out.stride(-1) == 1 or dim == 1 else out.contiguous()
    joined, joined_lse = out.new_empty(out.shape), lse.new_empty(lse.shape)
    tensors = (out, lse, sinks.float().contiguous(), joined, joined_lse)
    steps = [*out.stride()[:3], *lse.stride()]
    if out.numel():
        with torch.cuda.device_of(out):
            _run(_join_kernel, rows, batch * heads, *tensors, *steps, rows, heads, dim, _width(dim), _BLOCK)
    return joined, joined_lse


def prepare(saved: Saved) -> tuple[Tensor, Tensor]:
    """Return what the backward kernels read per row, and keep it in ``saved.cache``.

    Both are fp32 [B, H, padded], M padded to a multiple of PADDING: lse in base 2, +inf (a weight of 0) for a row
    without a key and beyond M; and delta = rowsum(dout * out) - dlse, 0 beyond M.
    """
    if "triton_levels" in saved.cache:
        return saved.cache["triton_levels"], saved.cache["triton_deltas"]
    batch, rows, heads, dim = saved.q.shape
    padded = -(-rows // PADDING) * PADDING
    levels, deltas = (saved.lse.new_empty(batch, heads, padded) for _ in range(2))
    dout, out = (x if x.stride(-1) == 1 or dim == 1 else x.contiguous() for x in (saved.dout, saved.out))
    dlse = saved.lse if saved.dlse is None else saved.dlse
    steps = [*dout.stride()[:3], *out.stride()[:3], *saved.lse.stride(), *dlse.stride()]
    tensors = (dout, out, saved.lse, dlse, levels, deltas)
    sizes = (rows, heads, padded, saved.dlse is not None, dim, _width(dim), _BLOCK)
    with torch.cuda.device_of(levels):
        _run(_rows_kernel, padded, batch * heads, *tensors, *steps, *sizes)
    saved.cache["triton_levels"], saved.cache["triton_deltas"] = levels, deltas
    return levels, deltas


def delta(saved: Saved) -> Tensor:
    """Return Saved.delta [B, M, H], a view of what ``prepare`` made."""
    return prepare(saved)[1][:, :, : saved.q.shape[1]].transpose(1, 2)


def _fp32(out: Tensor, *others: Tensor) -> tuple[int, int, int, int]:
    """Return the sizes of ``out``; raise where the kernels would compute in less than what they are given."""
    if any(x.dtype != torch.float32 for x in (out, *others)):
        raise ValueError(f"the fused kernels merge in float32, not {out.dtype}: use ringspan.kernels.merge")
    batch, rows, heads, dim = out.shape
    return batch, rows, heads, dim


def _run(kernel: Any, rows: int, lanes: int, *arguments: Any) -> None:
    kernel[(-(-rows // _BLOCK), lanes)](*arguments, num_warps=4)


def _width(dim: int) -> int:
    return 1 << (dim - 1).bit_length()
