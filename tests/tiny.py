"""Tiny models and batches that several tests share."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import ringspan.parallel.context  # noqa: F401 - registers "ringspan" with transformers

EDGES = [0, 10, 11, 30, 45]
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def build(kind: str, dtype: torch.dtype, implementation: str = "ringspan") -> Any:
    torch.manual_seed(0)
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind](**SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones hide a mistake in a norm's gradient
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model.to(dtype).train()


def tokens(batch: int = 2, length: int = 45) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))
