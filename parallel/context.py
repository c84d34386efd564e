"""Context parallelism for a Hugging Face model that does not know of it.

``SequenceContext.shard`` cuts a batch by the layout: tokens, labels (shifted before the cut) and position ids (global
within their document) alike. The model then runs on its local tokens; its attention function, registered with
transformers under the name "ringspan", is the one place where tokens of other ranks are needed. The context travels
as a forward keyword, so that a recompute sees it, and never as module state.

Importing this module registers the attention function and its mask function with transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.dist_attn.cost import Costs
from ringspan.dist_attn.exchange import Traffic, agree
from ringspan.dist_attn.groups import Group, groups_of
from ringspan.dist_attn.layout import Layout, ZigZag
from ringspan.dist_attn.planner import check_strategy
from ringspan.kernels.mask import Mask
from ringspan.parallel.boundaries import Boundaries, Packed, of_batch, positions, shift_labels
from ringspan.parallel.hf_attention import NAME, Forward, register

IGNORE = -100  # label of a token that is not scored, as everywhere in Hugging Face


class SequenceContext:
    """How one sequence is shared by the ranks of ``group``.

    Args:
        group: the ranks that share a sequence: a ProcessGroup, a DeviceMesh (2-D: nodes, ranks in a node), or None for
            a process that holds it all.
        layout: who holds which tokens; one that looks at documents is fitted to each batch.
        strategy: as in ``dist_attn.attention``.
        mask: for every layer; None takes each layer's own (causal or full, with its sliding window, as the model
            declares it). Document boundaries of the batch are added to either.
        keep_attention: for a model under activation checkpointing: keep attention's (out, lse) of the first pass, so
            that the recompute never runs the exchange again.
        gradient_dtype, costs, debug, first_kv_head, total_kv_heads: as in ``dist_attn.attention``.
    """

    def __init__(
        self,
        group: Group = None,
        *,
        layout: Layout | None = None,
        strategy: str = "auto",
        mask: Mask | None = None,
        keep_attention: bool = False,
        gradient_dtype: torch.dtype | None = None,
        costs: Costs | None = None,
        debug: bool = False,
        first_kv_head: int = 0,
        total_kv_heads: int | None = None,
    ) -> None:
        check_strategy(strategy)
        groups = groups_of(group)
        groups.connect()
        self.group: dist.ProcessGroup | None = groups.flat
        self.rank, self.world = groups.rank, groups.world
        self._given = group
        self.layout = layout or ZigZag()
        self.strategy = strategy
        if mask is not None and mask.documents is not None:
            raise ValueError(f"mask: {mask} holds documents; these come with each batch, leave them out")
        self.mask = mask
        self.keep_attention = keep_attention
        self.gradient_dtype, self.costs, self.debug = gradient_dtype, costs, debug
        self.first_kv_head, self.total_kv_heads = first_kv_head, total_kv_heads
        self.traffic = Traffic()
        self.layer_masks: dict[int, Mask] = {}  # by layer index, without documents; as of the last pass that noted them
        self.decisions: dict[str, str] = {}  # the strategy last taken and why, by the text of a kind of layer's mask

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a batch that every rank of the group holds in full.

        Args:
            batch: ``input_ids`` [B, S]; optionally ``labels`` [B, S] (unshifted, -100 where not scored) or
                ``shift_labels`` [B, S] (already shifted), ``document_boundaries`` (see ``Documents``),
                ``attention_mask`` [B, S] (0 where padded), ``position_ids`` [B, S].

        Returns:
            ``input_ids``, ``position_ids`` and (with labels) ``shift_labels``, each [B, L]; ``document_boundaries`` of
            the global sequence, a ``Packed``. To be passed on with ``kwargs()``:
            ``model(**local, **context.kwargs())``.

        Raises:
            Disagreement: on every rank alike, if a rank's batch is faulty or differs from the others'.
        """
        fault, full, boundaries = None, {}, ()
        try:
            full, boundaries = _complete(batch)
            self._check_length(full["input_ids"].shape[1])
        except ValueError as error:
            fault = str(error)
        agree(self.group, self._facts(full, boundaries), fault)
        packed = Packed(boundaries, self.layout)
        local: dict[str, Any] = {name: self._cut(tensor, packed.layout) for name, tensor in full.items()}
        local["document_boundaries"] = packed
        return local

    def kwargs(self) -> dict[str, Any]:
        """Return the forward keywords of one pass: call it anew for each micro-batch."""
        forward = Forward(
            self._given,
            self.layout,
            self.strategy,
            None if self.mask is None else str(self.mask),
            self.keep_attention,
            self.traffic,
            layer_masks=self.layer_masks,
            decisions=self.decisions,
            gradient_dtype=self.gradient_dtype,
            costs=self.costs,
            debug=self.debug,
            first_kv_head=self.first_kv_head,
            total_kv_heads=self.total_kv_heads,
        )
        return {"use_cache": False, NAME: forward}

    def _cut(self, x: Tensor, layout: Layout) -> Tensor:
        spans = layout.spans(self.rank, self.world, x.shape[1])
        return torch.cat([x[:, span.start : span.stop] for span in spans], dim=1) if spans else x[:, :0]

    def _check_length(self, length: int) -> None:
        if length < self.world:
            raise ValueError(
                f"input_ids: {length} tokens for {self.world} ranks leave a rank without any; "
                f"give at least {self.world} tokens or fewer ranks"
            )

    def _facts(self, full: Mapping[str, Tensor], boundaries: Boundaries) -> str:
        digest = hashlib.sha256()
        for name in sorted(full):
            digest.update(name.encode() + full[name].cpu().contiguous().numpy().tobytes())
        shape = tuple(full["input_ids"].shape) if full else None
        documents = hashlib.sha256(repr(boundaries).encode()).hexdigest()[:16]
        return (
            f"batch {shape} digest {digest.hexdigest()[:16]}, documents {documents}, {self.layout}, {self.strategy}, "
            f"mask {self.mask}, keep_attention {self.keep_attention}, gradients {self.gradient_dtype}, "
            f"costs {self.costs}, debug {self.debug}, KV heads from {self.first_kv_head} of {self.total_kv_heads}"
        )


