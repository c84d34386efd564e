"""Cross-entropy without the logits: the head and the softmax run on a few tokens at a time.

For a million tokens and a vocabulary of 128K the logits would take 500 GB. Each chunk is checkpointed, so its logits
live only while it is computed, forward and again backward. (torch 2.13's ``linear_cross_entropy`` does the same for a
plain linear head; a LoRA on the head, and torch before 2.13, need the module itself to be called.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, *, chunk: int, ignore: int = -100) -> Tensor:
    """Return the sum over tokens of -log p(label), a scalar in fp32 (fp64 for fp64).

    The caller divides by the *global* count of scored tokens, which no rank can know from its shard.

    Args:
        hidden: [B, L, E] last hidden states; head: maps [..., E] to logits [..., V].
        labels: [B, L], already shifted; ``ignore`` where not scored.
        chunk: tokens whose logits exist at once.
    """
    flat, targets = hidden.flatten(0, 1), labels.flatten()
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # Keeps the graph connected where a shard has no scored token.
    total = (flat[:1].sum() * 0).to(wide)
    for part, target in zip(flat.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_sum, part, head, target, ignore, wide, use_reentrant=False)  # pyright: ignore[reportOperatorIssue]
    return total


def token_losses(hidden: Tensor, head: nn.Module, labels: Tensor, *, chunk: int, ignore: int = -100) -> Tensor:
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
    """Scores hidden states by chunks of tokens; fulfils ``parallel.scorer.Loss``."""

    def __init__(self, chunk: int, group=None) -> None:
        self._chunk = chunk

    def total(self, hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, head, labels, chunk=self._chunk)

    def each(self, hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        losses = token_losses(hidden, head, labels, chunk=self._chunk)
        hits = torch.cat([head(p).argmax(-1) == t for p, t in zip(flat.split(self._chunk), targets.split(self._chunk), strict=True)])
        return losses, hits.view_as(labels)
