"""What one mesh saves, any other loads: weights and AdamW's state bit for bit, and the steps after it the same."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import AdamW

from ringspan.finetune import checkpoint
from ringspan.finetune.shards import Reader
from ringspan.parallel.data import shard_parameters
from ringspan.parallel.mesh import Mesh, Sizes, mesh_of
from ringspan.parallel.optimizer_state import restore_state, state_tensors
from ringspan.parallel.testing import run_ranks

# "halves" is two pipeline stages: each rank has half of the layers, and both have the first.
KINDS: dict[str, Sizes] = {
    "one": Sizes(),
    "fsdp 2": Sizes(dp_shard=2),
    "fsdp 4": Sizes(dp_shard=4),
    "replicas 2 x fsdp 2": Sizes(dp_replicate=2, dp_shard=2),
    "tp 2": Sizes(tp=2),
    "fsdp 2 x tp 2": Sizes(dp_shard=2, tp=2),
    "halves": Sizes(pp=2),
}
Named = dict[str, nn.Parameter]


def net(seed: int) -> nn.Sequential:
    """Sizes that nothing divides, and fewer rows than ranks."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 10), nn.LayerNorm(10), nn.Linear(10, 9), nn.Linear(9, 3))


def held(model: nn.Sequential, kind: str, mesh: Mesh | None) -> Named:
    """Cut a model as a mesh asks; return what this rank holds."""
    if mesh is not None and mesh.sizes.tp > 1:
        for name, dim in (("0", 0), ("2", 1), ("3", 0)):  # the norm and the biases stay whole
            layer = model.get_submodule(name)
            weight = layer.get_parameter("weight").detach()
            cut = distribute_tensor(weight, mesh["tp"], [Shard(dim)], src_data_rank=None)
            layer.weight = nn.Parameter(cut)
    if mesh is not None and mesh.sizes.pp == 1 and mesh.shards.size() > 1:
        shard_parameters(model, list(model), mesh.shards)
    layers = "0123"
    if kind == "halves":
        assert mesh is not None
        layers = ("01", "230")[mesh.place["pp"]]
    return {name: p for name, p in model.named_parameters() if name[0] in layers}


def step(named: Named, optimizer: AdamW) -> None:
    """Gradients that hang on nothing but each weight, so that every mesh has the same."""
    for parameter in named.values():
        parameter.grad = parameter.detach() * 3 - 0.5
    optimizer.step()


def everything(named: Named, optimizer: AdamW) -> dict[str, Tensor]:
    state = state_tensors(optimizer, named.items())
    found = {f"model/{name}": p.detach() for name, p in named.items()}
    return found | {f"optimizer/{name}": value for name, value in state.items()}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def truth(steps: int) -> dict[str, Tensor]:
    named = dict(net(0).named_parameters())
    optimizer = AdamW(named.values(), lr=0.1)
    for _ in range(steps):
        step(named, optimizer)
    return everything(named, optimizer)


def mine(tensors: dict[str, Tensor], mesh: Mesh | None) -> dict[str, Tensor]:
    """Return what this rank writes: of ranks that have the same outside of a tensor's own mesh, the first."""

    def first(tensor: Tensor) -> bool:
        inside = tensor.device_mesh.mesh_dim_names or () if isinstance(tensor, DTensor) else ()
        axes = {"dp_replicate", "dp_shard_cp", "tp"} - set(inside)
        return mesh is None or all(mesh.place["dp" if axis == "dp_shard_cp" else axis] == 0 for axis in axes)

    return {name: tensor for name, tensor in tensors.items() if first(tensor)}


def save(group: dist.ProcessGroup, kind: str, folder: str) -> int:
    mesh = None if kind == "one" else mesh_of(KINDS[kind], "cpu")
    named = held(net(0), kind, mesh)
    optimizer = AdamW(named.values(), lr=0.1)
    step(named, optimizer)
    step(named, optimizer)
    rank = dist.get_rank(group)
    saver = checkpoint.Saver(Path(folder), rank=rank, world=KINDS[kind].world, keep=1)
    if rank == 0:
        saver.prepare(2)
    dist.barrier(group)
    tensors = mine(everything(named, optimizer), mesh)
    saver.begin(2, tensors)
    step(named, optimizer)  # training goes on while the thread writes
    saver.wait()
    dist.barrier(group)
    if rank == 0:
        saver.publish({"mesh": kind}, {})
    saver.published()
    return len(tensors)


def load(group: dist.ProcessGroup, kind: str, folder: str) -> list[str]:
    """Return what is not as it was when saved, or after one more step."""
    mesh = None if kind == "one" else mesh_of(KINDS[kind], "cpu")
    named = held(net(1), kind, mesh)
    optimizer = AdamW(named.values(), lr=0.1)
    path = Path(folder) / "step-000002"
    checkpoint.verify(path, (dist.get_rank(group), KINDS[kind].world))
    reader = Reader(path)
    reader.fill({f"model/{name}": p for name, p in named.items()})
    shapes = {name: entry.size for name, entry in reader.tensors.items() if name.startswith("optimizer/")}
    restore_state(optimizer, ((f"optimizer/{name}", p) for name, p in named.items()), shapes, reader.fill)
    wrong = []
    for steps in (2, 3):
        right, now = truth(steps), whole(everything(named, optimizer))
        assert len(now) == 4 * len(named)
        wrong += [f"{name} after {steps}" for name, t in now.items() if not torch.equal(t, right[name])]
        step(named, optimizer)
    return wrong


TO = {
    "one": ("fsdp 2 x tp 2", "halves"),
    "fsdp 2": ("fsdp 4", "one"),
    "fsdp 4": ("fsdp 2", "tp 2"),
    "replicas 2 x fsdp 2": ("one", "halves"),
    "tp 2": ("fsdp 2 x tp 2", "fsdp 2"),
    "fsdp 2 x tp 2": ("fsdp 4", "one"),
    "halves": ("replicas 2 x fsdp 2", "tp 2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_mesh_saves_others_load_bit_for_bit(tmp_path: Path, kind: str) -> None:
    counts = run_ranks(save, KINDS[kind].world, kind, str(tmp_path))
    assert sum(counts) >= len(truth(1))
    for other in TO[kind]:
        assert run_ranks(load, KINDS[other].world, other, str(tmp_path)) == [[]] * KINDS[other].world, other


@pytest.mark.parametrize("kind", ["fsdp 4", "replicas 2 x fsdp 2", "fsdp 2 x tp 2"])
def test_every_value_is_written_once(tmp_path: Path, kind: str) -> None:
    run_ranks(save, 4, kind, str(tmp_path))
    tables = [json.loads(path.read_text())["pieces"] for path in (tmp_path / "step-000002").glob("rank*.json")]
    written: dict[str, int] = {}
    for piece in chain(*tables):
        written[piece["name"]] = written.get(piece["name"], 0) + torch.Size(piece["sizes"]).numel()
    assert written == {name: tensor.numel() for name, tensor in truth(1).items()}
