"""Tiny Hugging Face models that declare what a case asks for, and their loss and gradients in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peers.cases import DIM, Case
from torch import Tensor

VOCABULARY = 97


def build(case: Case, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a causal LM: Llama; Mistral where the case has a window; gpt-oss where it has learned sinks."""
    from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MistralConfig

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": DIM,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,  # at 0.02 attention is nearly uniform, and mistakes in it hide
    }
    if case.sinks:
        kinds = ["full_attention" if case.window is None else "sliding_attention"] * 2
        # Every expert is chosen: a near tie between experts would not be an error of attention.
        experts: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 2, "experts_implementation": "eager"}
        config = GptOssConfig(**sizes, **experts, layer_types=kinds, sliding_window=case.window or 128)
    elif case.window is not None:
        config = MistralConfig(**sizes, sliding_window=case.window)
    else:
        config = LlamaConfig(**sizes)
    torch.manual_seed(3)
    # Weights are drawn in float32 whatever the dtype, and before the library's attention is named.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "sinks" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        if "router" in name:  # its bias has almost no gradient, and so one of rounding errors
            parameter.requires_grad_(False)
    model = model.to(dtype).train()
    if implementation != "eager":
        model.set_attn_implementation(implementation)
    return model


def batch(case: Case) -> dict[str, Tensor]:
    """Return input_ids, labels (unshifted; no label crosses into a document) and position_ids, each [1, length]."""
    ids = torch.randint(0, VOCABULARY, (1, case.length), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, list(case.boundaries[:-1]) if case.boundaries else [0]] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": case.positions()[None]}


def shifted(labels: Tensor) -> Tensor:
    """Return each token's label: the next token's."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def total_loss(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the sum of the tokens' losses over the global count of scored tokens."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / count


def truth(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and every parameter's gradient: eager attention, float64, the mask written out."""
    model, given = build(case, "eager", torch.float64), batch(case)
    bias = torch.zeros(case.length, case.length, dtype=torch.float64)
    bias = bias.masked_fill(~case.table(), torch.finfo(torch.float64).min)[None, None]
    mask: Any = {"full_attention": bias, "sliding_attention": bias} if case.sinks else bias
    rest = {"position_ids": given["position_ids"], "use_cache": False}
    logits = model(input_ids=given["input_ids"], attention_mask=mask, **rest).logits
    labels = shifted(given["labels"])
    loss = total_loss(logits, labels, int((labels != -100).sum()))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
