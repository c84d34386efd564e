"""Weights of which each rank holds a part, and modules that run on their rank's part of them.

A weight that is shared out is a DTensor, so that whoever saves it, sums its gradient or takes its norm knows what it
is. Its module computes with plain tensors: for the time of a call the rank's part stands in the weight's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

AXIS = "tp"  # the name of the mesh's axis, by which a weight that is also cut by FSDP is known


@dataclass(frozen=True)
class Rows:
    """The part [start, stop) of a vocabulary of ``size`` tokens."""

    start: int
    stop: int
    size: int

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of each id in this part (0 where another part has it), and which ids this part has.

        An id outside of the vocabulary keeps a row that no part has, so that looking it up fails on every rank.
        """
        here = (ids >= self.start) & (ids < self.stop)
        elsewhere = (ids >= 0) & (ids < self.size) & ~here
        return torch.where(elsewhere, 0, torch.where(ids < 0, ids, ids - self.start)), here


def rows_of(size: int, ranks: int, rank: int) -> Rows:
    """Return which of ``size`` rows a rank holds, as DTensor's ``Shard(0)`` cuts."""
    chunk = -(-size // ranks)
    start = min(size, rank * chunk)
    return Rows(start, min(size, start + chunk), size)


def cut(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    """Make a weight that every rank holds a DTensor, cut along ``dim``; nothing is sent."""
    whole = getattr(module, name)
    part = distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None)
    setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def run_locally(module: nn.Module, bias_factor: float | None = None) -> None:
    """Let a module's forward find its rank's part of each weight in its place.

    Args:
        module: weights in its submodules are theirs.
        bias_factor: what a bias that is not cut is multiplied with: where results are partial sums, one rank adds it.
    """
    run: Callable[..., Any] = module.forward

    @wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        held = dict(module._parameters)
        local: dict[str, Any] = {}
        for name, parameter in held.items():
            if isinstance(parameter, DTensor):
                local[name] = parameter.to_local()
            elif name == "bias" and parameter is not None and bias_factor is not None:
                local[name] = parameter * bias_factor
        try:
            module._parameters.update(local)
            return run(*args, **kwargs)
        finally:
            module._parameters.update(held)

    module.forward = forward


def is_cut(parameter: Tensor) -> bool:
    """Whether a parameter is shared out over the tensor parallel ranks; FSDP may have cut it too."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(name == AXIS and not p.is_replicate() for name, p in zip(names, parameter.placements, strict=True))
