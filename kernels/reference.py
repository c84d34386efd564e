"""Attention from its definition: the slow twin of the fast kernels, on any device and dtype.

Every (query, key) pair of a call is asked of ``mask.allowed`` and the logits of all of them exist at once, so it is for
tests and for devices without a kernel of their own. It knows nothing of strips, tiles or blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringspan.kernels.masks.span import Span
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.work import Work

NAME = "reference"
WHY = "dense, any dtype and device; memory grows with rows times keys"


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return None: it serves everything."""
    del device, dtype, head_dim


def table(work: Work, device: torch.device | str = "cpu") -> Tensor:
    """Return [M, N] bool: whether the local row sees the local column, by the mask's definition."""
    rows, columns = (_positions(spans, device) for spans in (work.queries, work.keys))
    return work.mask.allowed(rows[:, None], columns[None, :]).expand(len(rows), len(columns))


def forward(total: Running, q: Tensor, k: Tensor, v: Tensor, work: Work, *, scale: float) -> None:
    """Add the attention of ``q`` over these keys to ``total``; see ``kernels.cpu.forward``."""
    if not work.rows or not work.columns:
        return
    wide = total.out.dtype
    logits = _logits(q, k, work, scale, wide)
    lse = torch.logsumexp(logits, dim=-1)  # [B, G, R, M]
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0, lse).unsqueeze(-1))
    out = torch.einsum("bgrmn,bngd->bmgrd", weights, v.to(wide))
    total.add(Span(0, work.rows), out.flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3))


def backward(total: Gradients, saved: Saved, k: Tensor, v: Tensor, work: Work, *, scale: float) -> None:
    """Add the gradients of these pairs to ``total``; see ``kernels.cpu.backward``."""
    if not work.rows or not work.columns:
        return
    wide = total.dq.dtype
    split = lambda x: x.to(wide).unflatten(2, (k.shape[2], -1))  # noqa: E731  [B, M, G, R, ...]
    rows = lambda x: split(x).permute(0, 2, 3, 1).unsqueeze(-1)  # noqa: E731  [B, G, R, M, 1]
    lse = rows(saved.lse)
    weights = torch.exp(_logits(saved.q, k, work, scale, wide) - torch.where(lse == -torch.inf, 0, lse))
    total.dv.add_(torch.einsum("bgrmn,bmgrd->bngd", weights, split(saved.dout)))
    dweights = torch.einsum("bmgrd,bngd->bgrmn", split(saved.dout), v.to(wide))
    dlogits = weights * (dweights - rows(saved.delta)) * scale
    total.dq.add_(torch.einsum("bgrmn,bngd->bmgrd", dlogits, k.to(wide)).flatten(2, 3))
    total.dk.add_(torch.einsum("bgrmn,bmgrd->bngd", dlogits, split(saved.q)))


def _positions(spans: tuple[Span, ...], device: torch.device | str) -> Tensor:
    each = [torch.arange(span.start, span.stop, device=device) for span in spans]
    return torch.cat(each) if each else torch.zeros(0, dtype=torch.int64, device=device)


def _logits(q: Tensor, k: Tensor, work: Work, scale: float, wide: torch.dtype) -> Tensor:
    """Return the scaled logits [B, G, R, M, N], -inf where the row does not see the key."""
    queries = q.to(wide).unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bmgrd,bngd->bgrmn", queries, k.to(wide)) * scale
    return logits.masked_fill(~table(work, q.device), -torch.inf)
