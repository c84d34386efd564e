"""Attention as transformers calls it: the one place where a model's layer meets the sharded sequence.

What a layer declares is honoured (causal or full, sliding window, learned sinks) or refused by the layer's name;
nothing is dropped.

Under torch.compile one rank's attention is one operator of the graph. Over several ranks it stands between graphs: an
exchange is no operator, and Python plans it. Compiled code reads nothing here that changes from one batch to the next
(documents are a tensor), or from one layer to the next of its kind: neither compiles anything anew.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ringspan.dist_attn.api import Extras, run
from ringspan.dist_attn.cost import Costs
from ringspan.dist_attn.exchange import Traffic
from ringspan.dist_attn.groups import Group, groups_of
from ringspan.dist_attn.layout import Layout, ZigZag
from ringspan.kernels.attention import attend
from ringspan.kernels.mask import Mask
from ringspan.kernels.masks.expression import parse
from ringspan.parallel.boundaries import Packed, of_padding, of_positions
from ringspan.parallel.hf_mask import declared, ringspan_mask

NAME = "ringspan"
_UNKNOWN = (  # what some models ask their attention for, and this one does not compute
    "softcap",
    "logits_soft_cap",
    "position_bias",
    "head_mask",
    "cu_seq_lens_q",
    "chunk_size",
    "indices",
    "block_indices",
    "sinks",
)


@dataclass(eq=False)
class Forward:
    """One forward pass of one micro-batch: what its attention layers need, and what they keep for a recompute.

    The fields are ``SequenceContext``'s, ``mask`` in its text. ``kept`` holds each layer's (out, lse) between its first
    pass and its recompute; ``batch`` the documents of the batch it is kept for. ``layer_masks`` notes what each layer
    computes, before document boundaries, and ``decisions`` by which strategy, and why.
    """

    group: Group = None
    layout: Layout = field(default_factory=ZigZag)
    strategy: str = "auto"
    mask: str | None = None
    keep_attention: bool = False
    traffic: Traffic = field(default_factory=Traffic)
    kept: MutableMapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    layer_masks: dict[int, Mask] = field(default_factory=dict)
    decisions: dict[str, str] = field(default_factory=dict)
    batch: object = None
    gradient_dtype: torch.dtype | None = None
    costs: Costs | None = None
    debug: bool = False
    first_kv_head: int = 0
    total_kv_heads: int | None = None

    def __post_init__(self) -> None:
        # One rank that keeps nothing: attention is then one operator.
        self.alone = groups_of(self.group).world == 1 and not self.keep_attention


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, L, D], key and value [B, G, L, D]; returns ([B, L, H, D], None).

    What the model declares is honoured (causal or full, ``sliding_window``, learned sinks ``s_aux``) or refused by the
    layer's name; a mask that the context gives takes the place of causal and window.

    Args:
        module: the layer.
        attention_mask: what ``ringspan_mask`` made.
        kwargs: ``scaling``, ``dropout``, and what the model hands through: the context's among them.
    """
    forward: Forward | None = kwargs.get(NAME)
    boundaries = kwargs.get("document_boundaries")
    if forward is None or not forward.alone or not isinstance(boundaries, Packed):
        return _exchanged(module, query, key, value, attention_mask, kwargs), None
    text = _mask_of(module, query, key, attention_mask, kwargs)
    if boundaries.length != query.shape[2]:
        raise ValueError(
            f"{_layer(module)}: {query.shape[2]} tokens, but document_boundaries end at {boundaries.length}; "
            "pass all that SequenceContext.shard returned"
        )
    if not torch.compiler.is_compiling():  # a compiled graph reads no layer's number
        forward.layer_masks[_index(module)] = _parsed(text)
    q, k, v = (x.transpose(1, 2) for x in _one_dtype(query, key, value))
    try:
        return attend(
            q,
            k,
            v,
            mask=text,
            boundaries=boundaries.tensor,
            sinks=kwargs.get("s_aux"),
            scale=kwargs.get("scaling"),
            out_dtype=q.dtype,
            first_kv_head=forward.first_kv_head,
            total_kv_heads=forward.total_kv_heads,
        )[0], None
    except ValueError as error:
        raise ValueError(f"{_layer(module)}: {error}") from error


