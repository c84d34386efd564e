"""One batch of tiles of one shape on the CPU: torch's flash operator, or plain products where tiles are narrow.

Operands are [T, heads, rows, D] and [T, heads, keys, D]: all query heads and fewer KV heads, or the KV heads with the
query heads of each folded into its rows (``kernels.cpu_views``). Strides are free but for the last.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.kernels.tiles import Shape

NARROW = 16  # up to this many keys the operator's cost per row exceeds that of three small products

flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Grads(NamedTuple):
    """dq [T, heads, rows, D]; dk, dv [T, KV heads, keys, D]."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


def run_forward(shape: Shape, repeat: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out, lse [T, heads, rows]) of tiles of one shape; ``repeat``: folded rows per row."""
    mask = _mask(shape, repeat, q.dtype)
    if shape.keys > NARROW or q.dtype == torch.bfloat16:  # products would round the logits to bf16
        return flash_forward(q, k, v, 0.0, shape.causal, attn_mask=mask, scale=scale)
    logits = _logits(q, k, mask, scale)
    lse = torch.logsumexp(logits, -1)
    return torch.matmul(logits.sub_(lse.unsqueeze(-1)).exp_(), v), lse


def run_backward(
    shape: Shape,
    repeat: int,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    scale: float,
) -> Grads:
    """Return the gradients of tiles of one shape; ``rows``: q, out, lse, dout of the finished forward."""
    q, out, lse, dout = rows
    mask = _mask(shape, repeat, q.dtype)
    if shape.keys > NARROW:
        return Grads(*flash_backward(dout, q, k, v, out, lse, 0.0, shape.causal, attn_mask=mask, scale=scale))
    weights = _logits(q, k, mask, scale).sub_(lse.unsqueeze(-1)).exp_()
    delta = (dout * out).sum(-1, keepdim=True)
    dlogits = torch.matmul(dout, v.mT).sub_(delta).mul_(weights).mul_(scale)
    return Grads(torch.matmul(dlogits, k), torch.matmul(dlogits.mT, q), torch.matmul(weights.mT, dout))


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    logits = torch.matmul(q, k.mT).mul_(scale)
    return logits if mask is None else logits.add_(mask)


@lru_cache(maxsize=128)
def _mask(shape: Shape, repeat: int, dtype: torch.dtype) -> Tensor | None:
    """Return 0 where a row sees a column and -inf elsewhere, [repeat * rows, keys]; None where all do."""
    if shape.full or shape.causal:
        return None
    distance = torch.arange(shape.width) - torch.arange(shape.rows)[:, None]
    seen = (distance >= shape.low) & (distance < shape.high)
    seen = torch.cat([seen[:, : shape.hole.start], seen[:, shape.hole.stop :]], 1)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).repeat_interleave(repeat, 0)
