"""From the config to a model on its mesh: sizes, what they ask of the model, and the engine that trains it."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import torch

from ringspan.configs.schema import Config
from ringspan.finetune.loss import ChunkedLoss
from ringspan.finetune.model import Trained
from ringspan.finetune.optim import build_optimizer
from ringspan.launch.plan_inputs import layout_of
from ringspan.launch.ranks import Place
from ringspan.parallel.engine import Engine, Saved, Sharded
from ringspan.parallel.faults import Fault
from ringspan.parallel.mesh import Sizes
from ringspan.parallel.parallelize import Parallel, Staging, parallelize, prepare
from ringspan.parallel.parts import parts_of
from ringspan.parallel.pipeline import check_pipeline
from ringspan.parallel.scorer import Scorer
from ringspan.parallel.tensor import check_tensor
from ringspan.parallel.zero_config import LARGEST_STAGE, read, resolve


def sizes(config: Config, *, launched: bool) -> Sizes:
    """Return the mesh's sizes; an unset dp_shard takes up the world under a launcher that says how large it is."""
    parallel = config.parallel
    given = (parallel.pp, parallel.dp_replicate, parallel.cp, parallel.tp)
    shard = parallel.dp_shard if parallel.dp_shard is not None else (-1 if launched and -1 not in given else 1)
    return Sizes(parallel.pp, parallel.dp_replicate, shard, parallel.cp, parallel.ulysses, parallel.tp)


def check_mesh(config: Config, hf_config: Any) -> None:
    """Check that heads and layers divide as the mesh asks.

    Raises:
        Fault: if not.
    """
    hf, parallel = hf_config.get_text_config(), config.parallel
    try:
        if parallel.tp > 1:
            check_tensor(hf, parallel.tp)
        if parallel.pp > 1:
            check_pipeline(
                hf.num_hidden_layers,
                parallel.pp,
                parallel.schedule,
                config.train.gradient_accumulation_steps,
            )
    except ValueError as error:
        raise Fault(f"parallel.{error}") from error
    if config.train.compile and not torch.cuda.is_available() and shutil.which("g++") is None:
        raise Fault(
            "train.compile: on the CPU torch compiles with g++, which is not installed; install it, or set false"
        )


def check_deepspeed(config: Config) -> None:
    """Check what DeepSpeed will be told.

    Raises:
        Fault: it is not installed, or its config contradicts ours.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise Fault("parallel.engine: deepspeed is not installed: pip install 'ringspan[deepspeed]'")
    given, train = read(config.parallel.deepspeed), config.train
    batch = given.get("train_batch_size")
    ranks = batch // (train.batch_size * train.gradient_accumulation_steps) if isinstance(batch, int) else 1
    stage = zero_config(config, ranks)["zero_optimization"]["stage"]  # the batch is checked once the world is known
    if stage == LARGEST_STAGE and train.mlp_tile is not None:
        raise Fault(
            f"train.mlp_tile: {train.mlp_tile} does not compose with ZeRO-3, which cuts the weights that tiles need "
            "whole; leave it out, take stage 2, or parallel.engine=fsdp"
        )


def make_parallel(config: Config, place: Place, trained: Trained, *, training: bool = True) -> Parallel:
    """Put the model on the mesh; ``training=False``: only to be judged."""
    train = config.train
    preparing = _preparing(config) if training else {**_preparing(config), "recompute": "none", "compile": False}
    loss = ChunkedLoss(train.loss_chunk, place.mesh.group("tp") if place.mesh is not None else None)
    gather = config.parallel.gather_dtype
    try:
        return parallelize(
            trained.model,
            place.mesh,
            loss=loss,
            staging=Staging(
                config.parallel.schedule,
                train.gradient_accumulation_steps,
                train.batch_size,
                _most_tokens(config, place.sizes.cp),
                config.data.seq_length,
            ),
            **preparing,
            gather_dtype=torch.bfloat16 if gather == "bfloat16" else None,
            offload=config.parallel.cpu_offload,
        )
    except ValueError as error:
        raise Fault(str(error)) from error


def make_engine(config: Config, place: Place, trained: Trained, saved: Saved | None = None) -> Engine:
    """Put the model on the mesh and give it an optimizer: what the loop trains; with a checkpoint's weights, if any."""
    train = config.train
    settings = {"betas": (train.adam_beta1, train.adam_beta2), "weight_decay": train.weight_decay}
    if config.parallel.engine == "deepspeed":
        return _make_zero(config, place, trained, settings, saved)
    parallel = make_parallel(config, place, trained)
    optimizer = build_optimizer(parallel.named_parameters(), **settings)
    engine = Sharded(parallel, optimizer, max_norm=train.max_grad_norm, group=place.group, device=place.device)
    if saved is not None:
        engine.restore(saved)
    return engine


def _make_zero(config: Config, place: Place, trained: Trained, settings: dict[str, Any], saved: Saved | None) -> Engine:
    from ringspan.parallel.zero import Zero

    if place.group is None:
        raise Fault("parallel.engine: deepspeed shards over ranks, and there is one; give parallel.cp or dp_shard")
    scorer = Scorer(trained.model, ChunkedLoss(config.train.loss_chunk))
    prepare(scorer, list(parts_of(trained.model).layers), device=place.device.type, **_preparing(config))
    optimizer = build_optimizer(trained.model.named_parameters(), **settings)
    return Zero(
        scorer, optimizer, config=zero_config(config, place.world), group=place.group, device=place.device, saved=saved
    )


def zero_config(config: Config, ranks: int) -> dict[str, Any]:
    """Return what DeepSpeed is told.

    Raises:
        Fault: for a key that contradicts the config.
    """
    train = config.train
    return resolve(
        read(config.parallel.deepspeed),
        micro_batch=train.batch_size,
        micro_batches=train.gradient_accumulation_steps,
        ranks=ranks,
        max_norm=train.max_grad_norm,
    )


def _preparing(config: Config) -> dict[str, Any]:
    """Return what is done to the layers before they are sharded."""
    train = config.train
    return {
        "recompute": train.activation_checkpointing,
        "mlp_tile": train.mlp_tile,
        "compile": train.compile,
        "autocast": torch.bfloat16 if config.model.dtype == "bfloat16" else None,
    }


def _most_tokens(config: Config, cp: int) -> int:
    """Return the most tokens of a sequence that a rank can have, whatever its documents."""
    length = config.data.seq_length
    if config.attention.layout == "balanced":
        return -(-length // cp)  # shares are equal to the token
    layout = layout_of(config.attention.layout, [], 0)
    return max(layout.share(rank, cp, length) for rank in range(cp))
