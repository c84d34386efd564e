"""A checkpoint of one mesh goes on on any other: bit for bit in what was saved, and on the same curve after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity_cases import SPARSE, Case, zero

from ringspan.configs.schema import Config
from ringspan.finetune.model import read_tokenizer
from ringspan.finetune.shards import Reader
from ringspan.launch import build, engines, saving
from ringspan.launch.meter import Meter
from ringspan.launch.ranks import Place
from ringspan.launch.state import State
from ringspan.launch.train import train_step
from ringspan.parallel.engine import Sharded
from ringspan.parallel.mesh import mesh_of
from ringspan.parallel.testing import run_ranks

HALF, WHOLE = 4, 8


def go_on(group: dist.ProcessGroup | None, config: Config, steps: int, save: bool) -> dict[str, Any]:
    """Train to ``steps`` from the checkpoint, if there is one; return the losses, and what was loaded."""
    place = Place(0, 1, torch.device("cpu"), None)
    if group is not None and (world := dist.get_world_size(group)) > 1:
        mesh = mesh_of(engines.sizes(config, launched=False).resolved(world), "cpu")
        place = Place(dist.get_rank(group), world, torch.device("cpu"), group, mesh)
    found = saving.find(config, place)
    state = State.start(config, place, read_tokenizer(build.tokenizer_path(config)), found)
    compared = found is not None and isinstance(state.engine, Sharded)
    loaded = differences(state.engine, Reader(found.path)) if found is not None and compared else {}
    context, losses = build.make_context(config, place), []
    meter, saver = Meter(config, place, state.trained, context), saving.Saving(config, place, state)
    while state.step < steps:
        losses.append(train_step(config, place, state, context, meter)["train/loss"])
        if save:
            saver.step(last=state.step == steps)
    return {"losses": losses, "loaded": loaded, "step": state.step, "tokens": state.tokens}


def differences(engine: Any, reader: Reader) -> dict[str, bool]:
    """Return for every tensor of the checkpoint that this rank holds whether each bit of it is there."""
    assert isinstance(engine, Sharded)
    found = {}
    for name, parameter in engine.named_parameters():
        for key, tensor in {"": parameter, **engine.optimizer.state.get(parameter, {})}.items():
            full = f"optimizer/{name}/{key}" if key else f"model/{name}"
            if full in reader.tensors:
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                found[full] = torch.equal(whole.detach(), reader.whole(full))
    return found


ZERO = {f"zero{stage}": zero(stage) for stage in (1, 2, 3)}
MESHES: dict[str, dict[str, int]] = {
    "zero1": {"dp_shard": 2, "cp": 2},
    "zero2": {"cp": 2},
    "zero3": {"dp_shard": 2, "cp": 2},
    "one": {},
    "cp2": {"cp": 2},
    "dp2-cp2": {"dp_shard": 2, "cp": 2},
    "hsdp2-cp2": {"dp_replicate": 2, "cp": 2},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2-tp2": {"dp_shard": 2, "tp": 2},
    "pp2-tp2": {"pp": 2, "tp": 2},
    "dp4": {"dp_shard": 4},
}
MOVES = [
    ("dp2-cp2", "one"), ("dp2-cp2", "dp4"), ("dp2-cp2", "tp2"), ("dp2-cp2", "pp2"), ("one", "dp2-tp2"),
    ("dp2-tp2", "pp2-tp2"), ("pp2-tp2", "hsdp2-cp2"), ("hsdp2-cp2", "cp2"),
]  # fmt: skip


def config_for(mesh: str, folder: Path, text: Path, **settings: Any) -> Config:
    """Four sequences a step on every mesh: fewer groups of ranks take more micro-batches each."""
    sizes = MESHES[mesh]
    groups = sizes.get("dp_shard", 1) * sizes.get("dp_replicate", 1)
    settings = {
        "train.gradient_accumulation_steps": 4 // groups, "data.shuffle_block": 5, **ZERO.get(mesh, {}), **settings
    }  # fmt: skip
    return Case(mesh, sizes, settings=settings).config(folder, text)


def run(config: Config, mesh: str, steps: int, save: bool) -> dict[str, Any]:
    world = 1
    for size in MESHES[mesh].values():
        world *= size
    return run_ranks(go_on, world, config, steps, save, timeout=120)[0]


@pytest.mark.needs("gxx")
@pytest.mark.parametrize(("first", "second"), [("zero2", "zero3"), ("zero3", "cp2"), ("dp4", "zero1")])
def test_both_engines_go_on_where_the_other_stopped(
    first: str, second: str, tmp_path: Path, text_folder: Path, extensions: None
) -> None:
    settings = {"attention.mask": SPARSE, "checkpoint.every": 3}
    (tmp_path / "straight").mkdir()
    straight = run(config_for(first, tmp_path / "straight", text_folder, **settings), first, WHOLE, save=False)
    begun = run(config_for(first, tmp_path, text_folder, **settings), first, HALF, save=True)
    assert begun["losses"] == straight["losses"][:HALF]
    resumed = run(config_for(second, tmp_path, text_folder, **settings), second, WHOLE, save=False)
    assert (resumed["step"], resumed["tokens"]) == (straight["step"], straight["tokens"])
    assert resumed["losses"] == pytest.approx(straight["losses"][HALF:], rel=5e-6)


@pytest.mark.parametrize(("first", "second"), MOVES, ids=lambda mesh: mesh)
def test_another_mesh_goes_on_where_the_first_stopped(
    first: str, second: str, tmp_path: Path, text_folder: Path
) -> None:
    settings = {"attention.mask": SPARSE, "checkpoint.every": 3, "checkpoint.keep": 1}
    (tmp_path / "straight").mkdir()
    straight = run(config_for(first, tmp_path / "straight", text_folder, **settings), first, WHOLE, save=False)
    begun = run(config_for(first, tmp_path, text_folder, **settings), first, HALF, save=True)
    assert begun["losses"] == straight["losses"][:HALF]
    resumed = run(config_for(second, tmp_path, text_folder, **settings), second, WHOLE, save=False)
    assert len(resumed["loaded"]) > 20
    assert all(resumed["loaded"].values())
    assert (resumed["step"], resumed["tokens"]) == (straight["step"], straight["tokens"])
    assert resumed["losses"] == pytest.approx(straight["losses"][HALF:], rel=1e-6 if first == second else 5e-6)


def test_the_same_mesh_goes_on_bit_for_bit(tmp_path: Path, text_folder: Path) -> None:
    settings = {"lora.r": 4, "lora.dropout": 0.1}
    (tmp_path / "straight").mkdir()
    straight = run(config_for("dp2-cp2", tmp_path / "straight", text_folder, **settings), "dp2-cp2", WHOLE, save=False)
    run(config_for("dp2-cp2", tmp_path, text_folder, **settings), "dp2-cp2", HALF, save=True)
    resumed = run(config_for("dp2-cp2", tmp_path, text_folder, **settings), "dp2-cp2", WHOLE, save=False)
    assert resumed["losses"] == straight["losses"][HALF:]


def test_every_sequence_once_whatever_the_groups(tmp_path: Path, text_folder: Path) -> None:
    """One, two and four groups of ranks read the same sequences in the same order, each of them once."""
    read: dict[int, list[list[int]]] = {}
    for groups in (1, 2, 4):
        config = config_for("one", tmp_path, text_folder, **{"train.gradient_accumulation_steps": 4 // groups})
        tokenizer = read_tokenizer(build.tokenizer_path(config))
        by_rank = []
        for rank in range(groups):
            place = _Group(rank, groups)
            state = State(None, None, build.make_stream(config, tokenizer))  # pyright: ignore[reportArgumentType]
            steps = [state.next_step(config, place) for _ in range(5)]  # pyright: ignore[reportArgumentType]
            assert all(step.tokens == 4 * 131 for step in steps)
            by_rank.append([batch["input_ids"] for step in steps for batch in step.batches])
        # Micro-batch by micro-batch, the groups in turn.
        read[groups] = [rows.flatten().tolist() for same in zip(*by_rank, strict=True) for rows in same]
    assert read[1] == read[2] == read[4]
    assert len({tuple(row) for row in read[1]}) == 20


class _Group:
    device = torch.device("cpu")

    def __init__(self, number: int, groups: int) -> None:
        self._number, self.dp = number, groups

    def at(self, name: str) -> int:
        assert name == "dp"
        return self._number


def test_a_damaged_checkpoint_stops_all_ranks_and_falls_back_only_when_told(tmp_path: Path, text_folder: Path) -> None:
    settings = {"checkpoint.every": 2, "checkpoint.background": False}
    run(config_for("cp2", tmp_path, text_folder, **settings), "cp2", 4, save=True)
    newest = tmp_path / "run" / "checkpoints" / "step-000004"
    file = newest / "rank0001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(AssertionError, match=r"step-000004 is damaged: rank0001.*newest whole one is step-000002"):
        run(config_for("cp2", tmp_path, text_folder), "cp2", 5, save=False)
    told = run(config_for("one", tmp_path, text_folder, **{"checkpoint.resume": "fallback"}), "one", 5, save=False)
    assert len(told["losses"]) == 3
    assert all(told["loaded"].values())
