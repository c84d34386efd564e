"""The Triton backend: NVIDIA GPUs from sm_80 on, and Triton's interpreter on the CPU.

The kernels know no masks: they take each row's key intervals and each block's runs of blocks from the work's sweeps.
Every total is summed in a fixed order, without atomics: bitwise repeatable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringspan.kernels.masks.span import Span
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.triton_launch import (
    LOG2E,
    Options,
    bounds_of,
    launch,
    launch_reduce,
    order_of,
    schedule_of,
    tile_of,
    unit_stride,
)
from ringspan.kernels.triton_merge import PADDING, prepare
from ringspan.kernels.triton_source import INTERPRETED, block_width
from ringspan.kernels.work import Sweep, Work

NAME = "triton"
WHY = "fused kernels over runs of full and masked blocks"
DEFAULT = Options()


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return what the kernels cannot do and the remedy, in one line, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        return f"triton: no kernels for {device.type}; move the tensors to a CUDA device or take the cpu backend"
    if device.type == "cuda" and torch.version.hip:
        return "triton: the tiles are NVIDIA's; take the reference backend on ROCm"
    if device.type == "cuda" and (major := torch.cuda.get_device_capability(device)[0]) < 8:
        return f"triton: compute capability {major}.x; the kernels need 8.0 (A100) or later, take the reference backend"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return (
            f"triton: no {str(dtype).removeprefix('torch.')}; take the reference backend, which computes in any float"
        )
    if not 1 <= head_dim <= 256:
        return f"triton: head dimension {head_dim}; the kernels take 1 to 256, take the reference backend"
    return None


def forward(
    total: Running, q: Tensor, k: Tensor, v: Tensor, work: Work, *, scale: float, options: Options = DEFAULT
) -> None:
    """Add the attention of queries [B, M, H, D] to keys and values [B, N, G, D] into ``total``.

    Args:
        work: which local row sees which local column.
        scale: factor on the logits, positive.

    Raises:
        ValueError: what ``refuses`` says, or a scale that is not positive.
    """
    _check(q, scale)
    for sweep in work.sweeps:
        rows, keys = order_of(sweep, q.device, "rows"), order_of(sweep, q.device, "keys")
        query, key, value = _taken(q, rows), _taken(k, keys), _taken(v, keys)
        out, lse = (total.out, total.lse) if rows is None else (total.out[:, rows], total.lse[:, rows])
        _forward(sweep, query, key, value, out, lse, scale, not total.fresh, options)
        if rows is not None:
            total.out.index_copy_(1, rows, out)
            total.lse.index_copy_(1, rows, lse)
        total.touch(Span(0, q.shape[1]))


def backward(
    total: Gradients, saved: Saved, k: Tensor, v: Tensor, work: Work, *, scale: float, options: Options = DEFAULT
) -> None:
    """Add the gradients of queries, keys and values into ``total``, given the finished forward of the rows.

    Args:
        k, v: [B, N, G, D]; work, scale: as in ``forward``.

    Raises:
        ValueError: what ``refuses`` says, or a scale that is not positive.
    """
    _check(saved.q, scale)
    if not work.sweeps:
        return
    levels, deltas = prepare(saved)
    for sweep in work.sweeps:
        rows, keys = order_of(sweep, k.device, "rows"), order_of(sweep, k.device, "keys")
        query, slope = _taken(saved.q, rows), _taken(saved.dout, rows)
        key, value = _taken(k, keys), _taken(v, keys)
        row_data = _row_data(levels, deltas, rows)
        dq = total.dq if rows is None else total.dq[:, rows]
        dk, dv = (total.dk, total.dv) if keys is None else (total.dk[:, keys], total.dv[:, keys])
        _queries(sweep, query, key, value, slope, row_data, dq, scale, options)
        _keys(sweep, query, key, value, slope, row_data, dk, dv, scale, options)
        if rows is not None:
            total.dq.index_copy_(1, rows, dq)
        if keys is not None:
            total.dk.index_copy_(1, keys, dk)
            total.dv.index_copy_(1, keys, dv)


def _check(q: Tensor, scale: float) -> None:
    if reason := refuses(q.device, q.dtype, q.shape[-1]):
        raise ValueError(reason)
    if not scale > 0:
        raise ValueError(f"triton: the scale must be positive, not {scale}; take the reference backend for others")


def _taken(x: Tensor, order: Tensor | None) -> Tensor:
    return unit_stride(x) if order is None else x.index_select(1, order)


def _row_data(levels: Tensor, deltas: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows' data in a sweep's order, padded alike."""
    if rows is None:
        return levels, deltas
    beyond = torch.arange(len(rows), levels.shape[-1], device=rows.device)
    order = torch.cat([rows, beyond])
    return levels.index_select(2, order), deltas.index_select(2, order)


