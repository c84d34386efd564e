"""Runs of tiny models on tiles, shared by the tests of tiled MLPs."""

from typing import Any

import torch
import torch.distributed as dist
from tiny_layers import LENGTH, context_of, sharded
from torch import Tensor

from dense import relative_rms
from ringspan.parallel.parts import parts_of
from ringspan.parallel.recompute import checkpoint_layers, keeps_attention

EDGES = [0, 10, 11, 30, 45]
TOKENS = 2 * LENGTH


def mlps(model: Any) -> list[Any]:
    return [layer.mlp for layer in parts_of(model).layers]


def rows_seen(model: Any) -> list[int]:
    """The rows of every call of a gate projection, once the model runs."""
    seen: list[int] = []
    for mlp in mlps(model):
        mlp.gate_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, -2).shape[0]))
    return seen


def run(model: Any, group: dist.ProcessGroup | None = None, mode: Any = "none") -> dict[str, Tensor]:
    checkpoint_layers(parts_of(model).layers, mode)
    context = context_of(group, "zigzag", keep_attention=keeps_attention(mode))
    loss, found = sharded(model, context, EDGES, None)
    return {"loss": torch.tensor(loss), **found}


def worst_of(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert found.keys() == truth.keys()
    return max(relative_rms(found[name], each) for name, each in truth.items() if each.any())
