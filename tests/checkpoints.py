"""Checkpoints as one process saves and reads them whole; shared by the tests of their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ringspan.finetune import checkpoint, shards


@dataclass(frozen=True)
class Read:
    """A checkpoint that was verified and read whole."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    path: Path


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None, *, keep: int = 3
) -> Path:
    saver = checkpoint.Saver(folder, keep=keep)
    saver.prepare(step)
    saver.begin(step, tensors)
    saver.wait()
    return saver.publish({"mesh": "one rank"}, state or {})


def load(folder: Path) -> Read:
    path = checkpoint.latest(folder)
    assert path is not None
    checkpoint.verify(path)
    found, reader = checkpoint.find(path), shards.Reader(path)
    return Read(found.step, found.state, {name: reader.whole(name) for name in reader.tensors}, path)


def filled(folder: Path, step: int, *, keep: int = 3, value: float = 1.0, numel: int = 64) -> Path:
    import torch

    tensors = {
        "model/w": torch.full((numel,), value),
        "optimizer/w/exp_avg": torch.full((numel,), value + 0.5),
        "rng/0/cpu": torch.get_rng_state(),
    }
    return save(folder, step, tensors, {"data": {"position": step}}, keep=keep)
