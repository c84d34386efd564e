"""An optimizer's state by the names of parameters, so that it can be saved from one mesh and put back on another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Named = Iterable[tuple[str, nn.Parameter]]


def state_tensors(optimizer: Optimizer, named: Named) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter: NAME/exp_avg, NAME/exp_avg_sq, NAME/step.

    Learning rates and other settings are not state: the schedule and the config bring them back.
    """
    out = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {key!r} of {name} is no tensor: {type(value)}")
            out[f"{name}/{key}"] = value
    return out


def restore_state(
    optimizer: Optimizer, named: Named, saved: Mapping[str, torch.Size], fill: Callable[[dict[str, Tensor]], None]
) -> None:
    """Put back what ``state_tensors`` returned, bit for bit; parameter groups stay as they are now.

    Args:
        saved: the names in the checkpoint, with their shapes.
        fill: fills tensors by name, in place, from the checkpoint.
    """
    wanted: dict[str, Tensor] = {}
    for name, parameter in named:
        keys = [full for full in saved if full.rpartition("/")[0] == name]
        for full in keys:
            # A scalar, as AdamW's count of steps, is whole on every rank; the rest is sharded as the parameter is.
            whole = len(saved[full]) == 0
            wanted[full] = torch.zeros((), dtype=torch.float32) if whole else torch.zeros_like(parameter)
            optimizer.state[parameter][full.rpartition("/")[2]] = wanted[full]
    fill(wanted)
