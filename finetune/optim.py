"""AdamW, linear warm-up, cosine decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], *, betas: tuple[float, float], weight_decay: float
) -> AdamW:
    """Return AdamW over the trainable parameters; weight decay skips vectors (norms, biases).

    The learning rate is set before each step from ``rate_at``: a function of the step has no state to save.
    """
    trainable = [p for _, p in named if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas)


def rate_at(step: int, *, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """Return the share of the learning rate that step ``step`` (from 0) uses.

    Up in a line over ``warmup_steps``, then down in a cosine to ``min_lr_ratio`` at ``max_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
