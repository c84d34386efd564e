"""A loss that is not finite on one rank: all ranks stop, naming it and the step, or all leave the step out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity_cases import Case, zero
from torch import nn

from ringspan.configs.schema import Config
from ringspan.finetune.loss import ChunkedLoss
from ringspan.finetune.model import read_tokenizer
from ringspan.launch import build, engines
from ringspan.launch.meter import Meter
from ringspan.launch.ranks import Place
from ringspan.launch.state import State
from ringspan.launch.train import train_step
from ringspan.parallel.faults import Fault
from ringspan.parallel.mesh import mesh_of
from ringspan.parallel.testing import run_ranks

BAD = 2  # the step, from 0, in which a rank's loss is poisoned


def poisoned(group: dist.ProcessGroup, config: Config, value: float) -> dict[str, Any]:
    world = dist.get_world_size(group)
    mesh = mesh_of(engines.sizes(config, launched=False).resolved(world), "cpu")
    place = Place(dist.get_rank(group), world, torch.device("cpu"), group, mesh)
    state = State.start(config, place, read_tokenizer(build.tokenizer_path(config)), None)
    context = build.make_context(config, place)
    meter, rows, weights = Meter(config, place, state.trained, context), [], []
    plain: Any = ChunkedLoss.total

    def total(self: ChunkedLoss, hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
        return plain(self, hidden, head, labels) * (value if state.step == BAD and place.rank == 1 else 1.0)

    ChunkedLoss.total = total
    try:
        for _ in range(4):
            rows.append(train_step(config, place, state, context, meter))
            name = "model.layers.0.self_attn.q_proj.weight"
            held = dict(state.engine.named_parameters())
            weights.append(state.engine.whole(held[name]).flatten().tolist() if name in held else None)
    except Fault as fault:
        return {"fault": str(fault), "step": state.step}
    return {"rows": rows, "weights": weights, "skipped": state.skipped}


MESHES = {
    "dp2": ({"dp_shard": 2}, {}),
    "cp2-tp2": ({"cp": 2, "tp": 2}, {}),
    "pp2": ({"pp": 2}, {}),
    "zero1": ({"cp": 2}, zero(1)),
    "zero3": ({"cp": 2}, zero(3)),
}


def marks(mesh: str) -> Any:
    return pytest.param(mesh, marks=[pytest.mark.needs("gxx")] if mesh.startswith("zero") else [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mesh", [marks(mesh) for mesh in MESHES])
def test_stop_names_step_and_rank(mesh: str, value: float, tmp_path: Path, text_folder: Path, extensions: None) -> None:
    sizes, settings = MESHES[mesh]
    case = Case(mesh, sizes, settings=settings)
    for found in run_ranks(poisoned, case.world, case.config(tmp_path, text_folder), value, timeout=120):
        assert found["step"] == BAD
        assert found["fault"].startswith(f"step {BAD + 1}: loss ")
        named = found["fault"].split("not finite on rank ")[1].split(";")[0].split(", ")
        assert "1" in named


@pytest.mark.parametrize("mesh", [marks(mesh) for mesh in MESHES])
def test_skip_leaves_the_step_out_on_every_rank(mesh: str, tmp_path: Path, text_folder: Path, extensions: None) -> None:
    sizes, settings = MESHES[mesh]
    case = Case(mesh, sizes, settings={**settings, "train.on_nonfinite": "skip"})
    for found in run_ranks(poisoned, case.world, case.config(tmp_path, text_folder), math.nan, timeout=120):
        assert found["skipped"] == 1
        assert [row["train/skipped_steps"] for row in found["rows"]] == [0, 0, 1, 1]
        losses = [row["train/loss"] for row in found["rows"]]
        assert [math.isfinite(loss) for loss in losses] == [True, True, False, True]
        before, bad, after = found["weights"][BAD - 1 :]
        if before is not None:
            assert before == bad != after
            assert all(map(math.isfinite, after))
