"""Data parallelism: parameters sharded with FSDP2, or held by every rank; gradients are summed, never averaged.

A rank that holds a shard of the sequence is a data parallel rank with other tokens: both reduce together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard_parameters(
    root: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> None:
    """Shard the parameters of ``root`` over ``mesh`` with FSDP2, in place: each of ``layers`` a unit, the rest another.

    Gradients are summed in fp32 over all of ``mesh``.

    Args:
        root: the module that is called; parameters may be DTensors of tensor parallelism.
        mesh: 1-D, or 2-D with replicas first.
        dtype: what parameters are gathered and computed in; None: as they are.
        offload: keep parameters, gradients and optimizer state in CPU memory.
    """
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }
    for layer in layers:
        fully_shard(layer, **settings)
    fully_shard(root, **settings)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # NCCL's premultiplied sum is not gloo's


def local(x: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """Return all of a tensor, on every rank that holds a part of it; all of them call this."""
    part: Any = x.detach()
    if not isinstance(x, DTensor):
        return part
    kind = x.device_mesh.device_type  # gathered there, where parameters are kept on the host
    return (part if part.device.type == kind else part.to(kind)).full_tensor()


def sum_gradients(
    parameters: Iterable[nn.Parameter],
    group: dist.ProcessGroup | None,
    bucket_bytes: int = 64 << 20,
) -> None:
    """Replace each gradient by its sum over ``group``, in place; a missing one counts as zero.

    The loss is a sum over local tokens divided by the global count, so ranks' gradients are added, never averaged.
    Where parameters are sharded over other ranks, their shards are summed. Small gradients travel together in fp32
    (fp64 stays) buckets of at most ``bucket_bytes``.
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
        grad = local(parameter.grad)
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
