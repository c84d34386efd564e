"""Decoder, head and loss as one module, and who runs it.

What wraps a model (FSDP, ZeRO, a pipeline stage) does its work in the forward of the module that it wraps. Called
apart, decoder and head would be two roots; and a weight they share could belong to one of them only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ringspan.parallel.parts import parts_of

Batch = Mapping[str, Any]
"""One micro-batch of this rank: what ``SequenceContext.shard`` and ``SequenceContext.kwargs`` return, together."""


class Loss(Protocol):
    """How hidden states are scored; ``finetune.loss.ChunkedLoss`` is one."""

    def total(self, hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
        """Return the sum of -log p(label), a scalar with a gradient; hidden [B, L, E], labels [B, L]."""
        ...

    def each(self, hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log p(label) [B, L], 0 where not scored, and whether the label is the likeliest token [B, L]."""
        ...


class Runner(Protocol):
    """Runs a parallel model forward and backward; what wraps the model is its own matter."""

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Add up the gradients of ``scale`` x the sum of losses over all micro-batches; return that sum.

        The result is this rank's part (0 where another rank has the head): losses of ranks are added.
        """
        ...

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Return ``Loss.each`` of a batch, without gradients or dropout; None where another rank has the head."""
        ...


class Scorer(nn.Module):
    """Maps a micro-batch to its loss.

    Args:
        model: a transformers causal LM, or one that peft has wrapped.
        loss: how hidden states are scored.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, *, shift_labels: Tensor, each: bool = False, **inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Return the sum of losses of this rank's tokens, or with ``each`` what ``Loss.each`` returns."""
        parts = parts_of(self.model)
        hidden = parts.decoder(**inputs).last_hidden_state
        score = self._loss.each if each else self._loss.total
        return score(hidden, parts.head, shift_labels)


def reshard(root: nn.Module) -> None:
    """Let FSDP give gathered parameters back after a pass without a backward one, which would otherwise do so.

    Until then they are not the sharded ones that the optimizer and checkpoints know.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Direct:
    """The runner of a model that is whole on its ranks, sharded or not: one forward and backward a micro-batch."""

    def __init__(self, scorer: nn.Module) -> None:
        self._scorer = scorer

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """See ``Runner``."""
        parts = []
        for batch in batches:
            part = self._scorer(**batch) * scale
            part.backward()
            parts.append(part.detach())
        return torch.stack(parts).sum()

    @torch.no_grad()
    def losses(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """See ``Runner``."""
        was_training = self._scorer.training
        self._scorer.eval()
        found = self._scorer(**batch, each=True)
        self._scorer.train(was_training)
        reshard(self._scorer)
        return found
