"""AdamW, linear warm-up, cosine decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], *, betas: tuple[float, float], weight_decay: float
) -> AdamW:
    """Return AdamW over the trainable parameters; weight decay skips vectors (norms, biases).

    The learning rate is set before each step from ``rate_at``: a function of the step has no state to save.
    """
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for _, parameter in named:
        if parameter.requires_grad:
            # Torch's fused updates of several parameters at once take those of one mesh.
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((parameter.dim() > 1, mesh), []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "weight_decay": weight_decay if matrix else 0.0}
            for (matrix, _), parameters in groups.items()
        ],
        lr=0.0,
        betas=betas,
    )


def rate_at(step: int, *, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """Return the share of the learning rate that step ``step`` (from 0) uses.

    Up in a line over ``warmup_steps``, then down in a cosine to ``min_lr_ratio`` at ``max_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
