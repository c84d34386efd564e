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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from ringspan.finetune import manifest
from ringspan.parallel.faults import Fault

TABLE = re.compile(r"rank\d{4,}\.json")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


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
    """Return this rank's pieces of tensors, as copies in host memory that may be written later.

    Of what several ranks of a tensor's mesh have alike, the first has the piece.
    """
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({name: t for name, t in tensors.items() if _is_first(t)}, is_coordinator=True)
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


def files(rank: int) -> tuple[str, str]:
    """Return the names of a rank's tensors and of its table."""
    return f"rank{rank:04d}.safetensors", f"rank{rank:04d}.json"


def write(folder: Path, rank: int, pieces: Sequence[tuple[Piece, Tensor]]) -> None:
    """Write a rank's pieces, and the table that says what they are, with the size and checksum of their file."""
    name, table = files(rank)
    save_file({piece.key: tensor for piece, tensor in pieces}, folder / name)
    body = {"file": manifest.measure(folder / name), "pieces": [asdict(piece) for piece, _ in pieces]}
    (folder / table).write_text(json.dumps(body), encoding="utf-8")


def file_of(table: Path) -> dict[str, Any]:
    """Return what a rank's table says of its file of tensors."""
    return json.loads(table.read_text(encoding="utf-8"))["file"]


class Reader:
    """What a checkpoint's folder holds; reads boxes of it. ``checkpoint.verify`` comes first: here no sums are checked.

    Args:
        folder: one that was published: only ranks that its manifest names are looked at.

    Raises:
        Fault: for a table that does not say what it should, or tensors of which a part is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[tuple[str, tuple[int, ...]], tuple[str, str, torch.Size]] = {}
        self.tensors: dict[str, TensorStorageMetadata] = {}
        try:
            names = sorted(name for name in manifest.read(folder)["files"] if TABLE.fullmatch(name))
        except ValueError as error:
            raise Fault(f"checkpoint {folder} is damaged: {error}") from None
        for name in names:
            try:
                for entry in json.loads((folder / name).read_text(encoding="utf-8"))["pieces"]:
                    self._note(Piece(**entry), name.replace(".json", ".safetensors"))
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                raise Fault(f"{folder / name} is not a table of tensors: {error}") from None
        for name, entry in self.tensors.items():
            # Where nothing overlaps, as nothing does that was cut, equal counts leave no hole.
            there, all_ = sum(prod(chunk.sizes) for chunk in entry.chunks), prod(entry.size)
            if there != all_:
                raise Fault(f"checkpoint {folder} is not whole: of the {all_} values of {name}, {there} are there")

    def whole(self, name: str) -> Tensor:
        """Return a whole tensor."""
        entry = self.tensors[name]
        out = torch.empty(entry.size, dtype=entry.properties.dtype)
        self.fill({name: out})
        return out

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors of this rank, sharded in whatever way, in place; bit for bit.

        Raises:
            Fault: for one that is not there, or has another shape or dtype there; or a file that cannot be read.
        """
        for name, tensor in tensors.items():
            self._check(name, tensor)
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(dict(tensors), Metadata(dict(self.tensors)), is_coordinator=True)
        by_file: dict[str, list[Any]] = {}
        for item in planner.create_local_plan().items:
            by_file.setdefault(self._find(item.storage_index)[0], []).append(item)
        for file, items in by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for item in items:
                        self._read(opened, item, planner.resolve_tensor(item).detach())
            except (OSError, SafetensorError) as error:
                raise Fault(f"checkpoint {self.folder} is damaged: {file}: {error}") from error

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self.tensors:
            raise Fault(f"checkpoint of another model: {self.folder} has no {name}")
        shape, dtype = self.tensors[name].size, self.tensors[name].properties.dtype
        if shape != tensor.shape:
            raise Fault(
                f"checkpoint of another model: {name} has shape {list(shape)} in {self.folder}, "
                f"{list(tensor.shape)} now"
            )
        if dtype != tensor.dtype:  # would be rounded without a word
            raise Fault(f"checkpoint of another model: {name} is {dtype} in {self.folder}, {tensor.dtype} now")

    def _read(self, opened: Any, item: Any, target: Tensor) -> None:
        file, key, sizes = self._find(item.storage_index)
        stored = opened.get_slice(key)
        if stored.get_shape() != list(sizes):  # else it would be repeated to fit
            raise Fault(f"{self.folder / file}: {key} is {stored.get_shape()}, and {list(sizes)} in its table")
        starts = zip(item.storage_offsets, item.lengths, strict=True)
        box = tuple(slice(start, start + size) for start, size in starts)
        value = stored[box] if box else opened.get_tensor(key)
        if value.dtype != target.dtype:
            raise Fault(f"{self.folder / file}: {key} is {value.dtype}, and {target.dtype} in its table")
        target.copy_(value)

    def _note(self, piece: Piece, file: str) -> None:
        if not isinstance(piece.name, str) or not isinstance(piece.key, str) or piece.dtype not in _DTYPES:
            raise TypeError(f"name {piece.name!r}, key {piece.key!r}, dtype {piece.dtype!r}")
        offsets, sizes, shape = (torch.Size(each) for each in (piece.offsets, piece.sizes, piece.shape))
        for start, size, whole in zip(offsets, sizes, shape, strict=True):
            if start < 0 or size < 0 or start + size > whole:
                raise ValueError(f"{piece.name} has a piece {piece.sizes} at {piece.offsets}, outside of {piece.shape}")
        dtype = _DTYPES[piece.dtype]
        entry = self.tensors.setdefault(piece.name, TensorStorageMetadata(TensorProperties(dtype=dtype), shape, []))
        known = self._where.get((piece.name, offsets))
        if entry.size != shape or entry.properties.dtype != dtype or (known is not None and known[2] != sizes):
            raise ValueError(f"{piece.name} is told twice, differently")
        if known is None:
            entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
            self._where[piece.name, offsets] = (file, piece.key, sizes)

    def _find(self, index: MetadataIndex) -> tuple[str, str, torch.Size]:
        return self._where[index.fqn, tuple(index.offset or ())]


def _is_first(tensor: Tensor) -> bool:
    if not isinstance(tensor, DTensor):
        return True
    place = tensor.device_mesh.get_coordinate()
    if place is None:
        return False
    return all(at == 0 for at, way in zip(place, tensor.placements, strict=True) if way.is_replicate())
