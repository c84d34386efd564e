"""The one autograd function of sharded attention: strategies compute, this saves, joins sinks, and casts once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from ringspan.dist_attn.exchange import Exchange
from ringspan.kernels.merge import join_sinks, sinks_gradient
from ringspan.kernels.state import Gradients, Saved


@dataclass(frozen=True)
class Wiring:
    """Where this rank stands, and how it reaches others. An exchange is None where it would have one rank.

    Args:
        rank: among all ranks that share the sequence.
        flat: over all of them; outer, inner: over the dimensions of a 2-D mesh (ranks of one place in every node; ranks
            of one node).
    """

    rank: int
    flat: Exchange | None = None
    outer: Exchange | None = None
    inner: Exchange | None = None


class Attended(NamedTuple):
    """A forward pass: out [B, L, H, D] (accumulator's dtype, or q's where it was rounded only once), lse [B, L, H].

    ``rest``: tensors that the backward reuses; empty where it needs none.
    """

    out: Tensor
    lse: Tensor
    rest: tuple[Tensor, ...] = ()


class Executor(Protocol):
    """One strategy on one rank. Sinks are not its business: they are joined once, after all shards."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Attend: q [B, L, H, D], k and v [B, Lk, G, D], this rank's."""
        ...

    def backward(self, saved: Saved, k: Tensor, v: Tensor, rest: tuple[Tensor, ...]) -> Gradients:
        """Return dq, dk, dv of this rank's rows, over all ranks, in any float dtype; ``rest`` may be empty."""
        ...


class ShardedAttention(torch.autograd.Function):
    """(q, k, v, sinks) -> (out, lse); ``kept``: the result of an earlier, identical call, returned without running."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        executor: Executor,
        kept: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        rest: tuple[Tensor, ...] = ()
        if kept is not None:
            out, lse = kept
        else:
            out, lse, rest = executor.forward(q, k, v)
            if sinks is not None:
                out, lse = join_sinks(out, lse, sinks)
            out = out.to(q.dtype)
        ctx.executor, ctx.has_sinks = executor, sinks is not None
        ctx.save_for_backward(q, k, v, out, lse, *([sinks] if sinks is not None else []), *rest)
        return out, lse

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dlse = grads
        q, k, v, out, lse, *rest = ctx.saved_tensors
        sinks = rest.pop(0) if ctx.has_sinks else None
        saved = Saved(q, out, lse, torch.zeros_like(out) if dout is None else dout, dlse)
        dsinks = None if sinks is None else sinks_gradient(lse, sinks, saved.delta)
        dq, dk, dv = ctx.executor.backward(saved, k, v, tuple(rest))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None
