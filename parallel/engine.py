"""One optimizer step of a parallel model, after ``parallelize``: gradients complete, measured, clipped, applied.

``Sharded`` is FSDP2's, tensor and pipeline parallelism's; ``zero.Zero`` is DeepSpeed's. A training loop need not know which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ringspan.parallel.gradients import Sums, copies, local, scale, square_sum, total
from ringspan.parallel.parallelize import Parallel
from ringspan.parallel.scorer import Batch, Runner
from ringspan.parallel.tensor import sum_replicated


class Engine(Runner, Protocol):
    """Runs a model and changes it: ``backward``, then ``finish``, then ``step`` or ``skip``."""

    def finish(self, loss: Tensor) -> Sums:
        """Complete the gradients over all ranks; return the sums of loss and norm, before clipping, on every rank."""
        ...

    def step(self, rate: float, norm: float) -> None:
        """Clip by the norm that ``finish`` returned, and apply the gradients with this learning rate."""
        ...

    def skip(self) -> None:
        """Forget the gradients; weights and optimizer state stay as they are."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what this rank holds, in whole or in part, under the names of the stock model."""
        ...

    def gradient(self, name: str) -> Tensor | None:
        """Return the whole gradient of one of ``named_parameters``, after ``finish``; all ranks that hold it call this."""
        ...


class Sharded:
    """The engine of a model that ``parallelize`` has cut.

    Args:
        parallel: the model on this rank.
        optimizer: over its parameters.
        max_norm: gradients are clipped to this norm.
        group: all ranks; None for one process.
        device: of the loss.
    """

    def __init__(
        self,
        parallel: Parallel,
        optimizer: Optimizer,
        *,
        max_norm: float,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.parallel, self.optimizer = parallel, optimizer
        self._max_norm, self._group, self._device = max_norm, group, device
        sizes = parallel.mesh.sizes if parallel.mesh is not None else None
        self._ranks = sizes.world // sizes.pp if sizes is not None else 1  # that hold a parameter, in whole or in part

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """See ``Runner``."""
        return self.parallel.runner.backward(batches, scale)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """See ``Runner``."""
        return self.parallel.runner.losses(batch)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See ``Engine``."""
        return self.parallel.named_parameters()

    def finish(self, loss: Tensor) -> Sums:
        """See ``Engine``."""
        mesh, pipeline = self.parallel.mesh, self.parallel.pipeline
        tp = 1
        if mesh is not None and mesh.sizes.tp > 1:
            tp = mesh.sizes.tp
            sum_replicated([p for _, p in self.named_parameters()], mesh["tp"].get_group())
        if pipeline is not None:
            pipeline.sum_tied()
        counted = [p for name, p in self.named_parameters() if name not in self.parallel.copies]
        # Tensor parallel ranks have the same tokens and so the same loss.
        return total(loss / tp, square_sum(counted, self._ranks), self._group, self._device)

    def step(self, rate: float, norm: float) -> None:
        """See ``Engine``."""
        scale((p for _, p in self.named_parameters()), norm, self._max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        """See ``Engine``."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, name: str) -> Tensor | None:
        """See ``Engine``."""
        grad = dict(self.named_parameters())[name].grad
        return grad.full_tensor() if isinstance(grad, DTensor) else grad

    def writes(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether this rank is the one to save its part of a parameter, of those outside its mesh that hold the same."""
        mesh = self.parallel.mesh
        if mesh is None or name in self.parallel.copies:
            return mesh is None
        axes = set(parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else set()
        return all(mesh.place[axis] == 0 for axis in ("dp_replicate", "dp_shard_cp", "tp") if axis not in axes)


__all__ = ["Engine", "Sharded", "copies", "local"]
