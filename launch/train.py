"""``ringspan train``: build, loop, step, save. The loop is here.

Started by ``ringspan train CONFIG.yaml`` (which starts its own ranks) or by a launcher:
``torchrun --nproc-per-node 2 -m ringspan.launch.train CONFIG.yaml [--section.key value | section.key=value ...]``.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers.utils import logging as transformers_logging

from ringspan.configs.schema import Config
from ringspan.dist_attn import Disagreement
from ringspan.finetune.export import export
from ringspan.finetune.loss import chunked_cross_entropy
from ringspan.finetune.model import heads_of, read_tokenizer
from ringspan.finetune.report import report
from ringspan.finetune.track import Tracker
from ringspan.kernels.select import select
from ringspan.launch import build, ranks
from ringspan.launch.cli import read_train
from ringspan.launch.console import Console
from ringspan.launch.judging import Evaluation
from ringspan.launch.meter import Meter
from ringspan.launch.state import State, find_checkpoint, scored_tokens
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.data import sum_gradients
from ringspan.parallel.faults import Fault, together

BAD_INPUT, FAILED = 2, 1  # exit codes


def launch(config: Config, config_path: str, overrides: list[str]) -> int:
    """Check all inputs, then train on ``parallel.cp`` ranks of this machine; return the exit code."""
    try:
        build.check_inputs(config)
    except Fault as fault:
        print(f"ringspan: {fault}", file=sys.stderr)
        return BAD_INPUT
    if config.parallel.cp > 1 and not ranks.launched():
        return ranks.start(config.parallel.cp, [config_path, *overrides])
    return run(config)


def run(config: Config) -> int:
    """Train as one rank of the launcher's; return the exit code. One rank says what is wrong, once."""
    rank = int(os.environ.get("RANK", "0"))
    transformers_logging.disable_progress_bar()  # ours is the one that counts steps
    stage = [BAD_INPUT]
    try:
        with ranks.joined(config.parallel.cp, config.parallel.timeout_s) as place:
            together(place.group, "inputs", lambda: build.check_inputs(config))
            train(config, place, stage)
    except (Fault, Disagreement) as fault:
        if rank == getattr(fault, "rank", 0):
            print(f"ringspan: {fault}", file=sys.stderr, flush=True)
        return stage[0]
    return 0


def train(config: Config, place: ranks.Place, stage: list[int]) -> None:
    """Train from the start or the latest checkpoint to the last step; evaluate, save, export, report.

    Args:
        stage: the exit code of a fault from now on; set to FAILED once training begins.
    """
    first, folder = place.rank == 0, Path(config.train.output_dir)
    tokenizer = together(place.group, "tokenizer", lambda: read_tokenizer(build.tokenizer_path(config)))
    saved = together(place.group, "checkpoint", lambda: find_checkpoint(config))
    evaluation = Evaluation(config, place, tokenizer, folder, resumed=saved is not None)
    if saved is None and config.eval.before:
        untouched = together(place.group, "model", lambda: build.make_model(config, place, scaled=False))
        evaluation.before(build.make_judge(config, untouched, place))
        del untouched
    state = together(place.group, "model and data", lambda: State.start(config, place, tokenizer, saved))
    context = build.make_context(config, place)
    judge = build.make_judge(config, state.trained, place)
    meter = Meter(config, place, state.trained, context)
    console = Console(first, config.train.max_steps, state.step)
    tracker = together(place.group, "tracker", lambda: build.make_tracker(config, state.step) if first else None)
    console.banner(_facts(config, place, state, tracker))
    stage[0] = FAILED
    told: set[str] = set()
    try:
        with console:
            while state.step < config.train.max_steps:
                row = train_step(config, place, state, context, meter)
                for kind, why in context.decisions.items():
                    if kind not in told:
                        told.add(kind)
                        console.line(f"attention {kind}: {why}")
                last = state.step == config.train.max_steps
                if config.eval.every and (state.step % config.eval.every == 0 or last):
                    row |= evaluation.during(judge)
                say = state.step % config.track.log_every == 0 or last or "eval/loss" in row
                if tracker is not None and say:
                    tracker.log(state.step, row)
                console.step(state.step, _told(row), say)
                if last or (config.checkpoint.every and state.step % config.checkpoint.every == 0):
                    state.save(config, place)
        console.line(f"data: {state.stream.counts}")
        evaluation.after(judge, meter.summary(), console.line)
        together(
            place.group, "export", lambda: export(state.trained.model, tokenizer, folder / "export") if first else None
        )
    except BaseException:
        if tracker is not None:
            tracker.finish(exit_code=FAILED)
        raise
    if tracker is not None:
        tracker.finish()
        for note in tracker.notes:
            console.line(note)
        console.line(f"export {folder / 'export'}, report {report(folder)}")