@torch.compiler.disable(reason="an exchange is no operator, and Python plans it")
def _exchanged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """Attention over several ranks, or kept for a recompute, or of a batch that no context has cut."""
    text = _mask_of(module, query, key, attention_mask, kwargs)
    forward, index = kwargs.get(NAME) or Forward(), _index(module)
    packed = _packed(query, attention_mask, forward.layout, kwargs)
    forward.layer_masks[index] = mask = _parsed(text)
    if packed.documents is not None:
        mask = mask & packed.documents
    q, k, v = (x.transpose(1, 2) for x in _one_dtype(query, key, value))
    # A layer under reentrant checkpointing makes its first pass without gradients.
    keep = forward.keep_attention and (torch.is_grad_enabled() or module.training)
    kept = _kept(forward, index, kwargs.get("document_boundaries"), _layer(module)) if keep else None
    try:
        out, lse = run(
            q,
            k,
            v,
            mask=mask,
            group=forward.group,
            layout=packed.layout,
            strategy=forward.strategy,
            sinks=kwargs.get("s_aux"),
            scale=kwargs.get("scaling"),
            length=packed.length,
            first_kv_head=forward.first_kv_head,
            total_kv_heads=forward.total_kv_heads,
            extras=Extras(
                gradient_dtype=forward.gradient_dtype,
                traffic=forward.traffic,
                costs=forward.costs,
                debug=forward.debug,
                label=index,
                agreed=True,
                keep=keep,
                kept=kept,
                decided=partial(forward.decisions.__setitem__, text),
            ),
        )
    except ValueError as error:
        raise ValueError(f"{_layer(module)}: {error}") from error
    if keep and kept is None:
        forward.kept[index] = (out.detach(), lse.detach())
    return out


def _kept(forward: Forward, index: int, batch: object, layer: str) -> tuple[Tensor, Tensor] | None:
    """Take what the first pass of this layer kept; None in the first pass itself."""
    if forward.batch is not batch and forward.batch is not None:
        raise ValueError(f"{layer}: one context.kwargs() for two batches; call it anew for each of them")
    forward.batch = batch
    return forward.kept.pop(index, None)


def _mask_of(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: Mapping[str, Any]
) -> str:
    """Return the text of the mask without documents; raise, with the layer's name, for what is not computed here."""
    forward: Forward | None = kwargs.get(NAME)
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    window = kwargs.get("sliding_window")
    try:
        padding, of_mask = declared(attention_mask)
    except ValueError as error:
        raise ValueError(f"{_layer(module)}: {error}") from error
    if padding is not None and forward is not None:
        raise ValueError(
            f"{_layer(module)}: attention_mask of 2 dimensions; put it into the batch that SequenceContext.shard cuts"
        )
    if of_mask is not None and window is not None and of_mask != window:
        raise ValueError(f"{_layer(module)}: sliding_window {window}, but the model's mask has one of {of_mask}")
    window = of_mask if window is None else window
    _refuse(module, query, key, forward, causal, window, kwargs)
    if forward is not None and forward.mask is not None:
        return forward.mask
    if not causal:
        return "full"
    return "causal" if window is None else f"causal & window({window - 1})"  # Hugging Face counts the query itself


def _refuse(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    forward: Forward | None,
    causal: bool,
    window: int | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Raise for what this attention does not compute: nothing a model asks for is dropped silently."""
    if kwargs.get("dropout"):
        raise ValueError(
            f"{_layer(module)}: attention_dropout {kwargs['dropout']} is not supported; "
            "set it to 0 in the model's config"
        )
    if window is not None and not causal:
        raise ValueError(f"{_layer(module)}: sliding_window {window} without a causal mask is not supported")
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(f"{_layer(module)}: {name} is not supported by ringspan attention")
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{_layer(module)}: output_attentions is not supported: the weights are never all in one place"
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{_layer(module)}: {key.shape[2]} keys for {query.shape[2]} queries: a KV cache is not supported; "
            "use_cache=False"
        )
    if forward is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"{_layer(module)}: {dist.get_world_size()} ranks and no context: pass **context.kwargs() to the model "
            "(SequenceContext() where each rank holds whole sequences)"
        )
    if forward is not None and forward.group is not None and kwargs.get("document_boundaries") is None:
        raise ValueError(
            f"{_layer(module)}: document_boundaries is missing: pass all that SequenceContext.shard returned"
        )


def _packed(query: Tensor, attention_mask: Tensor | None, layout: Layout, kwargs: Mapping[str, Any]) -> Packed:
    """Return the batch's documents; without a context those of its padding, or of position ids that start anew."""
    edges = kwargs.get("document_boundaries")
    if isinstance(edges, Packed):
        return edges
    padding, _ = declared(attention_mask)
    positions = kwargs.get("position_ids")
    if edges is None and padding is not None:
        edges = of_padding(padding)
    elif edges is None and positions is not None and positions.dim() == 2:
        edges = of_positions(positions.expand(query.shape[0], -1))
    return Packed((0, query.shape[2]) if edges is None else edges, layout)


def _one_dtype(*tensors: Tensor) -> Sequence[Tensor]:
    """Under autocast norms and rotary embeddings hand on wider tensors than the projections: cast as matmul would."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]
    return tensors


@lru_cache(maxsize=64)
def _parsed(text: str) -> Mask:
    return parse(text)


def _index(module: nn.Module) -> int:
    return int(getattr(module, "layer_idx", 0) or 0)


def _layer(module: nn.Module) -> str:
    return f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
