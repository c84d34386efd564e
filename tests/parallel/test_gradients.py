"""Norms over shards, replicas and stages are those of whole gradients; what is not finite is named by rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ringspan.parallel.data import shard_parameters
from ringspan.parallel.gradients import copies, scale, square_sum, total
from ringspan.parallel.mesh import Sizes, mesh_of
from ringspan.parallel.testing import run_ranks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def truth() -> tuple[float, list[list[float]]]:
    model = net()
    model(torch.arange(5.0)[None]).square().sum().backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    return norm, [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None]


def on_mesh(group: dist.ProcessGroup, replicas: int, shards: int, tp: int) -> tuple[float, list[list[float]]]:
    """The parameters are made the true gradients, cut, and then taken for their own gradients."""
    mesh, model = mesh_of(Sizes(dp_replicate=replicas, dp_shard=shards, tp=tp), "cpu"), net()
    model(torch.arange(5.0)[None]).square().sum().backward()
    for layer in model:
        assert isinstance(layer, nn.Linear)
        for name, parameter in list(layer.named_parameters()):
            assert parameter.grad is not None
            grad = parameter.grad
            if tp > 1 and name == "weight":
                grad = distribute_tensor(grad, mesh["tp"], [Shard(0)])
            setattr(layer, name, nn.Parameter(grad))
    if mesh.shards.size() > 1:
        shard_parameters(model, list(model), mesh.shards)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    found = total(torch.tensor(1.0), square_sum(model.parameters(), 4), group, torch.device("cpu"))
    scale(model.parameters(), found.norm, 0.5)
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return found.norm, [grad.flatten().tolist() for grad in grads if grad is not None]


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 1, 4), (1, 2, 2), (2, 1, 2)])
def test_the_norm_of_shards_is_the_norm_of_the_whole(shape: tuple[int, int, int]) -> None:
    norm, clipped = truth()
    for found, grads in run_ranks(on_mesh, 4, *shape):
        assert found == pytest.approx(norm, rel=1e-6)
        for mine, right in zip(grads, clipped, strict=True):
            assert mine == pytest.approx(right, rel=1e-5)


def flags(group: dist.ProcessGroup, bad: dict[str, list[float]]) -> list[Any]:
    rank = str(dist.get_rank(group))
    loss, square = bad.get(rank, [1.0, 4.0])
    found = total(torch.tensor(loss), torch.tensor(square, dtype=torch.float64), group, torch.device("cpu"))
    return [list(found.bad), found.loss, found.norm]


def test_a_nan_on_any_rank_is_named_and_infinities_do_not_cancel() -> None:
    for names, loss, norm in run_ranks(flags, 3, {"1": [math.nan, 4.0]}):
        assert names == [1]
        assert math.isnan(loss)
        assert norm == pytest.approx(math.sqrt(12))
    for names, *_ in run_ranks(flags, 3, {"0": [math.inf, 4.0], "2": [-math.inf, math.inf]}):
        assert names == [0, 2]
    assert run_ranks(flags, 2, {})[0] == [[], 2.0, math.sqrt(8)]


def test_copies_of_a_plain_parameter_are_all_the_ranks_of_its_stage() -> None:
    assert copies(torch.zeros(3), 8) == 8
    assert float(square_sum([], 8)) == 0.0
