"""Gradients of parameters that every rank holds: summed over the ranks that share the work."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sum_gradients(
    parameters: Iterable[nn.Parameter],
    group: dist.ProcessGroup | None,
    bucket_bytes: int = 64 << 20,
) -> None:
    """Replace each gradient by its sum over ``group``, in place; a missing one counts as zero.

    The loss is a sum over local tokens divided by the global count, so ranks' gradients are added, never averaged.
    Small gradients travel together in fp32 (fp64 stays) buckets of at most ``bucket_bytes``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad
        bytes_ = grad.numel() * max(4, grad.element_size())
        if bucket and (size + bytes_ > bucket_bytes or bucket[0].dtype != grad.dtype):
            _reduce(bucket, group)
            bucket, size = [], 0
        bucket.append(grad)
        size += bytes_
    if bucket:
        _reduce(bucket, group)


def _reduce(grads: list[Tensor], group: dist.ProcessGroup) -> None:
    wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    flat = torch.cat([grad.flatten().to(wide) for grad in grads])
    dist.all_reduce(flat, group=group)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))
