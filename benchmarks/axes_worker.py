"""One rank of benchmarks/axes.py: trains a few steps and reports memory and speed; started by torchrun.

Memory is the most that was resident (VmHWM) above what was before the model was built: weights, gradients, optimizer
state, activations, buffers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LENGTH = 4096
STEPS = 3
FIELDS: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


def resident(field: str) -> int:
    """Return a line of /proc/self/status, in bytes: VmRSS, or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def ours(overrides: list[str]) -> Callable[[], int]:
    """Return a step of ringspan, and build what it needs; a step returns the tokens of all ranks."""
    from ringspan.configs.load import load
    from ringspan.finetune.model import read_tokenizer
    from ringspan.launch import build, engines
    from ringspan.launch.ranks import Place
    from ringspan.launch.state import State
    from ringspan.parallel.mesh import mesh_of

    empty = Path(os.environ["AXES_FOLDER"]) / "empty.yaml"
    config = load(empty, overrides)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = Place(0, 1, torch.device("cpu"), None)
    if world > 1:
        mesh = mesh_of(engines.sizes(config, launched=False).resolved(world), "cpu")
        place = Place(rank, world, torch.device("cpu"), dist.group.WORLD, mesh)
    state = State.start(config, place, read_tokenizer(build.tokenizer_path(config)), None)
    context = build.make_context(config, place)

    def step() -> int:
        data = state.next_step(config, place)
        batches = [context.shard(batch) | context.kwargs() for batch in data.batches]
        loss = state.engine.backward(batches, 1 / data.scored)
        state.engine.step(1e-4, state.engine.finish(loss).norm)
        state.step += 1
        return data.tokens

    return step


def stock() -> Any:
    """Return the model as stock transformers makes it, with its own activation checkpointing."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    fields = {key: value for key, value in FIELDS.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), attn_implementation="sdpa", dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def plain_fsdp2() -> Callable[[], int]:
    """FSDP2 over stock transformers: each rank has sequences of its own."""
    from torch.distributed.fsdp import fully_shard

    model = stock()
    if dist.get_world_size() > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> int:
        ids = torch.randint(0, FIELDS["vocab_size"], (1, LENGTH))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return LENGTH * dist.get_world_size()

    return step


def ulysses(stage: int) -> Callable[[], int]:
    """DeepSpeed's Ulysses for Hugging Face under ZeRO: the ranks share one sequence."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    model, world = stock(), dist.get_world_size()
    deepspeed.init_distributed("gloo")
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation="sdpa", sequence_parallel_size=world, micro_batch_size=1, seq_length=LENGTH,
        seq_length_is_variable=False,
    )  # fmt: skip
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "sequence_parallel_size": world,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]
    rank, share = dist.get_rank(), LENGTH // world

    def step() -> int:
        ids = torch.randint(0, FIELDS["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(0))
        mine = slice(rank * share, (rank + 1) * share)
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)[:, mine]
        positions = torch.arange(LENGTH)[None, mine]
        logits = engine(input_ids=ids[:, mine], position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        engine.backward(loss)
        engine.step()
        return LENGTH

    return step


def main() -> None:
    arm, overrides = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo")
    from transformers import AutoModelForCausalLM  # noqa: F401 - loaded before the size is taken

    import ringspan.parallel.parallelize  # noqa: F401

    before = resident("VmRSS")
    make = {"ringspan": lambda: ours(overrides), "fsdp2": plain_fsdp2, "ulysses": lambda: ulysses(int(overrides[0]))}
    step, seconds, tokens = make[arm](), 0.0, 0
    for number in range(STEPS):
        dist.barrier()
        began = time.monotonic()
        count = step()
        dist.barrier()
        if number:  # the first warms up
            seconds, tokens = seconds + time.monotonic() - began, tokens + count
    mine = torch.tensor([resident("VmHWM") - before], dtype=torch.float64)
    peaks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(peaks, mine)
    if dist.get_rank() == 0:
        row = {"tokens_per_second": tokens / seconds, "peak_bytes": [int(peak) for peak in peaks]}
        Path(os.environ["AXES_OUT"]).write_text(json.dumps(row))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
