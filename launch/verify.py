"""``ringspan verify``: the configured mesh against one rank, on the first step's batch: loss, norm, every gradient.

The first rank also runs the whole model alone, on the sequences of all ranks; that must fit its memory. Its gradients
go round one at a time, and whoever holds a parameter compares.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.configs.schema import Config, Parallel
from ringspan.finetune.model import read_tokenizer
from ringspan.launch import build, entry, ranks
from ringspan.launch.cli import read_train
from ringspan.launch.entry import FAILED, Stage, as_rank
from ringspan.launch.ranks import Place
from ringspan.launch.state import State
from ringspan.parallel.faults import together

MODULE = "ringspan.launch.verify"
# Relative errors that another order of sums explains, with room; faults are larger by orders of magnitude.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}
LOSS_BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Report:
    """Relative errors of the mesh against one rank.

    Args:
        loss, norm: (on the mesh, on one rank).
        scored: tokens with a label (counted by the mesh, by one rank).
        gradients: relative error (RMS) of each trained parameter's gradient; infinite where one side has none.
    """

    loss: tuple[float, float]
    norm: tuple[float, float]
    scored: tuple[int, int]
    gradients: dict[str, float]

    def faults(self, dtype: str) -> list[str]:
        """Return a line for each thing that differs by more than rounding does, the worst gradient first."""
        lines = []
        if self.scored[0] != self.scored[1]:
            lines.append(f"scored tokens: {self.scored[0]} on the mesh, {self.scored[1]} on one rank")
        for name, (mesh, one), bound in (
            ("loss", self.loss, LOSS_BOUNDS[dtype]),
            ("gradient norm", self.norm, BOUNDS[dtype]),
        ):
            if not abs(mesh - one) <= bound * abs(one):
                lines.append(f"{name}: {mesh:.9g} on the mesh, {one:.9g} on one rank (bound {bound:g}, relative)")
        for name, error in sorted(self.gradients.items(), key=lambda item: -item[1]):
            if not error <= BOUNDS[dtype]:
                lines.append(f"gradient of {name}: relative error {error:.2e} (bound {BOUNDS[dtype]:g})")
        return lines


def launch(config: Config, config_path: str, overrides: list[str]) -> int:
    """Verify on as many ranks of this machine as ``parallel`` says; return the exit code."""
    return entry.launch(config, config_path, overrides, module=MODULE, work=verify)


def verify(config: Config, place: Place, stage: Stage) -> int:
    """Compare, and print the result on rank 0; return 1 where something differs."""
    tokenizer = together(place.group, "tokenizer", lambda: read_tokenizer(build.tokenizer_path(config)))
    stage.code = FAILED
    report = compare(config, place, tokenizer)
    faults = report.faults(config.model.dtype)
    if place.rank == 0:
        _print(config, place, report, faults)
    return FAILED if faults else 0


def compare(config: Config, place: Place, tokenizer: Any) -> Report:
    """Run the first step's forward and backward pass on the mesh, and on one rank; return the errors on every rank."""
    state = State.start(config, place, tokenizer, None)
    context = build.make_context(config, place)
    data = together(place.group, "data", lambda: state.next_step(config, place))
    batches = [context.shard(batch) | context.kwargs() for batch in data.batches]
    sums = state.engine.finish(state.engine.backward(batches, 1 / max(1, data.scored)))
    alone, truth = (0.0, 0.0, 0), {}
    if place.rank == 0:
        alone, truth = _one_rank(config, place, tokenizer)
    numbers = torch.tensor(alone, dtype=torch.float64, device=place.device)
    if place.group is not None:
        dist.broadcast(numbers, 0, group=place.group)
    loss, norm, scored = numbers.tolist()
    errors = _errors(place, state, truth)
    return Report((sums.loss, loss), (sums.norm, norm), (data.scored, int(scored)), errors)


def one_rank(config: Config, dp: int) -> Config:
    """Return the config of one rank that trains on the sequences of all, step by step."""
    micro_batches = config.train.gradient_accumulation_steps * dp
    plain = {"gradient_accumulation_steps": micro_batches, "activation_checkpointing": "none", "mlp_tile": None}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={**plain, "compile": False}),
            "parallel": Parallel(),
            "attention": config.attention.model_copy(update={"strategy": "auto"}),
        }
    )


def _one_rank(
    config: Config, place: Place, tokenizer: Any
) -> tuple[tuple[float, float, int], dict[str, Tensor | None]]:
    config, place = one_rank(config, place.dp), Place(0, 1, place.device, None)
    state, context = State.start(config, place, tokenizer, None), build.make_context(config, place)
    data = state.next_step(config, place)
    batches = [context.shard(batch) | context.kwargs() for batch in data.batches]
    sums = state.engine.finish(state.engine.backward(batches, 1 / max(1, data.scored)))
    trained = [name for name, parameter in state.engine.named_parameters() if parameter.requires_grad]
    return (sums.loss, sums.norm, data.scored), {name: state.engine.gradient(name) for name in trained}


def _errors(place: Place, state: State, truth: dict[str, Tensor | None]) -> dict[str, float]:
    """Send one rank's gradients round, one at a time; return each one's error, on every rank."""
    held = {name for name, _ in state.engine.named_parameters()}
    names = [name for name, (_, trainable) in state.trained.whole.items() if trainable]
    speaks = place.at("dp_cp") == 0 and place.at("tp") == 0  # of those that find the same, one
    errors = torch.zeros(2, len(names), dtype=torch.float64, device=place.device)  # sums, and who has found one
    for number, name in enumerate(names):
        right = truth.get(name)
        if place.group is not None:
            right = torch.zeros(state.trained.whole[name][0], device=place.device) if right is None else right
            dist.broadcast(right := right.contiguous(), 0, group=place.group)
        if name in held:
            found = state.engine.gradient(name)
            if speaks:
                errors[:, number] += torch.tensor([_relative(found, right), 1.0])
    if place.group is not None:
        dist.all_reduce(errors, group=place.group)
    return {
        name: total / count if count else math.inf
        for name, (total, count) in zip(names, errors.T.tolist(), strict=True)
    }


def _relative(found: Tensor | None, right: Tensor | None) -> float:
    """Return the RMS of the difference over that of the truth; a missing gradient is none at all."""
    if right is None or found is None:
        return 0.0 if (found is None or not found.any()) and (right is None or not right.any()) else math.inf
    size = right.double().square().mean().sqrt()
    return float((found.double() - right.double()).square().mean().sqrt() / (size if size > 0 else 1.0))


def _print(config: Config, place: Place, report: Report, faults: list[str]) -> None:
    worst = sorted(report.gradients.items(), key=lambda item: -item[1])
    print(f"mesh            {place.sizes}, {config.parallel.engine}; against one rank, {config.model.dtype}")
    print(f"scored tokens   {report.scored[0]}, {report.scored[1]}")
    print(f"loss            {report.loss[0]:.9g}, {report.loss[1]:.9g}")
    print(f"gradient norm   {report.norm[0]:.9g}, {report.norm[1]:.9g}")
    print(f"gradients       {len(worst)} tensors, worst relative errors:")
    for name, error in worst[:5]:
        print(f"  {error:.2e}  {name}")
    for line in faults:
        print(f"DIFFERS         {line}")
    print("verify: FAILED, " + faults[0] if faults else "verify: passed", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point of one rank under a launcher; reads the config like ``ringspan verify``."""
    config, path, overrides = read_train(sys.argv[1:] if argv is None else argv)
    return as_rank(config, verify) if ranks.launched() else launch(config, path, overrides)


if __name__ == "__main__":
    sys.exit(main())
