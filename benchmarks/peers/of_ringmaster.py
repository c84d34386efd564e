"""axolotl-ringmaster: its ring as an operator, and its backends under a Hugging Face model."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peers.arm import Arm, Operator, Sharded
from peers.cases import Case
from torch import Tensor


def ring(case: Case, group: dist.ProcessGroup, *, rotate: str) -> Operator:
    """``ring_attention`` with its math block (the one that runs on a CPU), contiguous shares padded as it pads."""
    loop = importlib.import_module("ringmaster.ring.loop")
    config = importlib.import_module("ringmaster.config")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    padded = -(-case.length // world) * world
    window = None if case.window is None else (case.window - 1, 0)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        del sinks
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if case.boundaries is not None:
            edges = torch.tensor(case.boundaries, dtype=torch.int32)
            return loop.varlen_ring_attention(q, k, v, group=group, scaling=None, cu_seqlens=edges, window=window)
        method = getattr(config.RotateMethod, rotate)
        rest = {"provider": "math", "attn_implementation": "math", "rotate_method": method, "window": window}
        return loop.ring_attention(q, k, v, group=group, causal=True, scaling=None, dropout=0.0, **rest)

    return Operator(torch.arange(padded).chunk(world)[rank], call)


def model(
    case: Case, group: dist.ProcessGroup, net: Any, batch: dict[str, Tensor], *, backend: str, adapter: str = "manager"
) -> Sharded:
    """``setup`` and one of its two ways to cut a batch: the context manager with hooks, or the raw adapter."""
    del case
    base = importlib.import_module("ringmaster")
    cut = importlib.import_module("ringmaster.shard")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    config = base.RingmasterConfig(size=world, backend=base.Backend[backend])
    runtime = base.setup(
        config,
        num_kv_heads=net.config.num_key_value_heads,
        device_type="cpu",
        inner_attn=net.config._attn_implementation,
    )
    net.set_attn_implementation(runtime.attn_implementation)
    local, _ = cut.shard_batch({name: x.clone() for name, x in batch.items()}, cp_rank=rank, cp_size=world)
    names = ("input_ids", "position_ids")
    if adapter == "raw":
        region = importlib.import_module("ringmaster.adapters.raw").context_parallel_region

        def inside() -> Tensor:
            with region({name: batch[name].clone() for name in names}) as mine:
                return net(**{name: mine[name] for name in names}, use_cache=False).logits

        return Sharded(inside, local["shift_labels"])

    def managed() -> Tensor:
        with base.ContextParallelContextManager([net], group):
            return net(**{name: batch[name].clone() for name in names}, use_cache=False).logits

    return Sharded(managed, local["shift_labels"])


CALLED = '`ring_attention(provider="math", attn_implementation="math", rotate_method='
SETUP = "`setup(RingmasterConfig(size=ranks, backend="
MANAGER = '), inner_attn="sdpa")` and `ContextParallelContextManager`'
ARMS = [
    Arm(
        "ringmaster ring, p2p",
        "axolotl-ringmaster",
        CALLED + "ALLTOALL)`, contiguous shares, padded at the end",
        operator=partial(ring, rotate="ALLTOALL"),
        lacks={"documents": "packed rows take its all-gather path", "sinks": "no sinks"},
    ),
    Arm(
        "ringmaster ring, all-gather",
        "axolotl-ringmaster",
        CALLED
        + "ALLGATHER)`, with documents `varlen_ring_attention(cu_seqlens=...)`; contiguous shares, padded at the end",
        operator=partial(ring, rotate="ALLGATHER"),
        lacks={"sinks": "no sinks"},
    ),
    Arm(
        "ringmaster Ulysses",
        "axolotl-ringmaster",
        SETUP + "ULYSSES" + MANAGER,
        model=partial(model, backend="ULYSSES"),
    ),
    Arm(
        "ringmaster Ulysses, raw adapter",
        "axolotl-ringmaster",
        "the same, but the batch through `context_parallel_region`, as its README begins",
        model=partial(model, backend="ULYSSES", adapter="raw"),
    ),
    Arm(
        "ringmaster ring",
        "axolotl-ringmaster",
        SETUP + "RING" + MANAGER,
        model=partial(model, backend="RING"),
    ),
]
