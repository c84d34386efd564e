"""shard and unshard: inverse of each other, uneven shares, any dim, and their gradients."""

import torch
import torch.distributed as dist

from ringspan.dist_attn import Contiguous, ZigZag, shard, unshard
from ringspan.parallel.testing import run_ranks


def round_trip(group: dist.ProcessGroup, length: int, dim: int) -> list[bool]:
    shape = [3, 3, 3]
    shape[dim] = length
    x = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    good = []
    for layout in (ZigZag(), Contiguous()):
        spans = layout.spans(dist.get_rank(group), dist.get_world_size(group), length)
        index = [p for span in spans for p in range(span.start, span.stop)]
        local = shard(x, layout, group, dim)
        good.append(torch.equal(local, x.index_select(dim, torch.tensor(index, dtype=torch.long))))
        good.append(torch.equal(unshard(local, layout, group, dim, length), x))
    return good


def test_unshard_undoes_shard() -> None:
    for length, dim in ((13, 1), (8, 0), (2, 2)):
        assert all(all(good) for good in run_ranks(round_trip, 3, length, dim))


def gradients(group: dist.ProcessGroup) -> list[bool]:
    rank = dist.get_rank(group)
    x = torch.randn(1, 7, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.arange(14.0).reshape(1, 7, 2)
    (shard(x, ZigZag(), group) * shard(weight, ZigZag(), group)).sum().backward()
    gathered = x.grad is not None and torch.equal(x.grad, weight)  # every rank has the whole gradient
    local = shard(x.detach(), ZigZag(), group).requires_grad_()
    (unshard(local, ZigZag(), group, length=7) * weight).sum().backward()
    sliced = local.grad is not None and torch.equal(local.grad, shard(weight, ZigZag(), group))
    return [gathered, sliced, rank >= 0]


def test_backward_gathers_and_slices() -> None:
    assert all(all(good) for good in run_ranks(gradients, 2))
