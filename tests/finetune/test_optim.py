"""The schedule's shape, and which parameters decay."""

import math

import pytest
import torch
from torch import nn

from ringspan.finetune.optim import build_optimizer, rate_at


def test_warmup_then_cosine_to_the_floor() -> None:
    rates = [rate_at(step, warmup_steps=4, max_steps=12, min_lr_ratio=0.1) for step in range(14)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0)
    assert rates[8] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[12] == rates[13] == pytest.approx(0.1)
    assert rate_at(0, warmup_steps=0, max_steps=12, min_lr_ratio=0.1) == 1.0


def test_only_matrices_decay_and_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[2].weight.requires_grad_(False)
    groups = build_optimizer(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.1, 1),
        (0.0, 4),
    ]
    assert all(isinstance(p, torch.Tensor) and p.requires_grad for group in groups for p in group["params"])
