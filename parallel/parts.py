"""A Hugging Face causal language model as parallelism sees it: embedding, layers, head; also inside peft's wrapper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Parts:
    """Where things stand in a model. ``decoder`` maps ids to hidden states, ``head`` hidden states to logits."""

    base: PreTrainedModel  # inside peft's wrapper, if there is one
    decoder: nn.Module
    embed: nn.Module
    layers: nn.ModuleList
    norm: nn.Module  # after the last layer
    head: nn.Module

    @property
    def config(self) -> Any:
        """The transformers config of the text model."""
        return self.base.config.get_text_config()

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one parameter."""
        return getattr(self.embed, "weight", None) is getattr(self.head, "weight", self)


def parts_of(model: nn.Module) -> Parts:
    """Return the parts of a transformers causal LM, or of one that peft has wrapped.

    Raises:
        ValueError: for a model that is not built as embedding, layers, norm and head.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"model: {type(model).__name__} is no transformers model; give a causal language model")
    decoder: Any = base.base_model
    embed, layers, norm = (getattr(decoder, name, None) for name in ("embed_tokens", "layers", "norm"))
    head = base.get_output_embeddings()
    found = {"embed_tokens": embed, "layers": layers, "norm": norm, "an output head": head}
    if missing := [name for name, part in found.items() if part is None]:
        raise ValueError(
            f"model: {type(base).__name__} has no {', no '.join(missing)}; data, tensor and pipeline parallelism "
            "serve models built like Llama's"
        )
    return Parts(
        base,
        decoder,
        cast(nn.Module, embed),
        cast(nn.ModuleList, layers),
        cast(nn.Module, norm),
        cast(nn.Module, head),
    )
