"""Ring self-attention: keys and values travel, queries stay; exact, forward and backward.

One executor for every mask and layout: it follows a rank's steps, starts the next step's transfers, computes this
step's keys while they run, and adds results in the plan's order. The backward walks the same steps: K and V leave bare,
dK and dV start at the first rank that needs a piece, travel one round behind it, and go straight home from the last.
Ring attention is Liu et al. 2023 (arXiv 2310.01889, section 3); the per-pair backward from the final lse is
FlashAttention-2's (arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ringspan.dist_attn.courier import BACKWARD, FORWARD, Courier, Returns, message_like
from ringspan.dist_attn.exchange import Exchange, Message
from ringspan.dist_attn.schedule import Arrival, Schedule
from ringspan.kernels.merge import join_sinks, sinks_gradient
from ringspan.kernels.parts import Part
from ringspan.kernels.select import Backend
from ringspan.kernels.state import Gradients, Running, Saved, accumulator


@dataclass(frozen=True)
class Call:
    """One call of attention on one rank: its schedules by batch rows and heads, its messages and its kernel."""

    parts: tuple[tuple[Part, Schedule], ...]
    rank: int
    exchange: Exchange | None
    scale: float
    kernel: Backend


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
        out, lse = kept if kept is not None else forward(call, q, k, v, sinks)
        ctx.call, ctx.has_sinks = call, sinks is not None
        ctx.save_for_backward(q, k, v, out, lse, *([sinks] if sinks is not None else []))
        return out, lse

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dlse = grads
        q, k, v, out, lse, *rest = ctx.saved_tensors
        saved = Saved(q, out, lse, torch.zeros_like(out) if dout is None else dout, dlse)
        dsinks = sinks_gradient(lse, rest[0], saved.delta) if ctx.has_sinks else None
        dq, dk, dv = backward(ctx.call, saved, k, v)
        return dq, dk, dv, dsinks, None, None


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (out [B, L, H, D] in q's dtype, lse [B, L, H]) of this rank's queries over all keys, sinks joined."""
    wide = accumulator(q.dtype)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    for number, (part, schedule) in enumerate(call.parts):
        alone = call.exchange is None
        total = Running(part.take(out), part.take(lse), bytearray(q.shape[1]), alone)
        _forward_part(call, number, schedule, part.take(q), part.take(k), part.take(v), total)
        part.put(out, total.out)
        part.put(lse, total.lse)
    if sinks is not None:
        out, lse = join_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def _forward_part(call: Call, number: int, schedule: Schedule, q: Tensor, k: Tensor, v: Tensor, total: Running) -> None:
    courier = Courier(call.exchange, call.rank, number, FORWARD, schedule, k, v)
    for _, landed in courier.walk(schedule.steps(call.rank)):
        for arrival, keys, values in landed:
            call.kernel.forward(total, q, keys, values, arrival.work, scale=call.scale)


def backward(call: Call, saved: Saved, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of this rank's queries and keys, over all ranks, in their dtype."""
    wide = accumulator(k.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (saved.q, k, v))
    for number, (part, schedule) in enumerate(call.parts):
        total = Gradients(part.take(dq), part.take(dk), part.take(dv))
        _backward_part(call, number, schedule, saved.part(part), part.take(k), part.take(v), total)
        for whole, piece in zip((dq, dk, dv), total, strict=True):
            part.put(whole, piece)
    return dq.to(k.dtype), dk.to(k.dtype), dv.to(k.dtype)


def _backward_part(
    call: Call, number: int, schedule: Schedule, saved: Saved, k: Tensor, v: Tensor, total: Gradients
) -> None:
    courier = Courier(call.exchange, call.rank, number, BACKWARD, schedule, k, v)
    returns = Returns(call.exchange, call.rank, number, schedule, total.dk, total.dv)
    for step, landed in courier.walk(schedule.steps(call.rank)):
        parts: list[tuple[Arrival, Message]] = []
        for arrival, keys, values in landed:
            mine = total
            if step.own is not arrival:
                message = message_like(keys, arrival.rows, total.dk.dtype)
                message.first.zero_()
                message.second.zero_()
                parts.append((arrival, message))
                mine = Gradients(total.dq, message.first, message.second)
            call.kernel.backward(mine, saved, keys, values, arrival.work, scale=call.scale)
        returns.exchange(step, parts)
    returns.finish()