def train_step(
    config: Config, place: ranks.Place, state: State, context: SequenceContext, meter: Meter
) -> dict[str, float]:
    """Run one optimizer step over all its micro-batches; return what to log.

    The loss of a micro-batch is a sum over its tokens on this rank, divided by the scored tokens of the whole step on
    all ranks: so gradients and losses of ranks and micro-batches are added, never averaged.
    """
    began = time.monotonic()
    batches = together(place.group, f"data of step {state.step}", lambda: state.next_batches(config, place))
    data_time = time.monotonic() - began
    scored = sum(scored_tokens(batch) for batch in batches)
    if scored == 0:
        raise Fault(f"step {state.step + 1}: none of {len(batches)} micro-batches has a scored token; check data.path")
    loss = torch.zeros((), device=place.device)
    for batch in batches:
        local = context.shard(batch)
        labels = local.pop("shift_labels")
        with build.autocast(config, place)():
            hidden = state.trained.decoder(**local, **context.kwargs()).last_hidden_state
            part = chunked_cross_entropy(hidden, state.trained.head, labels, chunk=config.train.loss_chunk) / scored
        part.backward()
        loss += part.detach()
        meter.plan(local["document_boundaries"], len(batch["input_ids"]))
    sum_gradients((p for _, p in state.named), place.group)
    total = meter.sum(loss)
    norm = float(clip_grad_norm_([p for _, p in state.named], config.train.max_grad_norm))
    if not math.isfinite(total + norm):
        raise Fault(
            f"step {state.step + 1}: loss {total}, gradient norm {norm}; the last checkpoint is unharmed: "
            "lower train.learning_rate and resume"
        )
    rate = state.update(config)
    state.tokens += sum(batch["input_ids"].numel() for batch in batches)
    return meter.row(began, data_time, batches) | {
        "train/loss": total,
        "train/grad_norm": norm,
        "train/learning_rate": rate,
        "train/tokens": state.tokens,
        "train/epoch": state.stream.epoch,
    }


def _facts(config: Config, place: ranks.Place, state: State, tracker: Tracker | None) -> dict[str, str]:
    trained = state.trained
    every, trainable = trained.counts()
    per_step = config.data.seq_length * config.train.batch_size * config.train.gradient_accumulation_steps
    hf = trained.base.config
    kernel = select(place.device, getattr(torch, config.model.dtype), heads_of(hf).head_dim)
    return {
        "model": f"{trained.base.config.model_type}, {every / 1e6:.2f} M parameters, {trainable / 1e6:.2f} M trained, "
        f"computed in {config.model.dtype}",
        "ranks": f"{place.world} share each sequence (cp), {config.attention.layout} layout, on {place.device.type}",
        "tokens": f"{config.data.seq_length} a sequence, {per_step} a step, "
        f"{per_step * config.train.max_steps / 1e6:.1f} M in all",
        "attention": f"{config.attention.mask or 'as each layer declares it'}, within documents; "
        f"strategy {config.attention.strategy}; {kernel.why}",
        "rope": str(trained.rope) if trained.rope is not None else "as the model has it",
        "memory": f"{Meter.peak_gib(place):.2f} GiB on this rank after building",
        "run": f"{config.train.output_dir}, from step {state.step}, W&B {tracker.mode if tracker else '-'}",
    }


def _told(row: dict[str, float]) -> list[str]:
    """Return what a person reads of a step, the most telling first."""
    facts = [
        f"loss {row['train/loss']:.4f}",
        f"{row['perf/tokens_per_second']:,.0f} tokens/s",
        f"norm {row['train/grad_norm']:.2f}",
        f"{row['memory/peak_gib']:.2f} GiB",
        f"{row['perf/bytes_per_step'] / 2**20:.1f} MiB moved",
    ]
    return facts + ([f"eval {row['eval/loss']:.4f}"] if "eval/loss" in row else [])


def main(argv: list[str] | None = None) -> int:
    """Entry point of one rank under a launcher; reads the config like ``ringspan train``."""
    config, path, overrides = read_train(sys.argv[1:] if argv is None else argv)
    return run(config) if ranks.launched() else launch(config, path, overrides)


if __name__ == "__main__":
    sys.exit(main())
