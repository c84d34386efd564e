"""From the config to objects: with ``engines``, the modules that know both sides."""

from __future__ import annotations

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
from ringspan.finetune.model import Lora, Trained, build, heads_of, local_heads, read_config, read_tokenizer
from ringspan.finetune.track import Tracker
from ringspan.launch import engines
from ringspan.launch.plan_inputs import checked_mask, gradient_dtype, layer_masks, layout_of, measured_costs
from ringspan.launch.ranks import Place
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.faults import Fault, together
from ringspan.parallel.recompute import keeps_attention
from ringspan.parallel.scorer import Runner


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
    engines.check_mesh(config, hf_config)
    if config.parallel.engine == "deepspeed":
        engines.check_deepspeed(config)
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
    return make_judge(config, engines.make_parallel(config, place, trained, training=False).runner, place)


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
