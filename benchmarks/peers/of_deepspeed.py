"""DeepSpeed's Ulysses: the operator around a local attention of the caller's, and UlyssesSP for Hugging Face models."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers.arm import Arm, Operator, Sharded
from peers.cases import Case
from torch import Tensor


def started() -> Any:
    """Return deepspeed.comm over the gloo group that is there."""
    comm = importlib.import_module("deepspeed.comm")
    if not comm.is_initialized():
        comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return comm


def operator(case: Case, group: dist.ProcessGroup) -> Operator:
    """DistributedAttention on [B, L, H, D], contiguous shares."""
    started()
    layer = importlib.import_module("deepspeed.sequence.layer")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    plain = case.boundaries is None and case.window is None
    options: dict[str, Any] = {"is_causal": True} if plain else {"attn_mask": case.table()}

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend on all tokens and some heads: what DistributedAttention leaves to its caller."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
        return out.transpose(1, 2).contiguous()

    attend = layer.DistributedAttention(local, group, 2, 1)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        del sinks
        return attend(q, k, v, 0)

    return Operator(torch.arange(case.length).chunk(world)[rank], call)


def model(case: Case, group: dist.ProcessGroup, net: Any, batch: dict[str, Tensor]) -> Sharded:
    """UlyssesSPAttentionHF, with the batch cut by its own data loader adapter."""
    started()
    parts = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    world = dist.get_world_size(group)
    mpu = parts.UlyssesSPAttentionHF.register_with_transformers(
        net, core_attn_implementation="sdpa", sequence_parallel_size=world, micro_batch_size=1
    )
    # Every rank offers the same batch; the first micro-batch is rank 0's, shared by all.
    adapter = parts.UlyssesSPDataLoaderAdapter(
        [dict(batch)],
        sp_rank=mpu.get_sequence_parallel_rank(),
        sp_group=mpu.get_sequence_parallel_group(),
        sp_world_size=world,
        device=torch.device("cpu"),
    )
    local = next(adapter)
    given = {"input_ids": local["input_ids"], "position_ids": local["position_ids"], "use_cache": False}
    return Sharded(lambda: net(**given).logits, local["shift_labels"])


ARMS = [
    Arm(
        "DeepSpeed Ulysses",
        "deepspeed",
        "`DistributedAttention(local, group, 2, 1)`, contiguous shares; local is `scaled_dot_product_attention`, "
        "and the mask is ours to give it (dense, nothing is skipped)",
        operator=operator,
        lacks={"sinks": "the local attention is the caller's, and gets no number of its first head"},
    ),
    Arm(
        "DeepSpeed UlyssesSP",
        "deepspeed",
        '`UlyssesSPAttentionHF.register_with_transformers(model, "sdpa")`, batch by `UlyssesSPDataLoaderAdapter` with '
        "position ids that start anew in each document, as it asks",
        model=model,
    ),
]
