"""Token shards of any size are gathered and scattered, forward and backward, and sums of bf16 are made in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dense import relative_rms
from ringspan.parallel.tensor_moves import gather_tokens, scatter_sum, shares, sum_alike
from ringspan.parallel.testing import run_ranks


def data(length: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What every rank has: [ranks, B, L, E], the whole and its gradient."""
    torch.manual_seed(0)
    return torch.randn(ranks, 2, length, 3, dtype=torch.float64), torch.randn(ranks, 2, length, 3, dtype=torch.float64)


def moved(group: dist.ProcessGroup, length: int) -> list[float]:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    x, grad = data(length, ranks)
    mine = torch.tensor_split(x[0], ranks, dim=1)[rank].clone().requires_grad_()
    whole = gather_tokens(mine, length, group)
    whole.backward(grad[rank])
    assert mine.grad is not None
    partial = x[rank].clone().requires_grad_()
    shard = scatter_sum(partial, group)
    shard.backward(torch.tensor_split(grad[0], ranks, dim=1)[rank])
    assert partial.grad is not None
    assert shares(length, ranks)[rank] == mine.shape[1] == shard.shape[1]
    pairs = [
        (whole, x[0]),
        (mine.grad, torch.tensor_split(grad.sum(0), ranks, dim=1)[rank]),
        (shard, torch.tensor_split(x.sum(0), ranks, dim=1)[rank]),
        (partial.grad, grad[0]),
    ]
    return [relative_rms(found, right) if right.numel() else float(found.numel()) for found, right in pairs]


@pytest.mark.parametrize("length", [1, 3, 8, 45])
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_move_is_the_others_backward(length: int, ranks: int) -> None:
    for errors in run_ranks(moved, ranks, length):
        assert max(errors) <= 1e-15


def rounded(group: dist.ProcessGroup) -> list[float]:
    """1 and three times 2^-9: bf16 would lose each of them beside the 1."""
    small = torch.full((1, 4, 1), 1.0 if dist.get_rank(group) == 0 else 2.0**-9, dtype=torch.bfloat16)
    return [float(scatter_sum(small, group)), str(small.dtype) == str(scatter_sum(small, group).dtype)]


def test_sums_of_bf16_are_rounded_once() -> None:
    for total, kept in run_ranks(rounded, 4):
        assert total == float(torch.tensor(1.0 + 3 * 2.0**-9).bfloat16()) > 1.0
        assert kept


def alike(group: dist.ProcessGroup) -> list[Any]:
    x = torch.full((2,), float(dist.get_rank(group) + 1), requires_grad=True)
    total = sum_alike(x, group)
    total.sum().backward()
    assert x.grad is not None
    return [total.tolist(), x.grad.tolist(), x.tolist()]


def test_a_sum_from_which_all_compute_the_same_has_one_gradient() -> None:
    assert run_ranks(alike, 2) == [[[3.0, 3.0], [1.0, 1.0], [1.0, 1.0]], [[3.0, 3.0], [1.0, 1.0], [2.0, 2.0]]]


def of_another_size(group: dist.ProcessGroup) -> str:
    try:
        gather_tokens(torch.zeros(1, 4, 3), 9, group)
    except ValueError as error:
        return str(error)
    return "gathered"


def test_what_is_not_this_ranks_share_is_refused_before_it_is_sent() -> None:
    said = run_ranks(of_another_size, 4)
    assert said == [
        f"x: 4 tokens on rank {rank} of 4, whose share of 9 is {3 if rank == 0 else 2}" for rank in range(4)
    ]
