"""What training changes: weights, optimizer, place in the data, step. Started fresh or from a checkpoint, and saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ringspan.configs.schema import Config
from ringspan.finetune import checkpoint
from ringspan.finetune.data import SequenceStream
from ringspan.finetune.model import Trained, trainable_state
from ringspan.finetune.optim import build_optimizer, rate_at
from ringspan.launch import build
from ringspan.launch.ranks import Place
from ringspan.parallel.boundaries import shift_labels
from ringspan.parallel.context import IGNORE
from ringspan.parallel.faults import Fault, together


@dataclass
class State:
    """One rank's training state; ``step`` and ``tokens`` count what is done."""

    trained: Trained
    named: list[tuple[str, nn.Parameter]]
    optimizer: AdamW
    stream: SequenceStream
    step: int = 0
    tokens: int = 0

    @staticmethod
    def start(config: Config, place: Place, tokenizer: Any, saved: checkpoint.Checkpoint | None) -> State:
        """Build everything, and put it where the checkpoint left it.

        Raises:
            Fault: if the checkpoint is of another model, or its data are not the config's.
        """
        trained = build.make_model(config, place)
        named = list(trained.model.named_parameters())
        train = config.train
        optimizer = build_optimizer(named, betas=(train.adam_beta1, train.adam_beta2), weight_decay=train.weight_decay)
        state = State(trained, named, optimizer, build.make_stream(config, tokenizer))
        if saved is not None:
            checkpoint.check_same_model(saved.state["fingerprint"], trained.fingerprint())
            trained.model.load_state_dict(saved.model, strict=False)
            checkpoint.restore_optimizer(optimizer, named, saved.optimizer)
            state.stream.load_state_dict(saved.state["data"])
            state.step, state.tokens = saved.step, saved.state["tokens"]
            _restore_rng(saved.rng, place)
        return state

    def next_batches(self, config: Config, place: Place) -> list[dict[str, Any]]:
        """Return the micro-batches of the next step: ``input_ids``, ``shift_labels`` [B, S], ``document_boundaries``.

        Labels are shifted here, before anything is sharded.
        """
        batches: list[dict[str, Any]] = []
        for _ in range(config.train.gradient_accumulation_steps):
            rows = [next(self.stream) for _ in range(config.train.batch_size)]
            boundaries = tuple(row.boundaries for row in rows)
            shifted = shift_labels(torch.stack([row.labels for row in rows]), boundaries, IGNORE)
            batch = {
                "input_ids": torch.stack([row.input_ids for row in rows]).to(place.device),
                "shift_labels": shifted.to(place.device),
                "document_boundaries": boundaries[0] if len(set(boundaries)) == 1 else boundaries,
            }
            batches.append(batch)
        return batches

    def update(self, config: Config) -> float:
        """Apply the gradients and return the learning rate that was used."""
        train = config.train
        factor = rate_at(
            self.step, warmup_steps=train.warmup_steps, max_steps=train.max_steps, min_lr_ratio=train.min_lr_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return train.learning_rate * factor

    def save(self, config: Config, place: Place) -> None:
        """Write a checkpoint: rank 0 writes, and all ranks stop if it cannot."""
        rng = _gather_rng(place)

        def write() -> None:
            if place.rank == 0:
                checkpoint.save(
                    checkpoints(config),
                    self.step,
                    model=trainable_state(self.trained.model),
                    optimizer=checkpoint.optimizer_tensors(self.optimizer, self.named),
                    state={
                        "tokens": self.tokens,
                        "data": self.stream.state_dict(),
                        "fingerprint": self.trained.fingerprint(),
                    },
                    rng=rng,
                    keep=config.checkpoint.keep,
                )

        together(place.group, f"save of step {self.step}", write)


def checkpoints(config: Config) -> Path:
    """Return the run's folder of checkpoints."""
    return Path(config.train.output_dir) / "checkpoints"


def find_checkpoint(config: Config) -> checkpoint.Checkpoint | None:
    """Return the latest checkpoint of the run folder, or None to start afresh.

    Raises:
        Fault: if the latest is damaged, or checkpoint.resume is never and there is one.
    """
    folder = checkpoints(config)
    if checkpoint.latest(folder) is None:
        return None
    if config.checkpoint.resume == "never":
        raise Fault(
            f"checkpoint.resume: never, but {folder} holds checkpoints; choose another train.output_dir, "
            "delete that folder, or resume with --checkpoint.resume auto"
        )
    return checkpoint.load(folder)


def scored_tokens(batch: dict[str, Any]) -> int:
    """Return how many tokens of the whole sequences carry loss. Every rank holds all labels, so none has to ask."""
    return int((batch["shift_labels"] != IGNORE).sum())


def _gather_rng(place: Place) -> dict[str, Tensor]:
    """Return every rank's random state by name, on every rank."""
    states = {"cpu": torch.get_rng_state()}
    if place.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(place.device)
    named: dict[str, Tensor] = {}
    for kind, state in states.items():
        named |= {f"rank{rank}.{kind}": each for rank, each in enumerate(place.gather(state))}
    return named


def _restore_rng(named: dict[str, Tensor], place: Place) -> None:
    """Set this rank's random state; a rank that the saved world did not have takes rank 0's."""
    for kind in ("cpu", "cuda"):
        state = named.get(f"rank{place.rank}.{kind}", named.get(f"rank0.{kind}"))
        if state is not None and kind == "cpu":
            torch.set_rng_state(state.clone())
        elif state is not None and place.device.type == "cuda":
            torch.cuda.set_rng_state(state.clone(), place.device)
