"""Small parts of a training step: batches from sequences, the count of scored tokens, the state of random numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.configs.schema import Config
from ringspan.finetune.data import SequenceStream
from ringspan.launch.ranks import Place
from ringspan.parallel.context import IGNORE
from ringspan.parallel.documents import shift_labels


def collate(stream: SequenceStream, config: Config) -> dict[str, Any]:
    """Return the next micro-batch: ``input_ids`` and ``shift_labels`` [B, S], ``document_boundaries`` per row."""
    rows = [next(stream) for _ in range(config.train.batch_size)]
    boundaries = tuple(row.boundaries for row in rows)
    shifted = shift_labels(torch.stack([row.labels for row in rows]), boundaries, IGNORE)
    return {
        "input_ids": torch.stack([row.input_ids for row in rows]),
        "shift_labels": shifted,
        "document_boundaries": boundaries[0] if len(set(boundaries)) == 1 else boundaries,
    }


def scored_tokens(batch: dict[str, Any]) -> int:
    """Return how many tokens of the whole sequence carry loss. Every rank holds all labels, so none has to ask."""
    return int((batch["shift_labels"] != IGNORE).sum())


def gather_rng(place: Place) -> dict[str, Tensor]:
    """Return every rank's random state by name, on every rank."""
    states = {"cpu": torch.get_rng_state()}
    if place.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(place.device)
    named: dict[str, Tensor] = {}
    for kind, state in states.items():
        gathered = [torch.empty_like(state) for _ in range(place.world)]
        if place.group is None:
            gathered = [state]
        else:
            dist.all_gather(gathered, state, group=place.group)
        named |= {f"rank{rank}.{kind}": each for rank, each in enumerate(gathered)}
    return named


def restore_rng(named: dict[str, Tensor], place: Place) -> None:
    """Set this rank's random state; a rank that the saved world did not have takes rank 0's."""
    for kind in ("cpu", "cuda"):
        state = named.get(f"rank{place.rank}.{kind}", named.get(f"rank0.{kind}"))
        if state is not None and kind == "cpu":
            torch.set_rng_state(state)
        elif state is not None and place.device.type == "cuda":
            torch.cuda.set_rng_state(state, place.device)
