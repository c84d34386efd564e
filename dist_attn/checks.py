"""What a call must fulfil before the ranks agree on it, and the words in which they do."""

from __future__ import annotations

import torch
from torch import Tensor

from ringspan.dist_attn.groups import Groups
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.problem import Problem
from ringspan.kernels.state import accumulator


def facts(problem: Problem, strategy: str, scale: float) -> str:
    """Return everything the ranks' plans derive from, readable."""
    p = problem
    masks = "; ".join(
        str(part.mask)
        if len(p.parts) == 1
        else f"{part.mask} (rows {part.rows.start}:{part.rows.stop}, heads {part.heads})"
        for part in p.parts
    )
    keys = "" if p.kv_layout == p.layout else f", keys {p.kv_layout}"
    return (
        f"batch {p.batch}, length {p.length}, heads {p.heads}/{p.kv_heads} x {p.head_dim}, {p.dtype}, "
        f"{p.layout}{keys}, mesh {p.mesh}, {strategy}, gradients {p.wired}, scale {scale}, sinks {p.sinks}, "
        f"mask {masks}"
    )


def check_length(
    q: Tensor, k: Tensor, layout: Layout | None, kv_layout: Layout | None, groups: Groups, length: int | None
) -> int:
    """Return the global length, having held this rank's tokens against its share."""
    rank, world, local = groups.rank, groups.world, q.shape[1]
    if layout is None and world > 1:
        raise ValueError(f"layout: required with {world} ranks; say who holds which tokens, e.g. layout=ZigZag()")
    length = world * local if length is None else length
    if layout is None and length != local:
        raise ValueError(f"length: {length}, but the only rank holds {local} tokens")
    if kv_layout is None and k.shape[1] != local:
        raise ValueError(f"k: shape {tuple(k.shape)} does not fit q's {tuple(q.shape)}; tokens must be equal")
    for name, tokens, shared in (("q", local, layout), ("k", k.shape[1], kv_layout or layout)):
        share = tokens if shared is None else shared.share(rank, world, length)
        if share != tokens:
            raise ValueError(
                f"{name}: {tokens} tokens, but rank {rank} of {world} holds {share} of {length} in {shared}; "
                "shard with the same layout, and pass length= where shares are uneven"
            )
    return length


def check_heads(k: Tensor, first_kv_head: int, total_kv_heads: int | None) -> int:
    """Return the model's KV heads, having held this rank's against them."""
    total = first_kv_head + k.shape[2] if total_kv_heads is None else total_kv_heads
    if first_kv_head < 0 or first_kv_head + k.shape[2] > total:
        raise ValueError(f"first_kv_head: {first_kv_head} + {k.shape[2]} KV heads here exceeds total_kv_heads {total}")
    return total


def check_wire(gradient_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of dK and dV on their way, None for the accumulator's."""
    wide = accumulator(dtype)
    if gradient_dtype not in (None, torch.bfloat16, torch.float16, wide):
        raise ValueError(f"gradient_dtype: {gradient_dtype}; must be torch.bfloat16, torch.float16 or {wide}")
    return gradient_dtype
