"""Attention as transformers calls it: the one place where a model's layer meets the sharded sequence.

What a layer declares is honoured (causal or full, sliding window, learned sinks) or refused by the layer's name;
nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ringspan.dist_attn.api import Extras, run
from ringspan.dist_attn.exchange import Traffic
from ringspan.dist_attn.layout import Layout, ZigZag
from ringspan.kernels.mask import Causal, Documents, Full, Mask, Window
from ringspan.parallel.boundaries import Boundaries, of_padding, of_positions

NAME = "ringspan"


@dataclass
class Forward:
    """One forward pass of one micro-batch: what its attention layers need, and what they keep for a recompute.

    The fields are ``SequenceContext``'s; ``kept`` holds each layer's (out, lse) between its first pass and its
    recompute; ``layer_masks`` notes what each layer computes, before document boundaries.
    """

    group: dist.ProcessGroup | None = None
    layout: Layout = field(default_factory=ZigZag)
    strategy: str = "auto"
    mask: Mask | None = None
    keep_attention: bool = False
    traffic: Traffic = field(default_factory=Traffic)
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    layer_masks: dict[int, Mask] = field(default_factory=dict)


def register() -> None:
    """Make ``attn_implementation="ringspan"`` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, ringspan_attention)
    AttentionMaskInterface.register(NAME, ringspan_mask)


def ringspan_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, L, D], key and value [B, G, L, D]; returns ([B, L, H, D], None).

    What the model declares is honoured (causal or full, ``sliding_window``, learned sinks ``s_aux``) or refused by the
    layer's name; a mask that the context gives takes the place of causal and window.
    """
    layer = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
    given: Forward | None = kwargs.get(NAME)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    _refuse(layer, query, key, attention_mask, dropout, given, {**kwargs, "is_causal": causal})
    forward = given or Forward()
    boundaries = kwargs.get("document_boundaries")
    if boundaries is None:
        boundaries = _own_documents(query, attention_mask, kwargs.get("position_ids"))
    length = query.shape[2] if boundaries is None else _length(boundaries)
    index = int(getattr(module, "layer_idx", 0) or 0)
    mask = forward.mask or _own_mask(causal, kwargs.get("sliding_window"))
    forward.layer_masks[index] = mask
    if boundaries is not None and boundaries != (0, length):
        mask = mask & Documents(boundaries)
    q, k, v = (x.transpose(1, 2) for x in _one_dtype(query, key, value))
    keep = forward.keep_attention and torch.is_grad_enabled()
    kept = forward.kept.pop(index, None) if keep else None
    extras = Extras(label=index, traffic=forward.traffic, agreed=True, keep=keep, kept=kept)
    try:
        out, lse = run(
            q,
            k,
            v,
            mask=mask,
            group=forward.group,
            layout=forward.layout,
            strategy=forward.strategy,
            sinks=kwargs.get("s_aux"),
            scale=scaling,
            length=length,
            extras=extras,
        )
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from error
    if keep and kept is None:
        forward.kept[index] = (out.detach(), lse.detach())
    return out, None


def ringspan_mask(
    *args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any
) -> Tensor | None:
    """Mask function for transformers: hand padding on to the attention function instead of building a table.

    Raises:
        ValueError: for a model that composes its own mask function, which no mask expression here stands for.
    """
    del args, kwargs
    if use_vmap:
        raise ValueError("the model composes its own attention mask function; ringspan attention cannot honour it")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask


def _refuse(
    layer: str,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    forward: Forward | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Raise for what this attention does not compute: nothing a model asks for is dropped silently."""
    window = kwargs.get("sliding_window")
    boundaries = kwargs.get("document_boundaries")
    if dropout > 0:
        raise ValueError(f"{layer}: attention_dropout {dropout} is not supported; set it to 0 in the model's config")
    if window is not None and kwargs.get("is_causal") is False:
        raise ValueError(f"{layer}: sliding_window {window} without a causal mask is not supported")
    for name in (
        "softcap",
        "logits_soft_cap",
        "position_bias",
        "head_mask",
        "cu_seq_lens_q",
        "chunk_size",
    ):
        if kwargs.get(name) is not None:
            raise ValueError(f"{layer}: {name} is not supported by ringspan attention")
    if kwargs.get("output_attentions"):
        raise ValueError(f"{layer}: output_attentions is not supported: the weights are never all in one place")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{layer}: {key.shape[2]} keys for {query.shape[2]} queries: a KV cache is not supported; use_cache=False"
        )
    if attention_mask is not None and (forward is not None or attention_mask.dim() != 2):
        raise ValueError(
            f"{layer}: attention_mask of {attention_mask.dim()} dimensions; put a [batch, tokens] one into the batch "
            "that SequenceContext.shard cuts"
        )
    if forward is not None and boundaries is None and forward.group is not None:
        raise ValueError(f"{layer}: document_boundaries is missing: pass all that SequenceContext.shard returned")
    if forward is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"{layer}: {dist.get_world_size()} ranks and no context: pass **context.kwargs() to the model "
            "(SequenceContext() where each rank holds whole sequences)"
        )


def _own_mask(causal: bool, window: int | None) -> Mask:
    """Return what the layer declares; Hugging Face's window counts the query itself."""
    if not causal:
        return Full()
    return Causal() if window is None else Causal() & Window(window - 1)


def _own_documents(query: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Boundaries | None:
    """Without a context: documents from padding, or from position ids that start anew."""
    if attention_mask is not None:
        return of_padding(attention_mask)
    if position_ids is not None and position_ids.dim() == 2:
        return of_positions(position_ids.expand(query.shape[0], -1))
    return None


def _one_dtype(*tensors: Tensor) -> Sequence[Tensor]:
    """Under autocast norms and rotary embeddings hand on wider tensors than the projections: cast as matmul would."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]
    return tensors


def _length(boundaries: Boundaries) -> int:
    last = boundaries[-1]
    return last if isinstance(last, int) else last[-1]
