"""Stages on a mesh, their layers sharded with FSDP and over the sequence, against stock transformers on one rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import SIZES
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GptOssConfig, Qwen3Config

from dense import relative_rms
from ringspan.finetune.loss import ChunkedLoss
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.data import shard_parameters, whole
from ringspan.parallel.mesh import Sizes, mesh_of
from ringspan.parallel.pipeline import Pipeline
from ringspan.parallel.testing import run_ranks

SCALE, LENGTH = 0.1, 45  # an odd number: ranks of the sequence have 22 and 23 tokens
EDGES = ([0, 10, 11, 30, 45], [0, 45], [0, 7, 45], [0, 44, 45])
LAYERS: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 5,
    "initializer_range": 0.2,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"],
}
CONFIGS = {
    "qwen3": partial(Qwen3Config, **LAYERS, use_sliding_window=True),
    "gemma3": partial(Gemma3TextConfig, **LAYERS, query_pre_attn_scalar=5, tie_word_embeddings=True),
    "gpt_oss": partial(
        GptOssConfig, **LAYERS, num_experts_per_tok=1, num_local_experts=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip
BOUND = {"qwen3": 1e-9, "gemma3": 1e-5, "gpt_oss": 1e-5}  # the latter two round inside, whatever their dtype


def build(kind: str, implementation: str) -> Any:
    torch.manual_seed(0)
    options = {"experts_implementation": "eager"} if kind == "gpt_oss" else {}
    config = CONFIGS[kind]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32, **options)
    for name, parameter in model.named_parameters():
        if "norm" in name or "sinks" in name or name.endswith("bias"):  # what starts as a constant hides mistakes
            torch.nn.init.normal_(parameter, 0.7, 0.3)
    return model.to(torch.float64).train()


def tokens(number: int, dp: int) -> torch.Tensor:
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(number + 10 * dp))


def stock(kind: str, ranks: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Transformers alone, a document at a time, on the batches of all data parallel ranks; the loss as defined."""
    model = build(kind, "eager" if kind == "gpt_oss" else "sdpa")
    total = torch.zeros((), dtype=torch.float64)
    for number, edges in enumerate(EDGES):
        for dp in range(ranks):
            ids = tokens(number, dp)
            for a, b in zip(edges, edges[1:], strict=False):
                logits = model(input_ids=ids[:, a:b], use_cache=False).logits[:, :-1]
                total = total + F.cross_entropy(logits.flatten(0, 1), ids[:, a + 1 : b].flatten(), reduction="sum")
    (SCALE * total).backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return float(SCALE * total.detach()), grads


def on_mesh(group: dist.ProcessGroup, kind: str, schedule: str, sizes: dict[str, int]) -> list[Any]:
    """Return the loss of all ranks, the true one, the worst gradient, and the parameters that this rank holds."""
    mesh = mesh_of(Sizes(**sizes), "cpu")
    context, dp = SequenceContext(mesh.context), mesh.place["dp"]
    truth, grads = stock(kind, mesh.sizes.dp_shard)
    pipeline = Pipeline(
        build(kind, "ringspan"), mesh["pp"], schedule=schedule, micro_batches=len(EDGES), loss=ChunkedLoss(7), batch=2,
        tokens=23 if mesh.sizes.cp == 2 else LENGTH, length=LENGTH,
        prepare=lambda stage, layers: shard_parameters(stage, layers, mesh.shards),
    )  # fmt: skip
    batches = []
    for number, edges in enumerate(EDGES):
        ids = tokens(number, dp)
        local = context.shard({"input_ids": ids, "labels": ids, "document_boundaries": edges})
        batches.append(local | context.kwargs())
    loss = pipeline.backward(batches, SCALE).double()
    dist.all_reduce(loss, group=group)
    pipeline.sum_tied()
    errors = {}
    for name, parameter in pipeline.named_parameters():
        # A missing gradient counts as zero: an expert that no token took has none, and nothing else.
        found = torch.zeros_like(grads[name]) if parameter.grad is None else whole(parameter.grad)
        errors[name] = relative_rms(found, grads[name]) if grads[name].any() else float(found.abs().max())
    return [float(loss), truth, max(errors.values()), max(errors, key=lambda name: errors[name]), sorted(errors)]


@pytest.mark.parametrize(
    ("kind", "schedule", "sizes"),
    [
        ("gemma3", "gpipe", {"cp": 2}),
        ("gpt_oss", "1f1b", {"cp": 2}),
        ("gpt_oss", "interleaved", {"dp_shard": 2}),
        ("gemma3", "interleaved", {"cp": 2}),
        ("qwen3", "zero_bubble", {"cp": 2}),
        ("gemma3", "zero_bubble", {"dp_shard": 2}),
    ],
)
def test_sharded_stages_give_every_gradient_of_stock_transformers(
    kind: str, schedule: str, sizes: dict[str, int]
) -> None:
    ranks = run_ranks(on_mesh, 4, kind, schedule, {"pp": 2, **sizes})
    for loss, truth, worst, name, _ in ranks:
        assert loss == pytest.approx(truth, rel=BOUND[kind])
        assert worst <= BOUND[kind], name
    held = {name for rank in ranks for name in rank[4]}
    assert held == {name for name, _ in build(kind, "ringspan").named_parameters()}
