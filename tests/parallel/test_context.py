"""A stock Hugging Face model on N ranks computes what it computes on one: loss, every gradient, nothing dropped."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import EDGES, build, tokens

from dense import mask_table, relative_rms
from ringspan.dist_attn import Contiguous, Disagreement, ZigZag
from ringspan.finetune.loss import chunked_cross_entropy
from ringspan.parallel.context import IGNORE, SequenceContext
from ringspan.parallel.data import sum_gradients
from ringspan.parallel.testing import run_ranks

BOUND = {torch.float64: 1e-9, torch.float32: 1e-5}


def stock(kind: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """The same model through transformers alone: sdpa, an explicit mask, the loss from its definition."""
    model, ids = build(kind, dtype, "sdpa"), tokens()
    table = mask_table(45, causal=True, boundaries=EDGES)[None, None].expand(2, 1, 45, 45)
    positions = torch.cat([torch.arange(b - a) for a, b in zip(EDGES, EDGES[1:], strict=False)])[None].expand(2, -1)
    logits = model(input_ids=ids, attention_mask=table, position_ids=positions, use_cache=False).logits
    total, count = torch.zeros((), dtype=dtype), 0
    for a, b in zip(EDGES, EDGES[1:], strict=False):
        for i in range(a, b - 1):
            total = total + F.cross_entropy(logits[:, i], ids[:, i + 1], reduction="sum")
            count += 2
    (total / count).backward()
    return float(total.detach() / count), {name: p.grad for name, p in model.named_parameters()}


def sharded(
    group: dist.ProcessGroup | None, kind: str, dtype: torch.dtype, layout: str, recompute: bool
) -> tuple[float, dict[str, torch.Tensor], SequenceContext]:
    model = build(kind, dtype)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    context = SequenceContext(group, layout=ZigZag() if layout == "zigzag" else Contiguous(), keep_attention=recompute)
    local = context.shard({"input_ids": tokens(), "labels": tokens(), "document_boundaries": EDGES})
    labels = local.pop("shift_labels")
    hidden = model.model(**local, **context.kwargs()).last_hidden_state
    loss = chunked_cross_entropy(hidden, model.lm_head, labels, chunk=7) / (2 * (45 - 4))
    loss.backward()
    sum_gradients(model.parameters(), group)
    total = loss.detach().clone()
    if group is not None:
        dist.all_reduce(total, group=group)
    return float(total), {name: p.grad for name, p in model.named_parameters()}, context


def compare(group: dist.ProcessGroup | None, kind: str, dtype: str, layout: str, recompute: bool) -> list[float]:
    precision = getattr(torch, dtype)
    loss, grads, context = sharded(group, kind, precision, layout, recompute)
    loss_truth, grads_truth = stock(kind, precision)
    worst = max(relative_rms(grads[name], truth) for name, truth in grads_truth.items())
    return [abs(loss - loss_truth) / loss_truth, worst, context.traffic.received_payload]


@pytest.mark.parametrize(
    ("world", "kind", "dtype", "layout", "recompute"),
    [
        (1, "llama", "float64", "zigzag", False),
        (1, "qwen3", "float32", "zigzag", True),
        (2, "llama", "float32", "zigzag", True),
        (2, "qwen3", "float64", "contiguous", True),
        (4, "llama", "float64", "zigzag", True),
        (4, "qwen3", "float32", "contiguous", False),
    ],
)
def test_every_parameter_gradient_is_that_of_one_rank(
    world: int, kind: str, dtype: str, layout: str, recompute: bool
) -> None:
    arguments = (kind, dtype, layout, recompute)
    results = [compare(None, *arguments)] if world == 1 else run_ranks(compare, world, *arguments)
    for loss_error, gradient_error, _ in results:
        assert loss_error <= BOUND[getattr(torch, dtype)]
        assert gradient_error <= BOUND[getattr(torch, dtype)]


def test_a_recompute_does_not_run_the_ring_again() -> None:
    plain = run_ranks(compare, 2, "llama", "float32", "zigzag", False)
    kept = run_ranks(compare, 2, "llama", "float32", "zigzag", True)
    assert [result[2] for result in kept] == [result[2] for result in plain]


def shards(group: dist.ProcessGroup) -> dict[str, Any]:
    context = SequenceContext(group)
    local = context.shard({"input_ids": tokens(), "labels": tokens(), "document_boundaries": EDGES})
    boundaries = local.pop("document_boundaries").edges
    return {"boundaries": boundaries, **{name: x[0].tolist() for name, x in local.items()}}


def test_shard_gives_global_positions_and_labels_shifted_before_the_cut() -> None:
    ids = tokens()[0].tolist()
    for rank, local in enumerate(run_ranks(shards, 2)):
        held = [p for span in ZigZag().spans(rank, 2, 45) for p in range(span.start, span.stop)]
        start = [max(edge for edge in EDGES[:-1] if edge <= p) for p in held]
        assert local["input_ids"] == [ids[p] for p in held]
        assert local["position_ids"] == [p - s for p, s in zip(held, start, strict=True)]
        assert local["shift_labels"] == [IGNORE if p + 1 in EDGES else ids[p + 1] for p in held]
        assert local["boundaries"] == EDGES


def disagreeing(group: dist.ProcessGroup, kind: str) -> str:
    batch = {"input_ids": tokens()}
    if dist.get_rank(group) == 1 and kind == "tokens":
        batch["input_ids"] = batch["input_ids"].clone().index_fill_(1, torch.tensor([3]), 5)
    if dist.get_rank(group) == 1 and kind == "boundaries":
        batch["document_boundaries"] = [0, 9, 45]  # pyright: ignore[reportArgumentType]
    if dist.get_rank(group) == 1 and kind == "fault":
        batch["input_ids"] = batch["input_ids"][0]
    try:
        SequenceContext(group).shard(batch)
    except Disagreement as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tokens", "ranks disagree"),
        ("boundaries", "ranks disagree"),
        ("fault", "input_ids: must be"),
    ],
)
def test_batches_that_differ_between_ranks_stop_all(kind: str, message: str) -> None:
    first, second = run_ranks(disagreeing, 2, kind)
    assert first == second
    assert message in first


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "non-empty"),
        ({"input_ids": tokens(), "labls": tokens()}, "unknown key 'labls'"),
        (
            {"input_ids": tokens(), "labels": tokens(), "shift_labels": tokens()},
            "both labels and shift_labels",
        ),
        (
            {"input_ids": tokens(), "labels": tokens(1)},
            r"labels: shape \(1, 45\) is not input_ids' \(2, 45\)",
        ),
        (
            {"input_ids": tokens(), "document_boundaries": [0, 44]},
            "ends at 44 but the sequence has 45",
        ),
        ({"input_ids": tokens(), "document_boundaries": [[0, 45]]}, "1 lists for 2 batch rows"),
    ],
)
def test_bad_batches_are_named(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceContext().shard(batch)


def ten_steps(group: dist.ProcessGroup | None, dtype: str) -> list[float]:
    precision = getattr(torch, dtype)
    model = build("llama", precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(10):
        ids = torch.randint(0, 97, (1, 51), generator=torch.Generator().manual_seed(step))
        context = SequenceContext(group)
        local = context.shard({"input_ids": ids, "labels": ids, "document_boundaries": [0, 20, 51]})
        labels = local.pop("shift_labels")
        hidden = model.model(**local, **context.kwargs()).last_hidden_state
        loss = chunked_cross_entropy(hidden, model.lm_head, labels, chunk=16) / 49
        loss.backward()
        sum_gradients(model.parameters(), group)
        total = loss.detach().clone()
        if group is not None:
            dist.all_reduce(total, group=group)
        losses.append(float(total))
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_ten_training_steps_lose_alike(dtype: str) -> None:
    alone = ten_steps(None, dtype)
    assert alone[-1] < alone[0]
    for losses in run_ranks(ten_steps, 2, dtype):
        assert losses == pytest.approx(alone, rel=BOUND[getattr(torch, dtype)])
