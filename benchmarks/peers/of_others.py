"""lucidrains' ring-attention-pytorch, yunchang (USP) and ring-flash-attn, as operators."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peers.arm import Arm, Operator
from peers.cases import Case
from torch import Tensor

BUCKET = 64


def lucidrains(case: Case, group: dist.ProcessGroup) -> Operator:
    """``ring_flash_attn`` in plain torch, contiguous shares."""
    run = importlib.import_module("ring_attention_pytorch").ring_flash_attn
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        del sinks
        # Its query heads count the KV head fastest, Hugging Face's slowest.
        share = case.heads // case.kv_heads
        order = torch.arange(case.heads).reshape(case.kv_heads, share).t().flatten()
        out = run(q[:, :, order], k, v, causal=True, bucket_size=BUCKET, ring_reduce_col=True)
        return out[:, :, order.argsort()]

    return Operator(torch.arange(case.length).chunk(world)[rank], call)


def yunchang(case: Case, group: dist.ProcessGroup, *, ring: bool) -> Operator:
    """``LongContextAttention`` with torch's attention as its block, all ranks in one of its two dimensions."""
    package = importlib.import_module("yunchang")
    kinds = importlib.import_module("yunchang.kernels").AttnType
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    package.set_seq_parallel_pg(1 if ring else world, world if ring else 1, rank, world)
    attend = package.LongContextAttention(ring_impl_type="basic", attn_type=kinds.TORCH_MATH)
    rows = package.EXTRACT_FUNC_DICT["basic"](torch.arange(case.length)[None], rank, world)[0]
    window: Any = {} if case.window is None else {"window_size": (case.window - 1, 0)}

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        del sinks
        return attend(q, k, v, causal=True, **window)

    return Operator(rows, call)


def ring_flash(case: Case, group: dist.ProcessGroup) -> Operator:
    """``zigzag_ring_flash_attn_func``: reached only where flash_attn is installed, which needs CUDA."""
    run = importlib.import_module("ring_flash_attn").zigzag_ring_flash_attn_func
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    chunks = torch.arange(case.length).chunk(2 * world)
    rows = torch.cat([chunks[rank], chunks[2 * world - 1 - rank]])
    window: Any = {} if case.window is None else {"window_size": (case.window - 1, 0)}
    return Operator(rows, lambda q, k, v, sinks: run(q, k, v, causal=True, group=group, **window))


NO_DOCUMENTS = {"documents": "no document boundaries", "sinks": "no sinks"}
USP = '`LongContextAttention(ring_impl_type="basic", attn_type=TORCH_MATH)`, '
ARMS = [
    Arm(
        "lucidrains ring-attention-pytorch",
        "ring-attention-pytorch",
        f"`ring_flash_attn(causal=True, bucket_size={BUCKET}, ring_reduce_col=True)`, heads in its order",
        operator=lucidrains,
        lacks={**NO_DOCUMENTS, "window": "looks back by whole buckets"},
    ),
    Arm(
        "yunchang, Ulysses degree = ranks",
        "yunchang",
        USP + "`set_seq_parallel_pg(ranks, 1, ...)`",
        operator=partial(yunchang, ring=False),
        lacks=NO_DOCUMENTS,
    ),
    Arm(
        "yunchang, ring degree = ranks",
        "yunchang",
        USP + "`set_seq_parallel_pg(1, ranks, ...)`",
        operator=partial(yunchang, ring=True),
        lacks=NO_DOCUMENTS,
    ),
    Arm(
        "ring-flash-attn",
        "ring-flash-attn",
        "`zigzag_ring_flash_attn_func`, which imports CUDA's flash_attn",
        operator=ring_flash,
        lacks=NO_DOCUMENTS,
    ),
]
