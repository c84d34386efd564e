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

from ringspan.configs.load import ConfigError, dump, load
from ringspan.configs.schema import Config
from ringspan.dist_attn import Disagreement
from ringspan.finetune import checkpoint
from ringspan.finetune.export import export
from ringspan.finetune.loss import chunked_cross_entropy
from ringspan.finetune.model import read_tokenizer, trainable_state
from ringspan.finetune.optim import build_optimizer, build_schedule
from ringspan.finetune.report import report
from ringspan.finetune.track import Tracker
from ringspan.launch import build, ranks
from ringspan.launch.console import Console
from ringspan.launch.judging import Evaluation
from ringspan.launch.meter import Meter
from ringspan.launch.steps import collate, gather_rng, restore_rng, scored_tokens
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
    first = place.rank == 0
    folder = Path(config.train.output_dir)
    tokenizer = together(place.group, "tokenizer", lambda: read_tokenizer(build.tokenizer_path(config)))
    saved = together(place.group, "checkpoint", lambda: _latest(config, folder))
    context = build.make_context(config, place)
    evaluation = Evaluation(config, place, tokenizer, folder)
    if saved is None and config.eval.before:
        untouched = together(place.group, "model", lambda: build.make_model(config, place, scaled=False))
        evaluation.before(build.make_judge(config, untouched, context, place))
        del untouched
    trained = together(place.group, "model", lambda: build.make_model(config, place))
    model, named = trained.model, list(trained.model.named_parameters())
    stream = together(place.group, "data", lambda: build.make_stream(config, tokenizer))
    optimizer = build_optimizer(
        named,
        learning_rate=config.train.learning_rate,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        weight_decay=config.train.weight_decay,
    )
    schedule = build_schedule(
        optimizer,
        warmup_steps=config.train.warmup_steps,
        max_steps=config.train.max_steps,
        min_lr_ratio=config.train.min_lr_ratio,
    )
    step = tokens = 0
    if saved is not None:
        together(
            place.group,
            "resume",
            lambda: checkpoint.check_same_model(saved.state["fingerprint"], trained.fingerprint()),
        )
        model.load_state_dict(saved.model, strict=False)
        checkpoint.restore_optimizer(optimizer, named, saved.optimizer)
        together(place.group, "data place", lambda: stream.load_state_dict(saved.state["data"]))
        step, tokens = saved.step, saved.state["tokens"]
        schedule.load_state_dict(saved.state["schedule"])
        restore_rng(saved.rng, place)
    tracker = None
    if first:
        (folder / "config.yaml").write_text(dump(config))
    console = Console(first, config.train.max_steps, step)
    tracker = together(place.group, "tracker", lambda: _tracker(config, folder, step) if first else None)
    console.banner(_facts(config, place, trained, tracker, step))
    meter = Meter(config, place, trained, context)
    judge = build.make_judge(config, trained, context, place)
    autocast = build.autocast(config, place)
    stage[0] = FAILED

    def save() -> None:
        rng = gather_rng(place)
        state = {
            "tokens": tokens,
            "data": stream.state_dict(),
            "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
            "fingerprint": trained.fingerprint(),
        }

        def write() -> None:
            if first:
                checkpoint.save(
                    folder / "checkpoints",
                    step,
                    model=trainable_state(model),
                    optimizer=checkpoint.optimizer_tensors(optimizer, named),
                    state=state,
                    rng=rng,
                    keep=config.checkpoint.keep,
                )

        together(place.group, f"save {step}", write)

    with console:
        while step < config.train.max_steps:
            began = time.monotonic()
            batches = together(
                place.group,
                f"batches of step {step}",
                lambda: [collate(stream, config) for _ in range(config.train.gradient_accumulation_steps)],
            )
            data_time = time.monotonic() - began
            scored = sum(scored_tokens(batch) for batch in batches)
            if scored == 0:
                raise Fault(
                    f"step {step + 1}: no token of {len(batches)} micro-batches is scored; check data.path's texts"
                )
            loss = torch.zeros((), device=place.device)
            for batch in batches:
                local = context.shard({name: _to(value, place) for name, value in batch.items()})
                labels = local.pop("shift_labels")
                with autocast():
                    hidden = trained.decoder(**local, **context.kwargs()).last_hidden_state
                    part = chunked_cross_entropy(hidden, trained.head, labels, chunk=config.train.loss_chunk) / scored
                part.backward()
                loss += part.detach()
                meter.plan(local["document_boundaries"], len(batch["input_ids"]))
            sum_gradients((p for _, p in named), place.group)
            loss = meter.sum(loss)
            norm = clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
            if not math.isfinite(loss + float(norm)):
                raise Fault(
                    f"step {step + 1}: loss {loss}, gradient norm {float(norm)}; the last checkpoint is unharmed: "
                    "lower train.learning_rate and resume"
                )
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens += sum(batch["input_ids"].numel() for batch in batches)
            row = meter.row(began, data_time, batches)
            row |= {
                "train/loss": loss,
                "train/grad_norm": float(norm),
                "train/learning_rate": rate,
                "train/tokens": tokens,
                "train/epoch": stream.epoch,
            }
            if config.eval.every and (step % config.eval.every == 0 or step == config.train.max_steps):
                row |= evaluation.during(judge)
            if tracker is not None and (
                step % config.track.log_every == 0 or step == config.train.max_steps or "eval/loss" in row
            ):
                tracker.log(step, row)
            console.step(
                step,
                _line(row),
                step % config.track.log_every == 0 or step == config.train.max_steps,
            )
            if config.checkpoint.every and step % config.checkpoint.every == 0 and step < config.train.max_steps:
                save()
    save()
    console.line(f"data: {stream.counts}")
    evaluation.after(judge, meter.summary(), console.line)
    together(
        place.group,
        "export",
        lambda: export(model, tokenizer, folder / "export") if first else None,
    )
    if tracker is not None:
        tracker.finish()
        console.line(f"export {folder / 'export'}, report {report(folder)}")


