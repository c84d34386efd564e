"""Our own rows: each strategy at the level of the operator, and the Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peers.arm import Arm, Operator, Sharded
from peers.cases import Case
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ringspan.dist_attn import Causal, Documents, Mask, Window, ZigZag, attention
from ringspan.dist_attn.planner import STRATEGIES

NAMES = tuple(name for name in STRATEGIES if name != "auto")
TWO_LEVELS = ("double_ring", "ulysses_ring")  # these want a mesh (nodes, ranks in a node): two nodes here


def mask_of(case: Case) -> Mask:
    """Return the case's mask in our words."""
    mask: Mask = Causal()
    if case.window is not None:
        mask = mask & Window(case.window - 1)
    if case.boundaries is not None:
        mask = mask & Documents(list(case.boundaries))
    return mask


def operator(strategy: str) -> Arm:
    """Return the row of one strategy."""

    def make(case: Case, group: dist.ProcessGroup) -> Operator:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        spans = ZigZag().spans(rank, world, case.length)
        rows = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        ranks = init_device_mesh("cpu", (2, world // 2)) if strategy in TWO_LEVELS else group

        def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            options = {"strategy": strategy, "length": case.length}
            return attention(q, k, v, mask=mask_of(case), group=ranks, layout=ZigZag(), sinks=sinks, **options)

        return Operator(rows, call)

    group = "init_device_mesh('cpu', (2, ranks // 2))" if strategy in TWO_LEVELS else "..."
    called = f"`attention(q, k, v, mask=..., group={group}, layout=ZigZag(), strategy={strategy!r})`"
    return Arm(f"ringspan, {strategy}", None, called, operator=make)


def model(case: Case, group: dist.ProcessGroup, net: Any, batch: dict[str, Tensor]) -> Sharded:
    """Run a model under SequenceContext."""
    from ringspan.parallel.context import SequenceContext

    context = SequenceContext(group)
    net.set_attn_implementation("ringspan")
    whole: dict[str, Any] = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    if case.boundaries is not None:
        whole["document_boundaries"] = list(case.boundaries)
    local = context.shard(whole)
    labels = local.pop("shift_labels")
    return Sharded(lambda: net(**local, **context.kwargs()).logits, labels)


MODEL = Arm(
    "ringspan, Hugging Face",
    None,
    '`model.set_attn_implementation("ringspan")`, `SequenceContext(group).shard(batch)`',
    model=model,
    implementation="eager",
)
