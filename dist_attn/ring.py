"""Ring self-attention: keys and values travel, queries stay; exact, forward and backward.

One executor for every mask and layout: it follows a rank's steps, starts the next step's transfers, computes this
step's tiles while they run, and merges partial results in the plan's order. The backward walks the same steps: K and
V leave bare, dK and dV start at the first rank that needs a piece, travel one round behind it, and go straight home
from the last. Ring attention is Liu et al. 2023 (arXiv 2310.01889, section 3); the per-tile backward from the final
lse is FlashAttention-2's (arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ringspan.dist_attn.courier import BACKWARD, FORWARD, Courier, Returns, message_like, rows_of
from ringspan.dist_attn.exchange import Exchange, Message
from ringspan.dist_attn.schedule import Arrival, Schedule, Step
from ringspan.dist_attn.tiles import Tile
from ringspan.kernels.merge import join_sinks, merge, sinks_gradient


@dataclass(frozen=True)
class Call:
    """One call of attention on one rank: its schedules by batch rows, its messages and its kernel."""

    parts: tuple[tuple[slice, Schedule], ...]
    rank: int
    exchange: Exchange | None
    scale: float
    kernel: ModuleType


class RingAttention(torch.autograd.Function):
    """(q, k, v, sinks) -> (out, lse); ``kept``: the result of an earlier, identical call, returned without running."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        call: Call,
        kept: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, lse = kept if kept is not None else _forward(call, q, k, v, sinks)
        ctx.call, ctx.has_sinks = call, sinks is not None
        ctx.save_for_backward(q, k, v, out, lse, *([sinks] if sinks is not None else []))
        return out, lse

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dlse = grads
        q, k, v, out, lse, *rest = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dsinks = None
        if ctx.has_sinks:
            delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            dsinks = sinks_gradient(lse, rest[0], delta if dlse is None else delta - dlse)
        dq, dk, dv = _backward(ctx.call, q, k, v, out, lse, dout, dlse)
        return dq, dk, dv, dsinks, None, None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which partial results and gradients are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = accumulator(q.dtype)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    for number, (rows, schedule) in enumerate(call.parts):
        _forward_part(call, number, schedule, q[rows], k[rows], v[rows], out[rows], lse[rows])
    if sinks is not None:
        out, lse = join_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def _forward_part(
    call: Call,
    number: int,
    schedule: Schedule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    steps = schedule.steps(call.rank)
    dtype = _tile_dtype(q.dtype, steps)
    queries = q.to(dtype)
    courier = Courier(call.exchange, call.rank, number, FORWARD, schedule, k, v)
    for _, landed in courier.walk(steps):
        for arrival, keys, values in landed:
            keys, values = keys.to(dtype), values.to(dtype)
            for tile in arrival.tiles:
                part = call.kernel.tile_forward(
                    rows_of(queries, tile.q),
                    rows_of(keys, tile.k),
                    rows_of(values, tile.k),
                    scale=call.scale,
                    causal=tile.causal,
                )
                _accumulate(out, lse, tile, *part)


def _accumulate(out: Tensor, lse: Tensor, tile: Tile, part_out: Tensor, part_lse: Tensor) -> None:
    if tile.first:
        rows_of(out, tile.q).copy_(part_out)
        rows_of(lse, tile.q).copy_(part_lse)
    else:
        merge(rows_of(out, tile.q), rows_of(lse, tile.q), part_out, part_lse)


def _backward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulator(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for number, (rows, schedule) in enumerate(call.parts):
        inputs = _Saved(q[rows], out[rows], lse[rows], dout[rows], None if dlse is None else dlse[rows])
        _backward_part(call, number, schedule, inputs, k[rows], v[rows], dq[rows], dk[rows], dv[rows])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@dataclass
class _Saved:
    """What a tile's backward reads besides its keys.

    The tile operator subtracts rowsum(dout * out); the gradient of lse enters as one more feature that contributes
    -dlse to that sum and nothing to the logits: dout gets a 1, out gets -dlse, and q, k, v get a 0.
    """

    q: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None

    def to(self, dtype: torch.dtype) -> _Saved:
        return _Saved(self.q.to(dtype), self.out.to(dtype), self.lse, self.dout.to(dtype), self.dlse)

    def extend(self) -> _Saved:
        """Return the operands with that feature appended, where lse has a gradient."""
        if self.dlse is None:
            return self
        column = -self.dlse.to(self.out.dtype).unsqueeze(-1)
        return _Saved(
            F.pad(self.q, (0, 1)),
            torch.cat([self.out, column], -1),
            self.lse,
            F.pad(self.dout, (0, 1), value=1.0),
            self.dlse,
        )


def _backward_part(
    call: Call,
    number: int,
    schedule: Schedule,
    saved: _Saved,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    steps = schedule.steps(call.rank)
    dtype = _tile_dtype(saved.q.dtype, steps) if saved.dlse is None else accumulator(saved.q.dtype)
    operands = saved.to(dtype).extend()
    courier = Courier(call.exchange, call.rank, number, BACKWARD, schedule, k, v)
    returns = Returns(call.exchange, call.rank, number, schedule, dk, dv)
    for step, landed in courier.walk(steps):
        parts: list[tuple[Arrival, Message]] = []
        for arrival, keys, values in landed:
            if step.own is arrival:
                dkeys, dvalues = dk, dv
            else:
                message = message_like(keys, arrival.rows, dk.dtype)
                message.first.zero_()
                message.second.zero_()
                parts.append((arrival, message))
                dkeys, dvalues = message.first, message.second
            keys, values = keys.to(dtype), values.to(dtype)
            if saved.dlse is not None:
                keys, values = F.pad(keys, (0, 1)), F.pad(values, (0, 1))
            for tile in arrival.tiles:
                _tile_backward(call, tile, operands, keys, values, dq, dkeys, dvalues)
        returns.exchange(step, parts)
    returns.finish()


def _tile_backward(
    call: Call, tile: Tile, saved: _Saved, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    q, out, lse, dout = (rows_of(x, tile.q) for x in (saved.q, saved.out, saved.lse, saved.dout))
    keys, values = rows_of(k, tile.k), rows_of(v, tile.k)
    grads = call.kernel.tile_backward(dout, q, keys, values, out, lse, scale=call.scale, causal=tile.causal)
    for total, part, span in zip((dq, dk, dv), grads, (tile.q, tile.k, tile.k), strict=True):
        rows_of(total, span).add_(part[..., : total.shape[-1]])


def _tile_dtype(dtype: torch.dtype, steps: Iterable[Step]) -> torch.dtype:
    """Return the dtype tiles run in: bf16 only where every query row and every key row meets a single tile.

    Elsewhere the operator's bf16 results would be rounded before they are added up.
    """
    tiles = [tile for step in steps for arrival in (step.own, *step.arrivals) if arrival for tile in arrival.tiles]
    alone = all(tile.first for tile in tiles) and all(not step.arrivals for step in steps)
    keys = sorted(tile.k for tile in tiles)
    alone = alone and all(a.stop <= b.start for a, b in zip(keys, keys[1:], strict=False))
    return dtype if alone and dtype == torch.bfloat16 else accumulator(dtype)
