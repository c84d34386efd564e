"""One tile, dense: the slow twin of the fast kernels, with their signatures, on any device and dtype.

Logits of the whole tile exist at once, so it is for tests and for devices without a kernel of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tile_forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Return (out [B, M, H, D], lse [B, M, H]) of one tile; see ``kernels.cpu.tile_forward``."""
    logits = _logits(q, k, scale, causal)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.unsqueeze(-1))
    out = torch.einsum("bgrmn,bngd->bmgrd", weights, v.to(weights.dtype))
    return out.flatten(2, 3).to(q.dtype), lse.permute(0, 3, 1, 2).flatten(2, 3)


def tile_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of one tile; see ``kernels.cpu.tile_backward``."""
    groups = k.shape[2]
    logits = _logits(q, k, scale, causal)
    wide = logits.dtype
    split = lambda x: x.unflatten(2, (groups, -1)).to(wide)  # noqa: E731  [B, M, G, R, ...]
    weights = torch.exp(logits - split(lse).permute(0, 2, 3, 1).unsqueeze(-1))  # [B, G, R, M, N]
    delta = (split(dout) * split(out)).sum(-1).permute(0, 2, 3, 1)
    dv = torch.einsum("bgrmn,bmgrd->bngd", weights, split(dout))
    dweights = torch.einsum("bmgrd,bngd->bgrmn", split(dout), v.to(wide))
    dlogits = weights * (dweights - delta.unsqueeze(-1)) * scale
    dq = torch.einsum("bgrmn,bngd->bmgrd", dlogits, k.to(wide)).flatten(2, 3)
    dk = torch.einsum("bgrmn,bmgrd->bngd", dlogits, split(q))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _logits(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.unflatten(2, (k.shape[2], -1)).to(wide)
    logits = torch.einsum("bmgrd,bngd->bgrmn", queries, k.to(wide)) * scale
    if causal:
        rows = torch.arange(q.shape[1], device=q.device)
        logits = logits.masked_fill(rows[:, None] < rows, -torch.inf)
    return logits
