"""Judging a model on the ranks that train it: loss by position on held-out documents, pass keys by depth and length.

Both run through the same sharded path and the same global normaliser as training. A pass key counts as found when every
digit is the most likely next token given the true ones before it, which is when greedy decoding would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.finetune.data import documents, encode_document
from ringspan.finetune.recall import passkey
from ringspan.parallel.context import IGNORE, SequenceContext
from ringspan.parallel.faults import Fault
from ringspan.parallel.scorer import Runner


@dataclass(frozen=True)
class Judge:
    """What every evaluation needs: the model on its ranks, and how examples are shared out.

    Args:
        runner: runs the model.
        context: shares one example over the ranks of a sequence.
        group: all ranks, over which results are summed; None for one process.
        share: (which, of how many) groups of ranks that take examples in turn.
        counts: whether this rank's results count; of tensor parallel ranks, who find the same, one does.
    """

    runner: Runner
    context: SequenceContext
    device: torch.device
    group: dist.ProcessGroup | None = None
    share: tuple[int, int] = (0, 1)
    counts: bool = True

    def losses(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return this rank's (losses, hits, scored, position ids) of one document, ids and labels [1, S], each [1, L].

        None where another rank's results count.
        """
        local = self.context.shard({"input_ids": ids.to(self.device), "labels": labels.to(self.device)})
        found = self.runner.losses({**local, **self.context.kwargs()})
        if found is None or not self.counts:
            return None
        return *found, local["shift_labels"] != IGNORE, local["position_ids"]

    def total(self, values: Tensor) -> Tensor:
        """Sum fp64 values over the ranks."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def turns(self, examples: int) -> Iterator[tuple[int, bool]]:
        """Yield the numbers of the examples of this rank's group, and whether they count.

        All groups take equally many, for all ranks gather sharded parameters together; one too many does not count.
        """
        mine, groups = self.share
        for first in range(0, examples, groups):
            yield (first + mine, True) if first + mine < examples else (first, False)


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


def loss_by_position(judge: Judge, tokens: Sequence[list[int]], edges: Sequence[int]) -> tuple[list[float], list[int]]:
    """Return (sum of losses in nats, scored tokens) per bucket of positions ``[edges[i], edges[i + 1])``."""
    buckets = len(edges) - 1
    totals = torch.zeros(2, buckets, dtype=torch.float64, device=judge.device)
    inner = torch.tensor(edges[1:-1], device=judge.device)
    for number, counted in judge.turns(len(tokens)):
        document = tokens[number]
        ids = _at_least(document, judge.context.world)
        labels = ids.clone()
        labels[:, len(document) :] = IGNORE
        found = judge.losses(ids, labels)
        if found is None or not counted:
            continue
        losses, _, scored, positions = (each.flatten() for each in found)
        where = torch.bucketize(positions, inner, right=True)
        totals[0].index_add_(0, where, losses.double() * scored)
        totals[1].index_add_(0, where, scored.double())
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
            examples = [
                passkey(length, depth, seed + 1000 * trial + sum(cell), encode, filler) for trial in range(trials)
            ]
            row.append(_found(judge, examples) / trials)
        table.append(row)
    return table


def _found(judge: Judge, examples: Sequence[Any]) -> int:
    """Return how many pass keys are found: where no digit is missed on any rank."""
    misses = torch.zeros(len(examples), dtype=torch.float64, device=judge.device)
    for number, counted in judge.turns(len(examples)):
        example = examples[number]
        ids = torch.tensor(example.tokens)[None]
        labels = torch.full_like(ids, IGNORE)
        labels[:, example.answer] = ids[:, example.answer]
        found = judge.losses(ids, labels)
        if found is not None and counted:
            _, hits, scored, _ = found
            misses[number] += (scored & ~hits).sum()
    return int((judge.total(misses) == 0).sum())


def _at_least(tokens: list[int], world: int) -> Tensor:
    """Return [1, S] ids, repeated at the end where a document has fewer tokens than there are ranks (never scored)."""
    return torch.tensor(tokens + tokens[-1:] * max(0, world - len(tokens)))[None]
