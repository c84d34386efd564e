"""Between tensors and kernels: options, a sweep's tables on the device, descriptors, grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ringspan.kernels import triton_tiles
from ringspan.kernels.triton_schedule import Schedule, schedule
from ringspan.kernels.triton_source import INTERPRETED, KERNELS, PART, block_width, constants, options
from ringspan.kernels.triton_tiles import INTERPRETER, TILES, Tile, Tiles
from ringspan.kernels.work import Sweep

LOG2E = 1.4426950408889634
CACHE = 24 << 20  # bytes of streamed operands that heads running side by side may share: half of an H100's L2
_PROCESSORS = 3  # of the interpreter, so that a persistent grid takes several turns


@dataclass(frozen=True)
class Options:
    """How the kernels run; none changes a result's bits, but for a tile's own choice of descriptors.

    Args:
        persistent: one program per place on the device, each taking many blocks; None: only where sm_margin asks.
        sm_margin: multiprocessors left free (for communication kernels, say); needs the persistent grid.
        descriptors: load by TMA (compute capability 9); None: as the tile says. Where a tensor's strides or address
            do not allow it, plain loads take over.
        tiles: the table of tiles.
    """

    persistent: bool | None = None
    sm_margin: int = 0
    descriptors: bool | None = None
    tiles: Tiles = TILES

    def __post_init__(self) -> None:
        if self.sm_margin < 0:
            raise ValueError(f"sm_margin is a number of multiprocessors, not {self.sm_margin}")
        if self.sm_margin and self.persistent is False:
            raise ValueError(f"sm_margin={self.sm_margin} needs the persistent grid: leave persistent at None")


def major_of(device: torch.device) -> int:
    """Return the compute capability's first number, 0 for the interpreter."""
    return INTERPRETER if INTERPRETED else torch.cuda.get_device_capability(device)[0]


def tile_of(name: str, x: Tensor, options: Options) -> Tile:
    """Return the table's tile of kernel ``name`` for tensors like ``x`` [..., D]."""
    key = triton_tiles.key(name, major_of(x.device), x.shape[-1], x.dtype.itemsize)
    return options.tiles[key]


_tables: WeakKeyDictionary[Sweep, dict[tuple, Any]] = WeakKeyDictionary()


def bounds_of(sweep: Sweep, device: torch.device) -> Tensor:
    """Return (and keep, while the sweep lives) its bounds on the device."""
    kept = _tables.setdefault(sweep, {})
    key = ("bounds", device)
    if key not in kept:
        kept[key] = sweep.bounds_on(device)
    return kept[key]


def order_of(sweep: Sweep, device: torch.device, name: str) -> Tensor | None:
    """Return (and keep) the sweep's order of "rows" or "keys" on the device, None for as they lie."""
    order = getattr(sweep, name)
    if order is None:
        return None
    kept = _tables.setdefault(sweep, {})
    key = (name, device)
    if key not in kept:
        kept[key] = order.to(device)
    return kept[key]


def schedule_of(sweep: Sweep, device: torch.device, name: str, tile: Tile, lanes: int) -> Schedule:
    """Return (and keep) the entries of kernel ``name`` on the device."""
    kept = _tables.setdefault(sweep, {})
    key = (device, name == "keys", tile.rows, tile.columns, lanes)
    if key not in kept:
        if name == "keys":
            found = schedule(sweep.column_runs(tile.rows, tile.columns), lanes, cut=True)
        else:
            found = schedule(sweep.row_runs(tile.rows, tile.columns), lanes, cut=False)
        kept[key] = found.to(device)
    return kept[key]


def unit_stride(x: Tensor) -> Tensor:
    """Return ``x`` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """Return the stride arguments of tensors [batch, rows, heads, ...], by the kernels' names."""
    sides = ("batch", "row", "head")
    return {f"{name}_{side}": x.stride(i) for name, x in tensors.items() for i, side in enumerate(sides)}


