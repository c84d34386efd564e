"""AdamW, linear warm-up, cosine decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> AdamW:
    """Return AdamW over the trainable parameters; weight decay skips vectors (norms, biases)."""
    trainable = [(name, p) for name, p in named if p.requires_grad]
    groups = [
        {"params": [p for _, p in trainable if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas)


def build_schedule(optimizer: AdamW, *, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> LambdaLR:
    """Return the schedule: up in a line over ``warmup_steps``, down in a cosine to ``min_lr_ratio``."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)
