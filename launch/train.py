"""``ringspan train``: build, loop, step, save. The loop is here.

Started by ``ringspan train CONFIG.yaml`` (which starts its own ranks) or by a launcher:
``torchrun --nproc-per-node 2 -m ringspan.launch.train CONFIG.yaml [--section.key value | section.key=value ...]``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from ringspan.configs.schema import Config
from ringspan.finetune.model import heads_of, read_tokenizer
from ringspan.finetune.report import report
from ringspan.finetune.track import Tracker
from ringspan.kernels.select import select
from ringspan.launch import build, entry, ranks, saving
from ringspan.launch.cli import read_train
from ringspan.launch.console import Console
from ringspan.launch.entry import FAILED, Stage, as_rank
from ringspan.launch.judging import Evaluation
from ringspan.launch.meter import Meter
from ringspan.launch.ranks import Place
from ringspan.launch.state import State
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.faults import Fault, together
from ringspan.parallel.gradients import Sums

MODULE = "ringspan.launch.train"


def launch(config: Config, config_path: str, overrides: list[str]) -> int:
    """Train on as many ranks of this machine as ``parallel`` says; return the exit code."""
    return entry.launch(config, config_path, overrides, module=MODULE, work=train)


def train(config: Config, place: Place, stage: Stage) -> int:
    """Train from the start or the latest checkpoint to the last step; evaluate, save, export, report."""
    first, folder = place.rank == 0, Path(config.train.output_dir)
    tokenizer = together(place.group, "tokenizer", lambda: read_tokenizer(build.tokenizer_path(config)))
    saved = saving.find(config, place)
    evaluation = Evaluation(config, place, tokenizer, folder, resumed=saved is not None)
    if saved is None and config.eval.before:
        evaluation.before(build.untouched_judge(config, place))
    state = State.start(config, place, tokenizer, saved)
    context = build.make_context(config, place)
    judge = build.make_judge(config, state.engine, place)
    meter = Meter(config, place, state.trained, context)
    console = Console(first, config.train.max_steps, state.step)
    saver = saving.Saving(config, place, state)
    tracker = together(place.group, "tracker", lambda: build.make_tracker(config, state.step) if first else None)
    console.banner(_facts(config, place, state, tracker))
    if saved is not None and (note := saving.other_steps(saved, config, place)):
        console.line(note)
    stage.code = FAILED
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
                saver.step(last=last)
        console.line(f"data: {state.stream.counts}")
        evaluation.after(judge, state.trained, meter.summary(), console.line)
        saving.export(place, state, tokenizer, folder / "export")
    except BaseException:
        if tracker is not None:
            tracker.finish(exit_code=FAILED)
        raise
    if tracker is not None:
        tracker.finish()
        for note in tracker.notes:
            console.line(note)
        console.line(f"export {folder / 'export'}, report {report(folder)}")
    return 0


def train_step(config: Config, place: Place, state: State, context: SequenceContext, meter: Meter) -> dict[str, float]:
    """Run one optimizer step over all its micro-batches; return what to log.

    The loss of a micro-batch is a sum over its tokens on this rank, divided by the scored tokens of the whole step on
    all ranks: so gradients and losses of ranks and micro-batches are added, never averaged.
    """
    began = time.monotonic()
    data = together(place.group, f"data of step {state.step}", lambda: state.next_step(config, place))
    data_time = time.monotonic() - began
    if data.scored == 0:
        raise Fault(f"step {state.step + 1}: none of its {data.tokens} tokens is scored; check data.path")
    batches = [context.shard(batch) | context.kwargs() for batch in data.batches]
    loss = state.engine.backward(batches, 1 / data.scored)
    found, rate = state.engine.finish(loss), state.rate(config)
    if found.bad:
        _not_finite(config, place, state, found)
        state.engine.skip()
        state.skipped += 1
    else:
        state.engine.step(rate, found.norm)
    state.step += 1
    state.tokens += data.tokens
    for batch in batches:
        meter.plan(batch["document_boundaries"], config.train.batch_size)
    return meter.row(began, data_time, data.tokens) | {
        "train/loss": found.loss,
        "train/grad_norm": found.norm,
        "train/learning_rate": rate,
        "train/tokens": state.tokens,
        "train/epoch": state.stream.epoch,
        "train/skipped_steps": state.skipped,
    }


def _not_finite(config: Config, place: Place, state: State, found: Sums) -> None:
    """Stop, or say what is skipped, as the config has it.

    Raises:
        Fault: naming the step, and the ranks whose loss or gradients were not finite.
    """
    text = f"step {state.step + 1}: loss {found.loss}, gradient norm {found.norm}, not finite on rank "
    text += ", ".join(map(str, found.bad))
    if config.train.on_nonfinite == "stop":
        raise Fault(
            f"{text}; the last checkpoint is unharmed: lower train.learning_rate and resume, or set "
            "train.on_nonfinite=skip to leave such steps out"
        )
    if place.rank == 0:
        print(f"ringspan: {text}; left out", file=sys.stderr, flush=True)


def _facts(config: Config, place: Place, state: State, tracker: Tracker | None) -> dict[str, str]:
    trained = state.trained
    every, trainable = trained.counts()
    per_step = config.data.seq_length * config.train.batch_size * config.train.gradient_accumulation_steps * place.dp
    hf = trained.base.config
    kernel = select(place.device, getattr(torch, config.model.dtype), heads_of(hf).head_dim)
    return {
        "model": f"{trained.base.config.model_type}, {every / 1e6:.2f} M parameters, {trainable / 1e6:.2f} M trained, "
        f"computed in {config.model.dtype}",
        "ranks": f"{place.world}: {_mesh(config, place)}, on {place.device.type}",
        "tokens": f"{config.data.seq_length} a sequence, {per_step} a step, "
        f"{per_step * config.train.max_steps / 1e6:.1f} M in all",
        "attention": f"{config.attention.mask or 'as each layer declares it'}, within documents; "
        f"strategy {config.attention.strategy}; {kernel.why}",
        "rope": str(trained.rope) if trained.rope is not None else "as the model has it",
        "memory": f"{Meter.peak_gib(place):.2f} GiB on this rank after building",
        "run": f"{config.train.output_dir}, from step {state.step}, W&B {tracker.mode if tracker else '-'}",
    }


def _mesh(config: Config, place: Place) -> str:
    """Say who shares what."""
    sizes = place.sizes
    said = [f"{sizes.cp} share each sequence (cp), {config.attention.layout} layout"]
    said += [f"{sizes.ulysses} of them by heads (ulysses)"] if sizes.ulysses > 1 else []
    said += [f"{place.dp} groups with sequences of their own (dp)"] if place.dp > 1 else []
    said += [f"{sizes.tp} share each layer (tp)"] if sizes.tp > 1 else []
    said += [f"{sizes.pp} pipeline stages ({config.parallel.schedule})"] if sizes.pp > 1 else []
    engine = "DeepSpeed ZeRO" if config.parallel.engine == "deepspeed" else "FSDP2"
    said += [f"parameters sharded over {sizes.dp_shard * sizes.cp} by {engine}"] if place.world > 1 else []
    return ", ".join(said)


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
    return as_rank(config, train) if ranks.launched() else launch(config, path, overrides)


if __name__ == "__main__":
    sys.exit(main())
