"""In which order Triton programs take blocks, and which blocks are cut: integers only.

An entry is a block of one side with the runs of blocks it meets on the other. Entries stand longest first, so that no
long one starts last. A block that far more blocks meet than others (sink tokens, which every row sees) would last as
long as a large part of the kernel, so it can be cut into slices that are added up afterwards, in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringspan.kernels.runs import Runs

SMALLEST = 16  # tiles: a slice is no shorter than half of this; below, writing and adding it costs more than it saves
ENTRIES = 512  # work items that keep any GPU busy to the end; a constant, so that sums round alike on all of them


@dataclass(frozen=True)
class Schedule:
    """The entries of one kernel, int32.

    Args:
        blocks: [E] the block of each entry; slots: [E] its place in the workspace if it is a slice, else -1.
        pointers: [2 E + 1]: full runs of entry e are pointers[2e] : pointers[2e + 1], those to mask follow up to
            pointers[2e + 2]; runs: [R, 2] half-open, in blocks of the other side.
        splits: [cut blocks, 3]: block, first slot, slots.
        workspace: slots in all.
    """

    blocks: Tensor
    slots: Tensor
    pointers: Tensor
    runs: Tensor
    splits: Tensor
    workspace: int

    def to(self, device: torch.device) -> Schedule:
        """Return a copy on ``device``."""
        names = ("blocks", "slots", "pointers", "runs", "splits")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def slices(tiles: Tensor, lanes: int) -> Tensor:
    """Return into how many slices each block is cut (0 for one without tiles), given its tiles: both int64 [blocks].

    No slice exceeds max(SMALLEST, min(twice the mean block, an ENTRIES-th of all lanes' tiles)). Causal blocks,
    whose longest is less than twice the mean, stay whole where there are enough of them.

    Args:
        lanes: batch rows times KV heads, which run side by side.
    """
    live = int((tiles > 0).sum())
    total = int(tiles.sum())
    limit = max(SMALLEST, min(2 * -(-total // max(live, 1)), -(-total * lanes // ENTRIES)))
    return (tiles + limit - 1) // limit


def schedule(runs: Runs, lanes: int, *, cut: bool) -> Schedule:
    """Return the entries for the runs of every block.

    Args:
        lanes: batch rows times heads that run the same entries side by side.
        cut: whether blocks may be cut into slices.
    """
    pointers, spans = runs.pointers.long(), runs.runs.long().view(-1, 2)
    lengths = spans[:, 1] - spans[:, 0]
    before = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    first, middle, last = pointers[:-1:2], pointers[1::2], pointers[2::2]
    tiles = before[last] - before[first]
    pieces = slices(tiles, lanes) if cut else (tiles > 0).long()

    block = torch.repeat_interleave(torch.arange(len(tiles)), pieces)
    index = torch.arange(len(block)) - (pieces.cumsum(0) - pieces)[block]
    low, high = index * tiles[block] // pieces[block], (index + 1) * tiles[block] // pieces[block]
    order = torch.argsort(high - low, descending=True, stable=True)
    block, index, low, high = block[order], index[order], low[order], high[order]
    is_cut = pieces > 1
    slot_count = torch.where(is_cut, pieces, 0)
    first_slot = slot_count.cumsum(0) - slot_count

    # Every run of an entry's block, clipped to the entry's share of the block's tiles.
    counts = (last - first)[block]
    entry = torch.repeat_interleave(torch.arange(len(block)), counts)
    run = first[block][entry] + torch.arange(len(entry)) - (counts.cumsum(0) - counts)[entry]
    base = before[run] - before[first[block]][entry]
    start = spans[run, 0] + torch.minimum((low[entry] - base).clamp(min=0), lengths[run])
    stop = spans[run, 0] + torch.minimum((high[entry] - base).clamp(min=0), lengths[run])
    kept = stop > start
    kind = 2 * entry + (run >= middle[block][entry])
    found = torch.bincount(kind[kept], minlength=2 * len(block))
    return Schedule(
        blocks=block.int(),
        slots=torch.where(is_cut[block], first_slot[block] + index, -1).int(),
        pointers=torch.cat([found.new_zeros(1), found.cumsum(0)]).int(),
        runs=torch.stack([start, stop], 1)[kept].int(),
        splits=torch.stack([torch.arange(len(tiles)), first_slot, pieces], 1)[is_cut].int(),
        workspace=int(slot_count.sum()),
    )
