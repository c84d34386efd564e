"""From the config to objects: the only module that knows both sides."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ringspan.configs.load import dump
from ringspan.configs.schema import Config
from ringspan.dist_attn import Causal, parse_mask, plan
from ringspan.dist_attn.cost import Costs
from ringspan.dist_attn.layout import Layout
from ringspan.finetune import publish
from ringspan.finetune import rope as rope_scaling
from ringspan.finetune.data import SequenceStream
from ringspan.finetune.evaluate import Judge
from ringspan.finetune.files import find_files
from ringspan.finetune.loss import ChunkedLoss
from ringspan.finetune.model import Lora, Trained, build, heads_of, local_heads, read_config, read_tokenizer
from ringspan.finetune.optim import build_optimizer
from ringspan.finetune.track import Tracker
from ringspan.launch.plan_inputs import checked_mask, gradient_dtype, layer_masks, layout_of, measured_costs
from ringspan.launch.ranks import Place
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.engine import Engine, Saved, Sharded
from ringspan.parallel.faults import Fault, together
from ringspan.parallel.mesh import Sizes
from ringspan.parallel.parallelize import Parallel, Staging, parallelize, prepare
from ringspan.parallel.parts import parts_of
from ringspan.parallel.pipeline import check_pipeline
from ringspan.parallel.recompute import keeps_attention
from ringspan.parallel.scorer import Runner, Scorer
from ringspan.parallel.tensor import check_tensor
from ringspan.parallel.zero_config import read, resolve


def check_inputs(config: Config) -> None:
    """Look at everything the run will read or write, before any rank is started.

    Raises:
        Fault: the first thing that is missing, unknown or impossible.
    """
    hf_config = read_config(config.model.path, config.model.config, config.model.made_by)
    find_files(
        config.data.path,
        root=config.data.root,
        format=config.data.format,
        made_by=config.data.made_by,
    )
    if config.eval.path is not None:
        find_files(config.eval.path, root=config.data.root, made_by=config.data.made_by)
    read_tokenizer(tokenizer_path(config))
    scaling(config, hf_config)
    if config.attention.mask is not None:
        checked_mask(config.attention.mask, heads_of(hf_config.get_text_config()).kv_heads, config.data.seq_length)
    _check_mesh(config, hf_config)
    if config.parallel.engine == "deepspeed":
        _check_deepspeed(config)
    _check_strategy(config, hf_config)
    _costs(config)
    folder = Path(config.train.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"  # ranks look at the same time
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Fault(f"train.output_dir: {folder} cannot be written: {error.strerror}; choose another folder") from error
    if shutil.disk_usage(folder).free < 1 << 20:
        raise Fault(f"train.output_dir: {folder} has less than 1 MiB free; choose another disk")


def tokenizer_path(config: Config) -> str:
    """Return where the tokenizer comes from: model.tokenizer, else model.path."""
    path = config.model.tokenizer or config.model.path
    assert path is not None, "the schema asks for one of both"
    return path


def scaling(config: Config, hf_config: Any) -> rope_scaling.Rope | None:
    """Return the RoPE scaling the config asks for, worked out for this model; None without a rope section."""
    if config.rope is None:
        return None
    target = config.rope.target_length or config.data.seq_length
    return rope_scaling.work_out(hf_config, config.rope.type, target_length=target, factor=config.rope.factor)


def sizes(config: Config, *, launched: bool) -> Sizes:
    """Return the mesh's sizes; an unset dp_shard takes up the world under a launcher that says how large it is."""
    parallel = config.parallel
    given = (parallel.pp, parallel.dp_replicate, parallel.cp, parallel.tp)
    shard = parallel.dp_shard if parallel.dp_shard is not None else (-1 if launched and -1 not in given else 1)
    return Sizes(parallel.pp, parallel.dp_replicate, shard, parallel.cp, parallel.ulysses, parallel.tp)


def _check_mesh(config: Config, hf_config: Any) -> None:
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
                "LoRA" if config.lora is not None else "",
            )
    except ValueError as error:
        raise Fault(f"parallel.{error}") from error
    if config.train.compile and not torch.cuda.is_available() and shutil.which("g++") is None:
        raise Fault(
            "train.compile: on the CPU torch compiles with g++, which is not installed; install it, or set false"
        )


def _check_deepspeed(config: Config) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise Fault("parallel.engine: deepspeed is not installed: pip install 'ringspan[deepspeed]'")
    given, train = read(config.parallel.deepspeed), config.train
    batch = given.get("train_batch_size")
    ranks = batch // (train.batch_size * train.gradient_accumulation_steps) if isinstance(batch, int) else 1
    zero_config(config, ranks)  # the batch is checked once the world is known


