"""One tile on the CPU: torch's flash operator and its backward, exact to the dtype it is given.

The operator returns out in the dtype of its inputs. A tile whose rows get further partials must stay fp32 until the
last cast (bf16 partials cost 1.4x the error), so callers widen such tiles first. It reports lse 0 for a row without
keys; the planner never makes such a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def tile_forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Return (out [B, M, H, D], lse [B, M, H]) of one tile.

    Args:
        q: [B, M, H, D]; k, v: [B, N, G, D], H a multiple of G.
        scale: factor on the logits.
        causal: M equals N and row i sees keys 0 to i; else every row sees every key.
    """
    out, lse = _forward(_heads(q), _heads(k), _heads(v), 0.0, causal, attn_mask=None, scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


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
    """Return (dq, dk, dv) of one tile, given the final out and lse of its rows over all tiles.

    Args:
        dout, out: [B, M, H, D]; lse: [B, M, H]; the rest as in ``tile_forward``.
    """
    dq, dk, dv = _backward(
        _heads(dout),
        _heads(q),
        _heads(k),
        _heads(v),
        _heads(out),
        lse.transpose(1, 2),
        0.0,
        causal,
        scale=scale,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2)