def _sizes(q: Tensor, k: Tensor, scale: float) -> dict[str, int | float]:
    heads, groups = q.shape[2], k.shape[2]
    sizes = {"height": q.shape[1], "columns": k.shape[1], "heads": heads, "groups": groups}
    return {
        **sizes,
        "group_size": heads // groups,
        "padded": -(-q.shape[1] // PADDING) * PADDING,
        "scale": scale * LOG2E,
    }


def _forward(
    sweep: Sweep,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    accumulate: bool,
    how: Options,
) -> None:
    tile = tile_of("forward", q, how)
    lanes = q.shape[0] * q.shape[2]
    plan = schedule_of(sweep, q.device, "forward", tile, lanes)
    bounds = bounds_of(sweep, q.device)
    arguments = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "bounds": bounds, **_sizes(q, k, scale)}
    launch(
        "forward", tile, plan, arguments, lanes=lanes, streamed=_streamed(k, q), intervals=bounds.shape[1], how=how,
        accumulate=accumulate,
    )  # fmt: skip


def _queries(
    sweep: Sweep, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, row_data: tuple[Tensor, Tensor], dq: Tensor,
    scale: float, how: Options,
) -> None:  # fmt: skip
    tile = tile_of("query", q, how)
    lanes = q.shape[0] * q.shape[2]
    plan = schedule_of(sweep, q.device, "query", tile, lanes)
    bounds = bounds_of(sweep, q.device)
    levels, deltas = row_data
    arguments = {"q": q, "k": k, "v": v, "dout": dout, "dq": dq, "levels": levels, "deltas": deltas, "bounds": bounds}
    arguments |= _sizes(q, k, scale)
    launch(
        "query", tile, plan, arguments, lanes=lanes, streamed=_streamed(k, q), intervals=bounds.shape[1], how=how
    )  # fmt: skip


def _keys(
    sweep: Sweep, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, row_data: tuple[Tensor, Tensor], dk: Tensor,
    dv: Tensor, scale: float, how: Options,
) -> None:  # fmt: skip
    tile = tile_of("keys", q, how)
    lanes = k.shape[0] * k.shape[2]
    plan = schedule_of(sweep, q.device, "keys", tile, lanes)
    bounds = bounds_of(sweep, q.device)
    parts = dk.new_empty(plan.workspace, lanes, 2, tile.columns, block_width(q.shape[-1]))
    levels, deltas = row_data
    arguments = {"q": q, "k": k, "v": v, "dout": dout, "dk": dk, "dv": dv, "parts": parts}
    arguments |= {"levels": levels, "deltas": deltas, "bounds": bounds, **_sizes(q, k, scale)}
    streamed = 2 * q.shape[1] * q.shape[3] * q.element_size() * (q.shape[2] // k.shape[2])
    launch("keys", tile, plan, arguments, lanes=lanes, streamed=streamed, intervals=bounds.shape[1], how=how)
    if plan.workspace:
        launch_reduce(tile, plan, parts, dk, dv)


def _streamed(k: Tensor, q: Tensor) -> int:
    """Return the bytes of keys and values per query head."""
    return 2 * k.shape[1] * k.shape[3] * k.element_size() * k.shape[2] // q.shape[2]