def describable(x: Tensor) -> bool:
    """Whether the hardware can load tiles of ``x`` [B, rows, H, D] by itself: 16-byte address and strides."""
    size = x.element_size()
    aligned = all(x.stride(i) * size % 16 == 0 for i in range(3) if x.shape[i] > 1)
    return aligned and x.data_ptr() % 16 == 0 and x.stride(3) == 1 and x.numel() > 0


def descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Return the descriptor of ``x`` [B, rows, H, D] as [B, H, rows, D], for loads of ``block`` rows of one head."""
    turned = x.transpose(1, 2)
    # A dimension of size 1 may have any stride; the hardware wants a multiple of 16 bytes there too.
    steps = [turned.stride(i) if turned.shape[i] > 1 else 16 for i in range(3)]
    return TensorDescriptor(x, list(turned.shape), [*steps, 1], [1, 1, block, block_width(x.shape[-1])])


def launch(
    name: str,
    tile: Tile,
    plan: Schedule,
    arguments: dict[str, Any],
    *,
    lanes: int,
    streamed: int,
    intervals: int,
    how: Options,
    accumulate: bool = False,
) -> None:
    """Run one of the attention kernels over all entries and lanes.

    Args:
        arguments: tensors by the kernel's names, sizes and scale; strides and the schedule are added here.
        lanes: batch rows times heads. streamed: bytes that one lane reads over and over.
    """
    kernel = KERNELS[name]
    device = arguments["q"].device
    by_name = {argument: x for argument, x in arguments.items() if isinstance(x, Tensor)}
    wanted = {argument.removesuffix("_row") for argument in kernel.fn.arg_names if argument.endswith("_row")}
    values = {**arguments, **strides(**{argument: by_name[argument] for argument in wanted})}
    use = tile.descriptors if how.descriptors is None else how.descriptors
    use = use and major_of(device) in (INTERPRETER, 9) and all(describable(by_name[one]) for one in kernel.streamed)
    if use:
        values |= {one: descriptor(by_name[one], kernel.streamed_block(tile)) for one in kernel.streamed}
    count = plan.blocks.numel()
    items = count * lanes
    persistent = how.sm_margin > 0 if how.persistent is None else how.persistent
    values |= {"blocks": plan.blocks, "pointers": plan.pointers, "runs": plan.runs, "slots": plan.slots}
    values |= {"count": count, "lanes": lanes, "items": items}
    values["together"] = max(1, min(lanes, CACHE // max(streamed, 1)))
    grid = (_places(device, tile, how.sm_margin, items) if persistent else items,)
    fixed = constants(
        name,
        tile,
        by_name["q"].shape[-1],
        intervals=intervals,
        accumulate=accumulate,
        descriptors=use,
        persistent=persistent,
    )
    passed = {argument: values[argument] for argument in kernel.fn.arg_names if argument not in fixed}
    if items:
        with torch.cuda.device_of(arguments["q"]):
            kernel.fn[grid](**passed, **fixed, **options(name, tile))


def launch_reduce(tile: Tile, plan: Schedule, parts: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Add the workspace's slices [slots, lanes, 2, columns, width] to dk and dv [B, N, G, D]."""
    fixed = constants("reduce", tile, dk.shape[-1])
    lanes = dk.shape[0] * dk.shape[2]
    sizes = {"columns": dk.shape[1], "groups": dk.shape[2], "lanes": lanes}
    with torch.cuda.device_of(dk):
        KERNELS["reduce"].fn[(plan.splits.shape[0], lanes, tile.columns // PART)](
            dk=dk, dv=dv, parts=parts, splits=plan.splits, **strides(dk=dk, dv=dv), **sizes, **fixed,
            **options("reduce", tile),
        )  # fmt: skip


def _places(device: torch.device, tile: Tile, margin: int, items: int) -> int:
    properties = None if INTERPRETED else torch.cuda.get_device_properties(device)
    processors = _PROCESSORS if properties is None else properties.multi_processor_count
    if margin >= processors:
        raise ValueError(f"sm_margin={margin} leaves none of the {processors} multiprocessors of {device}")
    return max(1, min(items, (processors - margin) * tile.resident))