def _latest(config: Config, folder: Path) -> checkpoint.Checkpoint | None:
    if config.checkpoint.resume == "never":
        if checkpoint.latest(folder / "checkpoints") is not None:
            raise Fault(
                f"checkpoint.resume: never, but {folder} holds checkpoints; choose another train.output_dir, "
                "delete the folder, or resume with checkpoint.resume=auto"
            )
        return None
    return checkpoint.load(folder / "checkpoints") if checkpoint.latest(folder / "checkpoints") is not None else None


def _tracker(config: Config, folder: Path, step: int) -> Tracker:
    track = config.track
    return Tracker(
        folder,
        build.plain(config),
        wandb=track.wandb,
        project=track.project,
        name=track.name,
        resume_step=step,
    )


def _to(value: object, place: ranks.Place) -> object:
    return value.to(place.device) if isinstance(value, torch.Tensor) else value


def _facts(
    config: Config, place: ranks.Place, trained: build.Trained, tracker: Tracker | None, step: int
) -> dict[str, str]:
    every, trainable = trained.counts()
    per_step = config.data.seq_length * config.train.batch_size * config.train.gradient_accumulation_steps
    return {
        "model": f"{trained.base.config.model_type}, {every / 1e6:.2f} M parameters, {trainable / 1e6:.2f} M trained, "
        f"computed in {config.model.dtype}",
        "ranks": f"{place.world} share each sequence (cp), {config.attention.layout} layout, on {place.device.type}",
        "tokens": f"{config.data.seq_length} a sequence, {per_step} a step, "
        f"{per_step * config.train.max_steps / 1e6:.1f} M in all",
        "attention": f"causal within documents, strategy {config.attention.strategy} -> ring",
        "rope": build.rope_facts(trained),
        "memory": f"{Meter.peak_gib(place):.2f} GiB on this rank after building",
        "run": f"{config.train.output_dir}, from step {step}, W&B {tracker.mode if tracker else '-'}",
    }


def _line(row: dict[str, float]) -> str:
    text = f"loss {row['train/loss']:.4f}  norm {row['train/grad_norm']:.2f}"
    text += f"  {row['perf/tokens_per_second']:,.0f} tokens/s"
    text += f"  {row['memory/peak_gib']:.2f} GiB  {row['perf/bytes_per_step'] / 2**20:.1f} MiB moved"
    return text + (f"  eval {row['eval/loss']:.4f}" if "eval/loss" in row else "")


def main(argv: list[str] | None = None) -> int:
    """Entry point of one rank under a launcher; validates the config like ``ringspan train``."""
    from ringspan.launch.cli import parse_train

    path, overrides = parse_train(sys.argv[1:] if argv is None else argv)
    try:
        config = load(path, overrides)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"ringspan: {error}", file=sys.stderr)
        return BAD_INPUT
    return run(config) if ranks.launched() else launch(config, path, overrides)


if __name__ == "__main__":
    sys.exit(main())
