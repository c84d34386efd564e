"""Cut a tensor by a layout, and put it together again; both differentiable.

Every rank holds the full tensor before ``shard`` and after ``unshard``. The backward of ``shard`` gathers the shards'
gradients; the backward of ``unshard`` takes this rank's slice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.dist_attn.layout import Layout


def shard(x: Tensor, layout: Layout, group: dist.ProcessGroup | None, dim: int = 1) -> Tensor:
    """Return this rank's tokens of ``x``, in the layout's order.

    Args:
        x: the full tensor, the same on every rank; tokens lie along ``dim``.
        layout: who holds which tokens.
        group: the ranks that share the sequence; None returns all tokens in the layout's order for a world of one.
        dim: the token dimension.
    """
    return _Shard.apply(x, layout, group, dim)  # pyright: ignore[reportReturnType]


def unshard(
    x: Tensor,
    layout: Layout,
    group: dist.ProcessGroup | None,
    dim: int = 1,
    length: int | None = None,
) -> Tensor:
    """Return the full tensor, in global order, from every rank's shard.

    Args:
        x: this rank's tokens along ``dim``.
        layout, group, dim: as given to ``shard``.
        length: global tokens; None means world x local tokens.

    Raises:
        ValueError: if the shard is not this rank's share of ``length``.
    """
    world, rank = _place(group)
    length = world * x.shape[dim] if length is None else length
    share = layout.share(rank, world, length)
    if x.shape[dim] != share:
        raise ValueError(
            f"x: {x.shape[dim]} tokens along dim {dim}, but rank {rank} of {world} holds {share} of {length} in "
            f"{layout}; pass length= where shares are uneven"
        )
    return _Unshard.apply(x, layout, group, dim, length)  # pyright: ignore[reportReturnType]


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, group: dist.ProcessGroup | None, dim: int) -> Tensor:
        ctx.layout, ctx.group, ctx.dim, ctx.length = layout, group, dim, x.shape[dim]
        return _slice(x, layout, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(grads[0], ctx.layout, ctx.group, ctx.dim, ctx.length), None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, group: dist.ProcessGroup | None, dim: int, length: int) -> Tensor:
        ctx.layout, ctx.group, ctx.dim = layout, group, dim
        return _gather(x, layout, group, dim, length)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _slice(grads[0], ctx.layout, ctx.group, ctx.dim), None, None, None, None


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))


def _slice(x: Tensor, layout: Layout, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    world, rank = _place(group)
    spans = layout.spans(rank, world, x.shape[dim])
    parts = [x.narrow(dim, span.start, span.size) for span in spans] or [x.narrow(dim, 0, 0)]
    return torch.cat(parts, dim)


def _gather(x: Tensor, layout: Layout, group: dist.ProcessGroup | None, dim: int, length: int) -> Tensor:
    world, _ = _place(group)
    shares = [layout.share(rank, world, length) for rank in range(world)]
    local = x.movedim(dim, 0)
    if group is None or world == 1:
        shards = [local]
    else:
        # Collectives want equal sizes: pad to the largest share; the padding never leaves this function.
        padded = local.new_zeros((max(shares), *local.shape[1:]))
        padded[: local.shape[0]] = local
        gathered = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(gathered, padded, group=group)
        shards = [each[:size] for each, size in zip(gathered, shares, strict=True)]
    full = x.new_empty((length, *local.shape[1:]))
    for rank, each in enumerate(shards):
        row = 0
        for span in layout.spans(rank, world, length):
            full[span.start : span.stop] = each[row : row + span.size]
            row += span.size
    return full.movedim(0, dim).contiguous()
