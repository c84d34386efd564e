"""Part ``train``: the training loop's step on a larger model with random weights, ours beside torch's SDPA.

Prepared tokens and plain arguments: no config, no data set. Model FLOPs are 6 per parameter (input embedding aside) and
token, and 12 * area * head_dim * heads per attention layer; what is recomputed does not count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from gpu_cases import K, windowed
from gpu_clock import Clock
from gpu_record import Record
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig

from ringspan.finetune.loss import chunked_cross_entropy
from ringspan.finetune.model import Trained, build
from ringspan.kernels.mask import Causal, Mask, Span
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.parts import parts_of
from ringspan.parallel.recompute import checkpoint_layers

ROW_S = 110
STEPS = 3  # timed, after one that warms up


@dataclass(frozen=True)
class Arm:
    """One length, one attention; mask None: causal as the model declares it."""

    length: int
    attention: str
    mask: Mask | None = None

    @property
    def key(self) -> str:
        """A name no other arm has."""
        size = f"{self.length // K}K" if self.length % K == 0 else str(self.length)
        return f"{size} tokens, {self.mask or 'causal'}: {self.attention}"


def arms(dry: bool) -> list[Arm]:
    """Return what is trained, the most telling first."""
    if dry:
        return [Arm(96, "ringspan"), Arm(96, "sdpa"), Arm(96, "ringspan", windowed(16, 4))]
    window = windowed(4096, 4)
    return [
        Arm(32 * K, "ringspan"),
        Arm(32 * K, "sdpa"),
        Arm(128 * K, "ringspan", window),
        Arm(32 * K, "ringspan", window),
        Arm(128 * K, "ringspan"),
        Arm(128 * K, "sdpa"),
        Arm(64 * K, "ringspan"),
        Arm(64 * K, "sdpa"),
    ]


def llama(dry: bool) -> LlamaConfig:
    """Return the model: 0.5 B parameters, 8 layers, hidden 2048, 32 query and 8 KV heads of 64."""
    sizes: dict[str, Any]
    heads: dict[str, Any]
    if dry:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    else:
        sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "vocab_size": 32768}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaConfig(**sizes, **heads, max_position_embeddings=128 * K, tie_word_embeddings=False)


def run(record: Record) -> None:
    """Train a few steps with each arm from the same weights and tokens."""
    clock = Clock(record.dry)
    with record.row("matmul", 30) as row:
        if row is not None:
            row.update(clock.matmul())
    product = next(row for row in record.data["rows"] if row["key"] == "matmul")
    torch.manual_seed(0)
    with torch.device(clock.device):  # random weights are made where they will be used
        trained = build(llama(record.dry), path=None)
    checkpoint_layers(parts_of(trained.model).layers, "selective")
    initial = [p.detach().clone() for p in trained.model.parameters()]
    for arm in arms(record.dry):
        with record.row(arm.key, ROW_S, **facts(arm, trained)) as row:
            if row is None:
                continue
            with torch.no_grad():
                for parameter, value in zip(trained.model.parameters(), initial, strict=True):
                    parameter.copy_(value)
            row.update(train(arm, trained, clock))
            rate = row["model_flops"] / row["step_s"] / 1e12
            row["model_tflops"] = rate
            row["mfu_of_matmul"] = rate / product["tflops"]
            if product["datasheet_tflops"]:
                row["mfu_of_datasheet"] = rate / product["datasheet_tflops"]
        trained.model.zero_grad(set_to_none=True)
        clock.release()


def facts(arm: Arm, trained: Trained) -> dict[str, Any]:
    """Return what a row says of its arm."""
    config = trained.base.config
    return {
        "length": arm.length,
        "attention": arm.attention,
        "mask": str(arm.mask or Causal()),
        "parameters": trained.counts()[0],
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": f"{config.num_attention_heads}/{config.num_key_value_heads} x {config.head_dim}",
    }


def train(arm: Arm, trained: Trained, clock: Clock) -> dict[str, Any]:
    """Run a warming step and a few timed ones; return losses, seconds per step and the peak of memory."""
    trained.base.set_attn_implementation(arm.attention)
    context = SequenceContext(mask=arm.mask, keep_attention=True)
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=1e-4, fused=not clock.dry)
    generator = torch.Generator().manual_seed(arm.length)
    vocabulary = trained.base.config.vocab_size
    ids = torch.randint(vocabulary, (1, arm.length), generator=generator).to(clock.device)
    batch = {"input_ids": ids, "labels": ids}
    if not clock.dry:
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for _ in range(STEPS + 1):
        clock.wait()
        began = time.perf_counter()
        losses.append(float(step(arm, trained, context, batch, clock)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.wait()
        times.append(time.perf_counter() - began)
    seconds = sorted(times[1:])[len(times[1:]) // 2]
    row = {"losses": losses, "step_s": seconds, "all_s": times, "tokens_per_second": arm.length / seconds}
    if not clock.dry:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row | {"model_flops": model_flops(arm, trained)}


def step(arm: Arm, trained: Trained, context: SequenceContext, batch: dict[str, Tensor], clock: Clock) -> Tensor:
    """Run one forward and backward as the training loop does; return the loss."""
    local = context.shard(batch)
    labels = local.pop("shift_labels")
    # SDPA sees the whole sequence as one causal square; position ids would have transformers look for documents.
    given = {**local, **context.kwargs()} if arm.attention == "ringspan" else {"input_ids": local["input_ids"]}
    with torch.autocast(clock.device.type, torch.bfloat16, enabled=not clock.dry):
        parts = parts_of(trained.model)
        hidden = parts.decoder(**given | {"use_cache": False}).last_hidden_state
        loss = chunked_cross_entropy(hidden, parts.head, labels, chunk=4096) / (labels != -100).sum()
    loss.backward()
    clip_grad_norm_(trained.model.parameters(), 1.0)
    return loss.detach()


def model_flops(arm: Arm, trained: Trained) -> float:
    """Return the FLOPs of a step as the model defines them."""
    config = trained.base.config
    embedding = config.vocab_size * config.hidden_size
    whole = Span(0, arm.length)
    area = (arm.mask or Causal()).area(whole, whole)
    attention = 12 * area * config.head_dim * config.num_attention_heads * config.num_hidden_layers
    return 6 * (trained.counts()[0] - embedding) * arm.length + attention
