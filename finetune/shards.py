"""Tensors that are sharded in any way, in safetensors: each rank writes its pieces, each reads the pieces it needs.

torch's distributed checkpoint plans: which piece of the whole a rank holds, and which pieces of a checkpoint make up
what a rank holds now, on another mesh. It plans on each rank alone; nothing is sent, and nothing is pickled: beside the
tensors stands a table in JSON. (torch's own storage unpickles its metadata, which is to run what is in it.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ringspan.finetune import manifest
from ringspan.parallel.faults import Fault

TABLE = re.compile(r"rank\d{4,}\.json")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: where it stands in the whole, and under which key in its file."""

    name: str
    offsets: list[int]
    sizes: list[int]
    shape: list[int]
    dtype: str
    key: str


def pieces_of(tensors: Mapping[str, Tensor]) -> list[tuple[Piece, Tensor]]:
    """Return this rank's pieces of tensors, as copies in host memory that may be written later."""
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    pieces = []
    for number, item in enumerate(planner.create_local_plan().items):
        data: Any = item.tensor_data
        if prod(data.chunk.sizes) == 0 and prod(data.size) != 0:
            continue  # where shards are uneven, some are empty
        held: Any = planner.resolve_data(item)
        # A copy with a storage of its own: training goes on meanwhile, and the format wants no two to share one.
        copied = held.detach().to("cpu", copy=True).contiguous().view(data.chunk.sizes)
        sizes = (list(data.chunk.offsets), list(data.chunk.sizes), list(data.size))
        pieces.append((Piece(item.index.fqn, *sizes, str(held.dtype).removeprefix("torch."), str(number)), copied))
    return pieces


def write(folder: Path, rank: int, pieces: Sequence[tuple[Piece, Tensor]]) -> None:
    """Write a rank's pieces, and the table that says what they are, with the size and checksum of their file."""
    name = f"rank{rank:04d}.safetensors"
    save_file({piece.key: tensor for piece, tensor in pieces}, folder / name)
    table = {"file": manifest.measure(folder / name), "pieces": [asdict(piece) for piece, _ in pieces]}
    (folder / f"rank{rank:04d}.json").write_text(json.dumps(table), encoding="utf-8")


def file_of(table: Path) -> dict[str, Any]:
    """Return what a rank's table says of its file of tensors."""
    return json.loads(table.read_text(encoding="utf-8"))["file"]


class Reader:
    """What a checkpoint's folder holds; reads boxes of it.

    Raises:
        Fault: for a table that does not say what it should.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[tuple[str, tuple[int, ...]], tuple[str, str]] = {}
        self.tensors: dict[str, TensorStorageMetadata] = {}
        for table in sorted(path for path in folder.iterdir() if TABLE.fullmatch(path.name)):
            try:
                for entry in json.loads(table.read_text(encoding="utf-8"))["pieces"]:
                    self._note(Piece(**entry), table.with_suffix(".safetensors").name)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise Fault(f"{table} is not a table of tensors: {error}") from None

    def whole(self, name: str) -> Tensor:
        """Return a whole tensor."""
        entry = self.tensors[name]
        out = torch.empty(entry.size, dtype=entry.properties.dtype)
        self.fill({name: out})
        return out

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors of this rank, sharded in whatever way, in place.

        Raises:
            Fault: for one that is not there, or has another shape there.
        """
        for name, tensor in tensors.items():
            if name not in self.tensors:
                raise Fault(f"checkpoint of another model: {self.folder} has no {name}")
            if self.tensors[name].size != tensor.shape:
                raise Fault(
                    f"checkpoint of another model: {name} has shape {list(self.tensors[name].size)} in {self.folder}, "
                    f"{list(tensor.shape)} now"
                )
        if tensors:
            planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
            planner.set_up_planner(dict(tensors), Metadata(dict(self.tensors)), is_coordinator=True)
            self._read(planner.finish_plan(planner.create_global_plan([planner.create_local_plan()])[0]), planner)

    def _note(self, piece: Piece, file: str) -> None:
        dtype = getattr(torch, piece.dtype)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{piece.dtype!r} is no dtype")
        offsets, sizes, shape = (torch.Size(each) for each in (piece.offsets, piece.sizes, piece.shape))
        properties = TensorProperties(dtype=dtype)
        entry = self.tensors.setdefault(piece.name, TensorStorageMetadata(properties, shape, []))
        if entry.size != shape or entry.properties.dtype != dtype:
            raise ValueError(f"{piece.name} is told twice, differently")
        if (piece.name, tuple(offsets)) not in self._where:
            entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
        self._where[piece.name, tuple(offsets)] = (file, piece.key)

    def _read(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> None:
        """Copy the boxes of a plan to where they belong, a file at a time."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            file, _ = self._find(item.storage_index)
            by_file.setdefault(file, []).append(item)
        for file, items in by_file.items():
            with safe_open(self.folder / file, framework="pt") as opened:
                for item in items:
                    stored: Any = opened.get_slice(self._find(item.storage_index)[1])
                    box = tuple(
                        slice(start, start + size)
                        for start, size in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(stored[box] if box else opened.get_tensor(self._find(item.storage_index)[1]))
                    planner.commit_tensor(item, target)

    def _find(self, index: MetadataIndex) -> tuple[str, str]:
        return self._where[index.fqn, tuple(index.offset or ())]
