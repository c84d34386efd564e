"""One optimizer step of a parallel model, after ``parallelize``: gradients complete, measured, clipped, applied.

``Sharded`` is FSDP2's, tensor and pipeline parallelism's; ``zero.Zero`` is DeepSpeed's. A loop need not know which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ringspan.parallel.data import whole
from ringspan.parallel.gradients import Sums, scale, square_sum, total
from ringspan.parallel.optimizer_state import restore_state, state_tensors
from ringspan.parallel.parallelize import Parallel
from ringspan.parallel.scorer import Batch, Runner
from ringspan.parallel.tensor import sum_replicated


class Saved(Protocol):
    """A checkpoint's tensors; ``finetune.shards.Reader`` is one."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """What there is, by name; ``size`` is its shape."""
        ...

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors of this rank, sharded in whatever way, in place."""
        ...


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

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that hold them, under the names of the stock model."""
        ...

    def gradient(self, name: str) -> Tensor | None:
        """Return the whole gradient of one of ``named_parameters``, after ``finish``; all ranks that hold it call."""
        ...

    def whole(self, x: Tensor) -> Tensor:
        """Return all of a parameter or buffer, on every rank that holds a part; all of them call this."""
        ...

    def saved(self) -> dict[str, Tensor]:
        """Return what this rank has to save, by name: model/NAME and optimizer/NAME/KEY, sharded as they are."""
        ...

    def restore(self, saved: Saved) -> None:
        """Put back what all ranks of some mesh have saved."""
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

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """See ``Engine``."""
        return self.parallel.named_modules()

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
        return None if grad is None else self.whole(grad)

    def whole(self, x: Tensor) -> Tensor:
        """See ``Engine``."""
        return whole(x)

    def saved(self) -> dict[str, Tensor]:
        """See ``Engine``."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        state = state_tensors(self.optimizer, named)
        whole = self._place_is_zero()  # of what every rank of a stage has whole, one writes
        mine = {f"optimizer/{name}": value for name, value in state.items() if value.dim() > 0 or whole}
        written = {name for name, parameter in named if self._writes(name, parameter)}
        mine = {name: value for name, value in mine.items() if name.split("/")[1] in written or value.dim() == 0}
        return {f"model/{name}": p.detach() for name, p in named if name in written} | mine

    def restore(self, saved: Saved) -> None:
        """See ``Engine``."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        saved.fill({f"model/{name}": parameter.detach() for name, parameter in named})
        shapes = {name: entry.size for name, entry in saved.tensors.items() if name.startswith("optimizer/")}
        restore_state(self.optimizer, ((f"optimizer/{name}", p) for name, p in named), shapes, saved.fill)

    def _writes(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether this rank saves its part of a parameter, of those that hold the same part."""
        mesh = self.parallel.mesh
        if name in self.parallel.copies:
            return False
        if mesh is None:
            return True
        sharded: set[str] = set()
        if isinstance(parameter, DTensor):
            names = zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True)
            sharded = {axis for axis, placement in names if not placement.is_replicate()}
        return all(mesh.place[axis] == 0 for axis in ("dp_replicate", "dp_shard_cp", "tp") if axis not in sharded)

    def _place_is_zero(self) -> bool:
        mesh = self.parallel.mesh
        return mesh is None or not any(mesh.place[axis] for axis in ("dp_replicate", "dp_shard_cp", "tp"))
