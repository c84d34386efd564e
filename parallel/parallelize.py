"""A model on a mesh, in one screen: tensor, context, (stages,) activation checkpointing, compile, data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ringspan.parallel.data import shard_parameters
from ringspan.parallel.hf_attention import NAME
from ringspan.parallel.mesh import Mesh
from ringspan.parallel.parts import parts_of
from ringspan.parallel.pipeline import Pipeline
from ringspan.parallel.recompute import checkpoint_layers
from ringspan.parallel.scorer import Direct, Loss, Runner, Scorer
from ringspan.parallel.tensor import shard_layers
from ringspan.parallel.tiled import tile_mlps

Recompute = Literal["none", "full", "selective", "offload"]


@dataclass(frozen=True)
class Parallel:
    """A model on this rank; ``copies`` names tied weights that another rank holds too, and counts and saves."""

    runner: Runner
    mesh: Mesh | None
    named_parameters: Callable[[], Iterator[tuple[str, nn.Parameter]]]
    named_modules: Callable[[], Iterator[tuple[str, nn.Module]]]
    copies: frozenset[str] = frozenset()
    pipeline: Pipeline | None = None


@dataclass(frozen=True)
class Staging:
    """What a pipeline must know beforehand: its schedule, and the sizes of what travels between stages.

    Args:
        schedule: as in ``Pipeline``.
        micro_batches: of a step.
        batch: sequences of a micro-batch.
        tokens: the most that this rank's share of a sequence can have.
        length: of a whole sequence, to reckon what a layer costs.
    """

    schedule: str
    micro_batches: int
    batch: int
    tokens: int
    length: int


def parallelize(
    model: nn.Module,
    mesh: Mesh | None,
    *,
    loss: Loss,
    staging: Staging | None = None,
    recompute: Recompute = "none",
    mlp_tile: int | None = None,
    compile: bool = False,
    autocast: torch.dtype | None = None,
    gather_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Parallel:
    """Put a causal language model on a mesh, in place; nothing of its code changes.

    Args:
        model: a transformers model with the same weights on every rank, or one that peft has wrapped.
        mesh: from ``mesh_of``; None for one process.
        loss: what is summed over tokens, as ``finetune.loss.ChunkedLoss(chunk, mesh.group("tp"))``.
        staging: required where the mesh has pipeline stages.
        recompute: what the backward pass computes again; ``SequenceContext(keep_attention=...)`` must fit it.
        mlp_tile: tokens that go through an MLP at once; None: all.
        compile: compile each layer's forward.
        autocast: compute in this dtype over wider weights.
        gather_dtype: in which FSDP gathers parameters; None: as they are stored.
        offload: FSDP keeps parameters in host memory.
    """
    device = next(model.parameters()).device.type
    parts = parts_of(model)
    if mesh is not None and mesh.sizes.tp > 1:
        shard_layers(model, mesh["tp"])
    parts.base.set_attn_implementation(NAME)

    def ready(root: nn.Module, layers: Sequence[nn.Module]) -> None:
        prepare(root, layers, recompute=recompute, mlp_tile=mlp_tile, compile=compile, device=device, autocast=autocast)
        if mesh is not None and mesh.shards.size() > 1:
            shard_parameters(root, layers, mesh.shards, dtype=gather_dtype, offload=offload)

    if mesh is None or mesh.sizes.pp == 1:
        scorer = Scorer(model, loss)
        ready(scorer, list(parts.layers))
        return Parallel(Direct(scorer), mesh, model.named_parameters, model.named_modules)
    assert staging is not None, "a mesh with pipeline stages needs staging"
    pipeline = Pipeline(
        model,
        mesh["pp"],
        schedule=staging.schedule,
        micro_batches=staging.micro_batches,
        loss=loss,
        batch=staging.batch,
        tokens=staging.tokens,
        length=staging.length,
        tp=(mesh.sizes.tp, mesh.place["tp"]),
        prepare=ready,
    )
    return Parallel(pipeline, mesh, pipeline.named_parameters, pipeline.named_modules, pipeline.copies, pipeline)


def prepare(
    root: nn.Module,
    layers: Sequence[nn.Module],
    *,
    recompute: Recompute,
    mlp_tile: int | None,
    compile: bool,
    device: str,
    autocast: torch.dtype | None,
) -> None:
    """Tile, checkpoint and compile layers in place, and let the module that is called compute in ``autocast``."""
    if mlp_tile is not None:
        tile_mlps(layers, mlp_tile)
    checkpoint_layers(layers, recompute)
    if compile:
        for layer in layers:
            layer.forward = torch.compile(layer.forward)
    if autocast is not None:
        root.forward = torch.autocast(device, autocast)(root.forward)