def _check_strategy(config: Config, hf_config: Any) -> None:
    """Check that the layout can be made, and that the strategy serves so many ranks and heads.

    Raises:
        Fault: if not; whether it does is no matter of the mask.
    """
    hf, parallel, strategy = hf_config.get_text_config(), config.parallel, config.attention.strategy
    if parallel.cp == -1:
        return  # the context checks it, once the world is known
    mesh = (parallel.cp // parallel.ulysses, parallel.ulysses)
    try:
        plan(
            Causal(),
            make_layout(config, hf_config),
            world=mesh if min(mesh) > 1 else parallel.cp,
            length=config.data.seq_length,
            **local_heads(hf, parallel.tp)._asdict(),
            dtype=getattr(torch, config.model.dtype),
            strategy=strategy if strategy != "auto" else "ring" if min(mesh) == 1 else "double_ring",
        )
    except ValueError as error:
        raise Fault(f"attention.{error}") from error


def make_model(config: Config, place: Place, *, scaled: bool = True) -> Trained:
    """Build the model to train; ``scaled=False``: as it came, without RoPE scaling or LoRA."""
    hf_config = read_config(config.model.path, config.model.config, config.model.made_by)
    lora = config.lora
    return build(
        hf_config,
        path=config.model.path,
        rope=scaling(config, hf_config) if scaled else None,
        lora=Lora(lora.r, lora.alpha, lora.dropout, lora.target_modules) if lora and scaled else None,
        seed=config.train.seed,
        device=place.device,
    )


def make_parallel(config: Config, place: Place, trained: Trained, *, training: bool = True) -> Parallel:
    """Put the model on the mesh; ``training=False``: only to be judged."""
    train, layout = config.train, make_layout(config, trained.base.config)
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
                max(layout.share(rank, place.sizes.cp, config.data.seq_length) for rank in range(place.sizes.cp)),
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


def make_stream(config: Config, tokenizer: Any) -> SequenceStream:
    """Build the endless stream of packed sequences."""
    data = config.data
    return SequenceStream(
        data.path,
        tokenizer,
        seq_length=data.seq_length,
        root=data.root,
        format=data.format,
        text_field=data.text_field,
        packing=data.packing,
        overlong=data.overlong,
        on_bad_line=data.on_bad_line,
        shuffle_block=data.shuffle_block,
        seed=config.train.seed,
        made_by=data.made_by,
    )


def make_layout(config: Config, hf_config: Any) -> Layout:
    """Return who holds which tokens; balanced: by the work of all layers of this model.

    Raises:
        Fault: for a layer whose attention is not supported.
    """
    text_config = hf_config.get_text_config()
    texts = [config.attention.mask or text for text in layer_masks(text_config) if text is not None]
    layers = [(parse_mask(text), count) for text, count in Counter(texts).items()]
    return layout_of(config.attention.layout, layers, heads_of(text_config).kv_heads)


def make_context(config: Config, place: Place) -> SequenceContext:
    """Build the context that shares sequences over the ranks."""
    hf_config = read_config(config.model.path, config.model.config, config.model.made_by)
    heads, tp = heads_of(hf_config.get_text_config()), place.sizes.tp
    return SequenceContext(
        place.context,
        layout=make_layout(config, hf_config),
        strategy=config.attention.strategy,
        mask=parse_mask(config.attention.mask) if config.attention.mask is not None else None,
        keep_attention=keeps_attention(config.train.activation_checkpointing),
        gradient_dtype=gradient_dtype(config),
        costs=_costs(config),
        first_kv_head=place.at("tp") * (heads.kv_heads // tp),
        total_kv_heads=heads.kv_heads,
    )


def _costs(config: Config) -> Costs | None:
    """Return the measured speeds.

    Raises:
        Fault: if they cannot be read.
    """
    path = config.attention.costs
    return None if path is None else measured_costs(Path(path), "attention.costs")


def make_judge(config: Config, runner: Runner, place: Place) -> Judge:
    """Build what evaluations need, with a context of their own: their bytes are not the training's."""
    context = make_context(config, place)
    share = (place.at("dp"), place.dp)
    return Judge(runner, context, place.device, place.group, share=share, counts=place.at("tp") == 0)


def untouched_judge(config: Config, place: Place) -> Judge:
    """Build the judge of the model as it came, on the same mesh."""
    trained = together(place.group, "model", lambda: make_model(config, place, scaled=False))
    return make_judge(config, make_parallel(config, place, trained, training=False).runner, place)


def memory_settings(config: Config) -> dict[str, object]:
    """Return the settings that a rank's memory hangs on, by their names."""
    names = (
        "train.activation_checkpointing", "train.mlp_tile", "train.loss_chunk", "train.batch_size", "parallel.cp",
        "parallel.dp_shard", "parallel.cpu_offload", "parallel.engine", "model.dtype",
    )  # fmt: skip
    return {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in names}


def make_tracker(config: Config, step: int) -> Tracker:
    """Write the resolved config into the run folder and open the run's records there, at ``step``."""
    folder, track = Path(config.train.output_dir), config.track
    publish.write_text(folder / "config.yaml", dump(config))
    values = config.model_dump(mode="json")
    return Tracker(folder, values, wandb=track.wandb, project=track.project, name=track.name, resume_step=step)
