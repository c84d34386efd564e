"""The (out, lse) algebra: partial softmax results over disjoint keys, merged; and learned sinks, joined once.

A shard of softmax attention is ``out`` (normalised within the shard) and ``lse`` (natural log-sum-exp of its scaled
logits). An empty row has out 0 and lse -inf, which the common sigmoid and logaddexp merges turn into NaN; the form
here is guarded. Merging is associative up to rounding, so callers fix the order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a partial result into a running one, in place.

    Args:
        out: [..., D] fp32 or fp64 accumulator; lse: [...] of the same dtype.
        part_out, part_lse: the partial, over keys not merged before; same shapes and dtype.
    """
    peak = torch.maximum(lse, part_lse)
    peak = torch.where(peak == -torch.inf, 0, peak)
    old, new = torch.exp(lse - peak), torch.exp(part_lse - peak)
    total = old + new
    empty = total == 0
    safe = torch.where(empty, 1, total)
    out.mul_((old / safe).unsqueeze(-1)).addcmul_(part_out, (new / safe).unsqueeze(-1))
    lse.copy_(torch.where(empty, -torch.inf, peak + torch.log(safe)))


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add one learned key without a value per head, after all shards: return the final (out, lse).

    Args:
        out: [B, L, H, D] merged over every shard; lse: [B, L, H].
        sinks: [H] logits, any float dtype; computed in the accumulator's.
    """
    logit = sinks.to(lse.dtype)
    joined = torch.logaddexp(lse, logit)
    # Both -inf: no key at all. exp(-inf - -inf) would be NaN.
    weight = torch.where(joined == -torch.inf, 0, torch.exp(lse - joined))
    return out * weight.unsqueeze(-1), joined


def sinks_gradient(lse: Tensor, sinks: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of ``sinks`` [H]: minus the sum of exp(s - lse') delta over batch and tokens.

    Args:
        lse: [B, L, H] with the sinks joined; delta: [B, L, H] = rowsum(dout * out) - dlse.
        sinks: [H]; the result has its dtype, computed in the accumulator's.
    """
    share = torch.exp(sinks.to(lse.dtype) - lse)
    share = torch.where(lse == -torch.inf, 0, share)
    return -(share * delta).sum(dim=(0, 1)).to(sinks.dtype)
