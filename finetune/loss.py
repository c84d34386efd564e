"""Cross-entropy without the logits: the head and the softmax run on a few tokens at a time.

For a million tokens and a vocabulary of 128K the logits would take 500 GB. Each chunk is checkpointed, so its logits
live only while it is computed, forward and again backward. (torch 2.13's ``linear_cross_entropy`` does the same for a
plain linear head; a LoRA on the head, and torch before 2.13, need the module itself to be called.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringspan.finetune.packing import IGNORED
from ringspan.parallel.tensor import vocabulary_rows
from ringspan.parallel.tensor_moves import gather_tokens, sum_alike


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Module, labels: Tensor, *, chunk: int, ignore: int = IGNORED
) -> Tensor:
    """Return the sum over tokens of -log p(label), a scalar in fp32 (fp64 for fp64).

    The caller divides by the *global* count of scored tokens, which no rank can know from its shard.

    Args:
        hidden: [B, L, E] last hidden states; head: maps [..., E] to logits [..., V].
        labels: [B, L], already shifted; ``ignore`` where not scored.
        chunk: tokens whose logits exist at once.
    """
    flat, targets = hidden.flatten(0, 1), labels.flatten()
    wide = _wide(hidden)
    # Keeps the graph connected where a shard has no scored token.
    total = (flat[:1].sum() * 0).to(wide)
    for part, target in zip(flat.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_sum, part, head, target, ignore, wide, use_reentrant=False)  # pyright: ignore[reportOperatorIssue]
    return total


def token_losses(hidden: Tensor, head: nn.Module, labels: Tensor, *, chunk: int, ignore: int = IGNORED) -> Tensor:
    """Return -log p(label) per token [B, L] (0 where not scored), for evaluation; no gradient."""
    flat, targets = hidden.flatten(0, 1), labels.flatten()
    with torch.no_grad():
        parts = [
            F.cross_entropy(head(part).float(), target, ignore_index=ignore, reduction="none")
            for part, target in zip(flat.split(chunk), targets.split(chunk), strict=True)
        ]
    return torch.cat(parts).view_as(labels)


def _sum(hidden: Tensor, head: nn.Module, target: Tensor, ignore: int, wide: torch.dtype) -> Tensor:
    return F.cross_entropy(head(hidden).to(wide), target, ignore_index=ignore, reduction="sum")


class ChunkedLoss:
    """Scores hidden states by chunks of tokens; fulfils ``parallel.scorer.Loss``.

    Args:
        chunk: tokens whose logits exist at once.
        group: tensor parallel ranks that share the vocabulary; hidden states are then shards [B, l, E] of the tokens
            that labels [B, L] have, and every rank gets the whole result.
    """

    def __init__(self, chunk: int, group: dist.ProcessGroup | None = None) -> None:
        self._chunk, self._group = chunk, group

    def total(self, hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
        """Return the sum of -log p(label)."""
        if self._group is None:
            return chunked_cross_entropy(hidden, head, labels, chunk=self._chunk)
        flat, targets = gather_tokens(hidden, labels.shape[1], self._group).flatten(0, 1), labels.flatten()
        total = (flat[:1].sum() * 0).to(_wide(hidden))
        for part, target in zip(flat.split(self._chunk), targets.split(self._chunk), strict=True):
            total = total + checkpoint(self._shared_sum, part, head, target, use_reentrant=False)  # pyright: ignore[reportOperatorIssue]
        return total

    @torch.no_grad()
    def each(self, hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log p(label) [B, L], 0 where not scored, and whether the label is the likeliest token."""
        if self._group is not None:
            hidden = gather_tokens(hidden, labels.shape[1], self._group)
        score = self._each if self._group is None else self._shared_each
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        parts = zip(flat.split(self._chunk), targets.split(self._chunk), strict=True)
        losses, likeliest = zip(*(score(part, head, target) for part, target in parts), strict=True)
        return torch.cat(losses).view_as(labels), (torch.cat(likeliest) == targets).view_as(labels)

    def _each(self, hidden: Tensor, head: nn.Module, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        loss = F.cross_entropy(logits.to(_wide(logits)), target, ignore_index=IGNORED, reduction="none")
        return loss, logits.argmax(-1)

    def _shared_sum(self, hidden: Tensor, head: nn.Module, target: Tensor) -> Tensor:
        return _vocabulary_parallel(hidden, head, target, self._group)[0].sum()

    def _shared_each(self, hidden: Tensor, head: nn.Module, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits, top = _vocabulary_parallel(hidden, head, target, self._group)
        best, row = logits.max(-1)
        none = torch.iinfo(torch.int64).max
        likeliest = torch.where(best == top, row + vocabulary_rows(head).start, none)
        dist.all_reduce(likeliest, dist.ReduceOp.MIN, self._group)  # of equals the first, as argmax has it
        return loss, likeliest


def _vocabulary_parallel(
    hidden: Tensor, head: nn.Module, target: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss of each token, this rank's logits, their maximum over all ranks); hidden [N, E], target [N].

    Of the vocabulary each rank has a part: the maximum, the sum of exponentials and the label's logit are put together.
    """
    assert group is not None, "one rank has the whole vocabulary"
    logits = head(hidden)
    logits = logits.to(_wide(logits))
    top = logits.detach().max(-1).values
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    scored = target != IGNORED
    row, here = vocabulary_rows(head).find(torch.where(scored, target, 0))
    picked = logits.gather(1, row[:, None])[:, 0] * here
    exponentials, picked = sum_alike(torch.stack([(logits - top[:, None]).exp().sum(-1), picked]), group)
    return torch.where(scored, exponentials.log() + top - picked, 0), logits, top


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
