"""Tiny models of kinds whose layers differ, and their loss and gradients on any number of ranks."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import SIZES
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from ringspan.dist_attn import Causal, Contiguous, Window, ZigZag
from ringspan.dist_attn.balanced import Balanced
from ringspan.dist_attn.groups import Group
from ringspan.dist_attn.layout import Striped
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.data import sum_gradients

LENGTH = 45
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
EAGER = ("gemma2", "gpt_oss")  # kinds that transformers does not run through sdpa
EXPERTS = ("qwen2_moe", "gpt_oss")


def config_of(kind: str, window: int) -> Any:
    """A config with a window in all layers, in some by their number, in some by their type, and with learned sinks."""
    sliding: dict[str, Any] = {**SIZES, "sliding_window": window, "initializer_range": 0.2}
    plain_rope = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        "mistral": lambda: MistralConfig(**sliding),
        "qwen2": lambda: Qwen2Config(**sliding, use_sliding_window=True, max_window_layers=1),
        "qwen3": lambda: Qwen3Config(**sliding, use_sliding_window=True, layer_types=ALTERNATING),
        # The window stands in this model's mask alone: its layers do not name it.
        "qwen2_moe": lambda: Qwen2MoeConfig(
            **sliding,
            num_experts_per_tok=1,
            use_sliding_window=True,
            layer_types=ALTERNATING,
            num_experts=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        "gemma2": lambda: Gemma2Config(
            **sliding, query_pre_attn_scalar=5, attn_logit_softcapping=None, final_logit_softcapping=None
        ),
        "gemma3": lambda: Gemma3TextConfig(**sliding, query_pre_attn_scalar=5, layer_types=ALTERNATING),
        "gpt_oss": lambda: GptOssConfig(
            **sliding, num_experts_per_tok=1, num_local_experts=2, rope_parameters=plain_rope
        ),
    }[kind]()


def build_model(kind: str, window: int, dtype: torch.dtype, implementation: str = "ringspan") -> Any:
    torch.manual_seed(0)
    config = config_of(kind, window)
    # The usual experts know no float64, and eager ones do not compile.
    options = {"experts_implementation": "eager"} if kind in EXPERTS and dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32, **options)
    for name, parameter in model.named_parameters():
        if "norm" in name or "sinks" in name or name.endswith("bias"):  # what starts as a constant hides mistakes
            torch.nn.init.normal_(parameter, 0.7, 0.3)
    return model.to(dtype).train()


def batch(edges: list[int], scored: int | None = None) -> dict[str, Any]:
    """Two rows of 45 tokens; with ``scored``, only that many first tokens have labels."""
    ids = torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if scored is not None:
        labels[:, scored:] = -100
    return {"input_ids": ids, "labels": labels, "document_boundaries": edges}


def stock(
    kind: str, window: int, dtype: torch.dtype, edges: list[int], scored: int | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """The same model through transformers alone, a document at a time; the loss from its definition."""
    model = build_model(kind, window, dtype, "eager" if kind in EAGER else "sdpa")
    given = batch(edges, scored)
    total, count = torch.zeros((), dtype=dtype), 0
    for a, b in zip(edges, edges[1:], strict=False):
        logits = model(input_ids=given["input_ids"][:, a:b], use_cache=False).logits[:, :-1]
        labels = given["labels"][:, a + 1 : b]
        total = total + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
        count += int((labels != -100).sum())
    (total / count).backward()
    return float(total.detach() / count), gradients(model)


def sharded(
    model: Any, context: SequenceContext, edges: list[int], scored: int | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all ranks, and its gradients, summed over them."""
    given = batch(edges, scored)
    count = SequenceContext().shard(given)["shift_labels"].ne(-100).sum()
    local = context.shard(given)
    labels = local.pop("shift_labels")
    logits = model(**local, **context.kwargs()).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100) / count
    loss.backward()
    sum_gradients(model.parameters(), context.group)
    total = loss.detach().clone()
    if context.group is not None:
        dist.all_reduce(total, group=context.group)
    return float(total), gradients(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter's gradient; an expert that no token took has none, which is zero."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def context_of(group: Group, layout: str, **options: Any) -> SequenceContext:
    """``balanced`` is so for a causal layer between two of a window of 9."""
    layouts = {
        "zigzag": ZigZag(),
        "contiguous": Contiguous(),
        "striped": Striped(4),
        "balanced": Balanced([(Causal(), 1), (Causal() & Window(8), 2)], kv_heads=2),
    }
    return SequenceContext(group, layout=layouts[layout], **options)
