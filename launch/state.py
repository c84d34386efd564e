"""What training changes: weights, optimizer, place in the data, step; started fresh or from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ringspan.configs.schema import Config
from ringspan.finetune import checkpoint
from ringspan.finetune.data import SequenceStream
from ringspan.finetune.model import Trained
from ringspan.finetune.optim import rate_at
from ringspan.finetune.shards import Reader
from ringspan.launch import build, engines, saving
from ringspan.launch.ranks import Place
from ringspan.parallel.boundaries import shift_labels
from ringspan.parallel.context import IGNORE
from ringspan.parallel.engine import Engine
from ringspan.parallel.faults import together


@dataclass(frozen=True)
class Step:
    """What a step trains on: this rank's micro-batches, and what all ranks train on together."""

    batches: list[dict[str, Any]]  # ``input_ids``, ``shift_labels`` [B, S], ``document_boundaries``
    scored: int  # tokens with a label, over all micro-batches of all ranks
    tokens: int  # all tokens of them


@dataclass
class State:
    """One rank's training state; ``step``, ``tokens`` and ``skipped`` steps count what is done."""

    trained: Trained
    engine: Engine
    stream: SequenceStream
    step: int = 0
    tokens: int = 0
    skipped: int = 0

    @staticmethod
    def start(config: Config, place: Place, tokenizer: Any, saved: Any | None) -> State:
        """Build everything, and put it where the checkpoint left it.

        Raises:
            Fault: if the checkpoint is of another model, or its data are not the config's.
        """
        trained = together(place.group, "model", lambda: State._model(config, place, saved))
        reader = None if saved is None else Reader(saved.path)
        # Not together with the other ranks: it communicates, and what it refuses, it refuses on all of them.
        engine = engines.make_engine(config, place, trained, reader)
        torch.manual_seed(config.train.seed + place.at("dp_cp"))  # tensor parallel ranks drop the same features
        state = together(place.group, "data", lambda: State(trained, engine, build.make_stream(config, tokenizer)))
        if saved is not None and reader is not None:
            saving.restore(saved, reader, state, place)
        return state

    @staticmethod
    def _model(config: Config, place: Place, saved: Any | None) -> Trained:
        trained = build.make_model(config, place)
        if saved is not None:
            checkpoint.check_same_model(saved.state["fingerprint"], trained.fingerprint())
        return trained

    def next_step(self, config: Config, place: Place) -> Step:
        """Return the data of the next step. Labels are shifted here, before anything is sharded.

        Every rank reads the sequences of all: so the place in the data is one for all of them, a resume on more or
        fewer ranks goes on where the last one stopped, and the count of scored tokens needs no communication.
        """
        each, mine = config.train.batch_size, place.at("dp")
        batches: list[dict[str, Any]] = []
        scored = tokens = 0
        for _ in range(config.train.gradient_accumulation_steps):
            for group in range(place.dp):
                rows = [next(self.stream) for _ in range(each)]
                boundaries = tuple(row.boundaries for row in rows)
                shifted = shift_labels(torch.stack([row.labels for row in rows]), boundaries, IGNORE)
                scored += int((shifted != IGNORE).sum())
                tokens += shifted.numel()
                if group == mine:
                    batches.append(
                        {
                            "input_ids": torch.stack([row.input_ids for row in rows]).to(place.device),
                            "shift_labels": shifted.to(place.device),
                            "document_boundaries": boundaries[0] if len(set(boundaries)) == 1 else boundaries,
                        }
                    )
        return Step(batches, scored, tokens)

    def rate(self, config: Config) -> float:
        """Return the learning rate of the next step."""
        train = config.train
        return train.learning_rate * rate_at(
            self.step, warmup_steps=train.warmup_steps, max_steps=train.max_steps, min_lr_ratio=train.min_lr_ratio
        )
