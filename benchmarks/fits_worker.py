"""One rank of benchmarks/fits.py: one forward and backward pass over a long sequence, and the memory it took.

Memory is the most that was resident (VmHWM) above what was after the model was built.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from axes_worker import resident

FIELDS: dict[str, Any] = {
    "vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


def stock(implementation: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**FIELDS), attn_implementation=implementation, dtype=dtype)


def trainer(length: int) -> dict[str, float]:
    """Hugging Face's Trainer: sdpa, bf16, gradient checkpointing, batch 1; one step."""
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(0, FIELDS["vocab_size"], (length,), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids, "labels": ids}]
    model = stock("sdpa", torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=1, bf16=True, gradient_checkpointing=True, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        made = Trainer(model, arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
        before, began = resident("VmRSS"), time.monotonic()
        made.train()
    return {"bytes": resident("VmHWM") - before, "seconds": time.monotonic() - began}


def ours(length: int, dtype: str) -> dict[str, float]:
    """Ringspan: the sequence over all ranks, parameters sharded; bf16 by autocast over fp32 weights."""
    from ringspan.finetune.loss import ChunkedLoss
    from ringspan.parallel.context import SequenceContext
    from ringspan.parallel.mesh import Sizes, mesh_of
    from ringspan.parallel.parallelize import parallelize

    model, world = stock("ringspan", torch.float32), dist.get_world_size()
    mesh = mesh_of(Sizes(cp=world), "cpu") if world > 1 else None
    parallel = parallelize(
        model, mesh, loss=ChunkedLoss(256), recompute="selective", mlp_tile=2048,
        autocast=torch.bfloat16 if dtype == "bfloat16" else None,
    )  # fmt: skip
    context = SequenceContext(mesh.context if mesh else None, strategy="ring", keep_attention=True)
    ids = torch.randint(0, FIELDS["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    batch = context.shard({"input_ids": ids, "labels": ids}) | context.kwargs()
    before, began = resident("VmRSS"), time.monotonic()
    parallel.runner.backward([batch], 1 / length)
    return {"bytes": resident("VmHWM") - before, "seconds": time.monotonic() - began}


def main() -> None:
    arm, length, dtype, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    torch.set_flush_denormal(True)
    if arm == "trainer":
        row = trainer(length)
    else:
        dist.init_process_group("gloo")
        row = ours(length, dtype)
        mine = torch.tensor([row["bytes"]], dtype=torch.float64)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        row["bytes"] = float(mine)
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps({"length": length, "ranks": world, **row}))


if __name__ == "__main__":
    main()