def _complete(batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Boundaries]:
    """Return the full tensors to cut, and the document boundaries; padding becomes documents of its own."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        raise ValueError(f"input_ids: must be a non-empty tensor [batch, tokens], got {_describe(ids)}")
    known = {
        "input_ids",
        "labels",
        "shift_labels",
        "document_boundaries",
        "attention_mask",
        "position_ids",
    }
    if unknown := sorted(set(batch) - known):
        raise ValueError(f"batch: unknown key {unknown[0]!r}; it may hold {', '.join(sorted(known))}")
    if "labels" in batch and "shift_labels" in batch:
        raise ValueError("batch: both labels and shift_labels given; give the unshifted or the shifted ones")
    for name in ("labels", "shift_labels", "attention_mask", "position_ids"):
        if name in batch and tuple(batch[name].shape) != tuple(ids.shape):
            raise ValueError(f"{name}: shape {tuple(batch[name].shape)} is not input_ids' {tuple(ids.shape)}")
    padding = batch.get("attention_mask")
    boundaries = of_batch(batch.get("document_boundaries"), padding, *ids.shape)
    given = batch.get("position_ids")
    full = {
        "input_ids": ids,
        "position_ids": given if given is not None else positions(boundaries, ids.shape[0]).to(ids.device),
    }
    if "shift_labels" in batch:
        full["shift_labels"] = batch["shift_labels"]
    elif "labels" in batch:
        labels = batch["labels"] if padding is None else batch["labels"].masked_fill(padding == 0, IGNORE)
        full["shift_labels"] = shift_labels(labels, boundaries, IGNORE)
    return full, boundaries


def _describe(x: object) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


register()
