"""What tensor parallel ranks send each other: token shards gathered, partial sums scattered; each the other's backward.

Between blocks a hidden state is a shard of this rank's tokens, so that norms and residuals are computed and kept once
(sequence parallelism, Korthikanti et al. 2022, section 4.2.2). Shards differ by one token where the tokens do not
divide, and may be empty; padding stays inside the transport.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them, and warns of the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shares(tokens: int, ranks: int) -> list[int]:
    """Return how many of ``tokens`` each rank holds: the first ones one more, where they do not divide."""
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


def gather_tokens(x: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
    """Return all ``tokens`` [B, L, E] of the shards x [B, l, E]; the backward sums gradients and scatters them.

    Raises:
        ValueError: if x is not this rank's share.
    """
    return _Gather.apply(x, tokens, group)  # pyright: ignore[reportReturnType]


def scatter_sum(x: Tensor, group: dist.ProcessGroup, *, recompute_first: bool = False) -> Tensor:
    """Return this rank's shard [B, l, E] of the sum of all ranks' x [B, L, E]; the backward gathers.

    Args:
        x: this rank's part of the sum.
        group: the ranks.
        recompute_first: where checkpointing recomputes x, let the backward do so before it gathers. It is required
            where what follows depends on a rank's tokens: experts that see none are in no graph, and ranks that
            recompute at different times would meet in different calls.
    """
    return _Scatter.apply(x, group, recompute_first)  # pyright: ignore[reportReturnType]


def sum_alike(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of all ranks' x, from which all compute the same: a gradient is everybody's and stays as it is."""
    return _Sum.apply(x, group)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, tokens, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(grads[0], ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, recompute_first: bool) -> Tensor:
        ctx.group, ctx.tokens = group, x.shape[1]
        if recompute_first:
            ctx.save_for_backward(x.new_empty(0))
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _ = ctx.saved_tensors  # reading it recomputes
        return _gathered(grads[0], ctx.tokens, ctx.group), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        del ctx
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


def _gathered(x: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
    sizes, rank = shares(tokens, dist.get_world_size(group)), dist.get_rank(group)
    if x.shape[1] != sizes[rank]:
        raise ValueError(
            f"x: {x.shape[1]} tokens on rank {rank} of {len(sizes)}, whose share of {tokens} is {sizes[rank]}"
        )
    mine = _padded(x, sizes[0])
    parts = mine.new_empty(len(sizes) * mine.shape[0], *mine.shape[1:])
    _all_gather(parts, mine, group=group)
    parts = parts.unflatten(0, (len(sizes), -1))
    if sizes[0] == sizes[-1]:
        return parts.transpose(0, 1).flatten(1, 2)  # for one row a view
    return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    sizes = shares(x.shape[1], dist.get_world_size(group))
    wide = x if x.dtype == torch.float64 else x.float()  # sums of bf16 would round at every rank
    parts = torch.cat([_padded(part, sizes[0]) for part in wide.split(sizes, dim=1)])
    mine = parts.new_empty(x.shape[0], *parts.shape[1:])
    _reduce_scatter(mine, parts, group=group)
    return mine[:, : sizes[dist.get_rank(group)]].to(x.dtype)


def _padded(x: Tensor, tokens: int) -> Tensor:
    """Return x [B, l, E] with zeros up to ``tokens``, contiguous."""
    if x.shape[1] == tokens:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(x.shape[0], tokens - x.shape[1], x.shape[2])], dim=1)
