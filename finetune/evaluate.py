"""Judging a model on the ranks that train it: loss by position on held-out documents, pass keys by depth and length.

Both run through the same sharded path and the same global normaliser as training. A pass key counts as found when every
digit is the most likely next token given the true ones before it, which is when greedy decoding would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.finetune.data import documents, encode_document
from ringspan.finetune.loss import token_losses
from ringspan.finetune.model import Trained
from ringspan.finetune.recall import passkey
from ringspan.parallel.context import IGNORE, SequenceContext
from ringspan.parallel.faults import Fault


@dataclass(frozen=True)
class Judge:
    """What every evaluation needs: the model, the context it runs in, and how it computes.

    ``autocast`` returns the context manager of the compute dtype; ``chunk`` is as in ``finetune.loss``.
    """

    trained: Trained
    context: SequenceContext
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    chunk: int

    def hidden(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return this rank's (hidden states, shifted labels, position ids) of one document, ids and labels [1, S]."""
        local = self.context.shard({"input_ids": ids.to(self.device), "labels": labels.to(self.device)})
        targets = local.pop("shift_labels")
        was_training = self.trained.model.training
        self.trained.model.eval()
        with torch.no_grad(), self.autocast():
            states = self.trained.decoder(**local, **self.context.kwargs()).last_hidden_state
        self.trained.model.train(was_training)
        return states, targets, local["position_ids"]

    def total(self, values: Tensor) -> Tensor:
        """Sum fp64 values over the ranks."""
        if self.context.group is not None:
            dist.all_reduce(values, group=self.context.group)
        return values


def held_out(
    paths: str | Sequence[str],
    tokenizer: Any,
    *,
    length: int,
    count: int,
    root: str | None = None,
    text_field: str = "text",
) -> list[list[int]]:
    """Return ``count`` held-out documents, each cut to its first ``length`` tokens.

    Documents of at least ``length`` tokens come first, in file order, so that all positions are judged on the same
    ones; where there are too few, the longest others follow.

    Raises:
        Fault: if no document has two tokens.
    """
    long: list[list[int]] = []
    short: list[list[int]] = []
    for text, _ in documents(paths, root=root, text_field=text_field):
        tokens = encode_document(tokenizer, text)
        (long if len(tokens) >= length else short).append(tokens[:length])
        if len(long) == count:
            return long
    short.sort(key=len, reverse=True)
    found = [tokens for tokens in (long + short)[:count] if len(tokens) > 1]
    if not found:
        raise Fault(f"eval.path: {paths} holds no document of two tokens or more")
    return found


def edges_up_to(length: int) -> list[int]:
    """Return bucket edges for positions: 0, 64, 128, 256, ... doubling up to ``length``."""
    edges = [0]
    step = min(64, length)
    while step < length:
        edges.append(step)
        step *= 2
    return [*edges, length]


def loss_by_position(judge: Judge, tokens: Iterable[list[int]], edges: Sequence[int]) -> tuple[list[float], list[int]]:
    """Return (sum of losses in nats, scored tokens) per bucket of positions ``[edges[i], edges[i + 1])``."""
    buckets = len(edges) - 1
    totals = torch.zeros(2, buckets, dtype=torch.float64, device=judge.device)
    inner = torch.tensor(edges[1:-1], device=judge.device)
    for document in tokens:
        ids = _at_least(document, judge.context.world)
        labels = ids.clone()
        labels[:, len(document) :] = IGNORE
        hidden, targets, positions = judge.hidden(ids, labels)
        with judge.autocast():
            losses = token_losses(hidden, judge.trained.head, targets, chunk=judge.chunk)
        where = torch.bucketize(positions.flatten(), inner, right=True)
        scored = (targets.flatten() != IGNORE).double()
        totals[0].index_add_(0, where, losses.flatten().double() * scored)
        totals[1].index_add_(0, where, scored)
    totals = judge.total(totals).cpu()
    return totals[0].tolist(), [int(n) for n in totals[1].tolist()]


def passkey_accuracy(
    judge: Judge,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    filler: Sequence[int],
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[list[float]]:
    """Return the share of pass keys found, by depth (rows) and length (columns)."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    table: list[list[float]] = []
    for depth in depths:
        row: list[float] = []
        for length in lengths:
            progress(f"pass key at depth {depth:.0%} of {length} tokens")
            cell = f"{length}/{depth}".encode()
            found = [
                _found(judge, passkey(length, depth, seed + 1000 * trial + sum(cell), encode, filler))
                for trial in range(trials)
            ]
            row.append(sum(found) / trials)
        table.append(row)
    return table


def _found(judge: Judge, example: Any) -> bool:
    ids = torch.tensor(example.tokens)[None]
    labels = torch.full_like(ids, IGNORE)
    labels[:, example.answer] = ids[:, example.answer]
    hidden, targets, _ = judge.hidden(ids, labels)
    asked = targets != IGNORE
    with torch.no_grad(), judge.autocast():
        guesses = judge.trained.head(hidden[asked]).argmax(-1)
    right = judge.total((guesses == targets[asked]).sum().double())
    return int(right) == example.answer.stop - example.answer.start


def _at_least(tokens: list[int], world: int) -> Tensor:
    """Return [1, S] ids, repeated at the end where a document has fewer tokens than there are ranks (never scored)."""
    return torch.tensor(tokens + tokens[-1:] * max(0, world - len(tokens)))[None]
