"""DeepSpeed ZeRO around a model whose sequences are sharded.

To DeepSpeed a rank that holds a shard of a sequence is a data parallel rank like any other: its group is all ranks,
data and sequence together, and nothing is said of sequences. This is right at every stage, where groups of sequences
are not. DeepSpeed averages gradients over the group; the loss is therefore multiplied by its size, and gradients are
sums again.

Checkpoints are ours, not DeepSpeed's: weights and optimizer state come out of it one tensor at a time, whole, and go
into the files that every mesh and both engines read. Nothing is pickled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ringspan.parallel.engine import Saved
from ringspan.parallel.gradients import Sums, total
from ringspan.parallel.scorer import Batch, Scorer
from ringspan.parallel.zero_config import LARGEST_STAGE

_STATE = ("exp_avg", "exp_avg_sq")


class Zero:
    """The engine of a model under ZeRO 1, 2 or 3; an ``engine.Engine``.

    Args:
        scorer: model and loss.
        optimizer: torch's AdamW over the model's parameters.
        config: from ``zero_config.resolve``.
        group: all ranks, which share data and sequence alone.
        device: of the loss.
        saved: a checkpoint, whose weights are taken.
    """

    def __init__(
        self,
        scorer: Scorer,
        optimizer: Optimizer,
        *,
        config: Mapping[str, Any],
        group: dist.ProcessGroup,
        device: torch.device,
        saved: Saved | None = None,
    ) -> None:
        self._scorer, self._group, self._device = scorer, group, device
        self._world = dist.get_world_size(group)
        if saved is not None:  # before the weights are cut
            saved.fill({f"model/{name}": p.detach() for name, p in self._trained()})
        self._engine = _initialize(scorer, optimizer, dict(config), device)
        self._stage = int(config["zero_optimization"]["stage"])
        self._norm = math.nan
        if saved is not None:
            self.restore(saved)

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """See ``Runner``."""
        self._engine.train()
        parts = []
        for number, batch in enumerate(batches):
            part = self._engine(**batch) * scale
            # DeepSpeed averages over the group; over micro-batches it need not, for the scale holds all of them.
            self._engine.backward(part * self._world, scale_wrt_gas=False)
            if number < len(batches) - 1:
                self._engine.step()  # counts the micro-batch; weights change after the last alone
            parts.append(part.detach())
        return torch.stack(parts).sum()

    @torch.no_grad()
    def losses(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """See ``Runner``."""
        self._engine.eval()
        found = self._engine(**batch, each=True)
        self._engine.train()
        return found

    def finish(self, loss: Tensor) -> Sums:
        """See ``Engine``; DeepSpeed has summed the gradients already, and tells their norm."""
        self._norm = self._global_norm()
        squares = torch.tensor(self._norm**2 / self._world, dtype=torch.float64)
        return total(loss, squares, self._group, self._device)

    def step(self, rate: float, norm: float) -> None:
        """See ``Engine``; DeepSpeed clips by the norm that it knows."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()

    def skip(self) -> None:
        """See ``Engine``; DeepSpeed itself leaves a step out whose gradients are not finite."""
        self._engine.step()
        if self._engine.was_step_applied():
            raise RuntimeError(f"DeepSpeed applied gradients of norm {self._norm}, which are not finite")

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See ``Engine``."""
        return self._scorer.model.named_parameters()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """See ``Engine``."""
        return self._scorer.model.named_modules()

    def gradient(self, name: str) -> Tensor | None:
        """See ``Engine``."""
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(dict(self.named_parameters())[name])

    def whole(self, x: Tensor) -> Tensor:
        """See ``Engine``."""
        if not hasattr(x, "ds_id"):  # not cut: at stages 1 and 2 every rank has all weights, after each step
            return x.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([x]):
            return x.detach().clone()

    def saved(self) -> dict[str, Tensor]:
        """See ``Engine``; whole tensors, dealt out over the ranks, of which each keeps its own alone."""
        from deepspeed.utils import safe_get_full_optimizer_state

        out: dict[str, Tensor] = {}
        if self._steps():
            self._link_state()
        rank = dist.get_rank(self._group)
        for number, (name, parameter) in enumerate(self._trained()):
            found: dict[str, Any] = {f"model/{name}": self.whole(parameter)}
            for key in _STATE if self._steps() else ():
                found[f"optimizer/{name}/{key}"] = safe_get_full_optimizer_state(parameter, key)
            if number % self._world == rank:
                out |= {key: tensor.detach().to("cpu", copy=True) for key, tensor in found.items()}
                if steps := self._steps():
                    out[f"optimizer/{name}/step"] = torch.tensor(float(steps))
        return out

    def restore(self, saved: Saved) -> None:
        """See ``Engine``; weights were taken when this was made."""
        counts = [name for name in saved.tensors if name.startswith("optimizer/") and name.endswith("/step")]
        if not counts:
            return
        count = torch.zeros(())
        saved.fill({counts[0]: count})  # one for all, as torch's AdamW has them
        held = self._engine.optimizer
        flat = (
            held.fp32_partitioned_groups_flat if self._stage == LARGEST_STAGE else held.single_partition_of_fp32_groups
        )
        for parameter in flat:
            moments = {key: torch.zeros_like(parameter) for key in _STATE}
            self._inner().state[parameter] = {"step": count.clone(), **moments}
        self._link_state()
        for name, parameter in self._trained():
            for key in _STATE:
                value = torch.zeros(self._shape(parameter))
                saved.fill({f"optimizer/{name}/{key}": value})
                self._set(parameter, key, value.to(self._device))

    def close(self) -> None:
        """Give back what DeepSpeed holds."""
        self._engine.destroy()

    def _set(self, parameter: Any, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage < LARGEST_STAGE:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # By its own part: DeepSpeed's setter of the whole does not know of the padding at its end.
        size, rank = parameter.ds_tensor.numel(), dist.get_rank(self._group)
        flat = torch.cat([value.flatten(), value.new_zeros(size * self._world - value.numel())])
        safe_set_local_optimizer_state(parameter, flat[rank * size : (rank + 1) * size], key)

    def _link_state(self) -> None:
        """Let DeepSpeed find each parameter's part of the optimizer state, whose groups all have it by now.

        It does so itself in the first step, when only the first group has any: the others' stays unknown to it (0.19).
        """
        if self._stage < LARGEST_STAGE:
            held = self._engine.optimizer
            held._hp_optimizer_states_linked = False
            held._lazy_init_hp_params_optimizer_state()  # neither has a public name

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def _shape(self, parameter: Any) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def _inner(self) -> Optimizer:
        return self._engine.optimizer.optimizer

    def _steps(self) -> int:
        counts = [int(state["step"]) for state in self._inner().state.values() if "step" in state]
        return max(counts, default=0)

    def _global_norm(self) -> float:
        held = self._engine.optimizer
        if self._stage == LARGEST_STAGE:
            norms = held._get_norm_groups()
            norm = torch.stack([torch.as_tensor(each, dtype=torch.float64) for each in norms])
            # DeepSpeed marks a norm that is not finite by -1.
            return math.nan if bool((norm < 0).any()) else float(norm.norm())
        norm = float(held.scaled_global_norm())
        return math.nan if norm < 0 else norm


def _initialize(scorer: nn.Module, optimizer: Optimizer, config: dict[str, Any], device: torch.device) -> Any:
    """Return DeepSpeed's engine, quiet; the process group is there already."""
    import logging
    import os

    os.environ.setdefault("LOCAL_RANK", "0")  # it insists on one, and does not use it: the device is set
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it guesses, aloud
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports warns of its own old names
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        engine = deepspeed.initialize(model=scorer, optimizer=optimizer, config=config, dist_init_required=False)[0]
    # At every step it calls torch's collectives by their old names.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return engine
