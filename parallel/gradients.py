"""The norm of all gradients, whoever holds them, and what is not finite in them.

Each rank adds up what it holds, divided by how many ranks hold the same, and one sum over all ranks gives the square of
the norm: alike on every rank, for any mixture of FSDP shards, tensor parallel shards, replicas and pipeline stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ringspan.parallel.data import local


@dataclass(frozen=True)
class Sums:
    """What ``total`` found: the loss and the norm of all ranks, and the ranks where one of them was not finite."""

    loss: float
    norm: float
    bad: tuple[int, ...]


def copies(parameter: Tensor, ranks: int) -> int:
    """Return how many of the ``ranks`` that hold a parameter hold the same part of it as this one."""
    if not isinstance(parameter, DTensor):
        return ranks
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return ranks // prod(size for placement, size in sizes if not placement.is_replicate())


def square_sum(parameters: Iterable[nn.Parameter], ranks: int) -> Tensor:
    """Return this rank's share of the squared norm, fp64; summed over all ranks it is the whole.

    Args:
        parameters: those to count here; a tied weight's second copy is left out by the caller.
        ranks: how many ranks hold each parameter, in whole or in part: those of a pipeline stage.
    """
    parts = [
        local(parameter.grad).double().square().sum() / copies(parameter, ranks)
        for parameter in parameters
        if parameter.grad is not None
    ]
    return torch.stack(parts).sum().cpu() if parts else torch.zeros((), dtype=torch.float64)


def total(loss: Tensor, squares: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Sums:
    """Sum loss and squared norm over all ranks, with a flag of each rank where its part is not finite.

    Flags are summed: a maximum may lose a NaN, and a sum of losses does not say whose it was.
    """
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    row = torch.zeros(2 + world, dtype=torch.float64)
    row[0], row[1] = loss.detach().double().cpu(), squares
    row[2 + rank] = float(not math.isfinite(row[0]) or not math.isfinite(row[1]))
    row = row.to(device)
    if group is not None:
        dist.all_reduce(row, group=group)
    values = row.tolist()
    bad = tuple(index for index, flag in enumerate(values[2:]) if flag)
    return Sums(values[0], math.sqrt(values[1]) if values[1] >= 0 else math.nan, bad)


@torch.no_grad()
def scale(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Multiply all gradients so that their norm is at most ``limit``, as torch's clip_grad_norm_ does."""
    factor = min(1.0, limit / (norm + 1e-6))
    if factor < 1.0:
        for grad in _grads(parameters):
            grad.mul_(factor)


def _grads(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    return (local(p.grad) for p in parameters if p.grad is not None)
