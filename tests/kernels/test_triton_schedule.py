"""The order and the cutting of the Triton kernels' work: every tile once, longest first, nothing far above the mean."""

from __future__ import annotations

import pytest
import torch
from tables import csr
from torch import Tensor

from ringspan.kernels.runs import Runs
from ringspan.kernels.triton_schedule import ENTRIES, SMALLEST, Schedule, schedule, slices


def listed(pointers: Tensor, runs: Tensor, entry: int) -> tuple[list[int], list[int]]:
    """Return the blocks of an entry's full runs and of those to mask, as a kernel walks them."""
    kinds = []
    for kind in range(2):
        first, last = pointers[2 * entry + kind], pointers[2 * entry + kind + 1]
        kinds.append([block for start, stop in runs[first:last].tolist() for block in range(start, stop)])
    return kinds[0], kinds[1]


def entries(plan: Schedule) -> list[tuple[int, int, list[int], list[int]]]:
    return [
        (int(plan.blocks[e]), int(plan.slots[e]), *listed(plan.pointers, plan.runs, e)) for e in range(len(plan.blocks))
    ]


def random_runs(seed: int, blocks: int, others: int) -> Runs:
    g = torch.Generator().manual_seed(seed)
    some = torch.rand(blocks, others, generator=g) < torch.rand(blocks, 1, generator=g)
    some[:: max(1, blocks // 3)] = True  # seen by all, as sinks are
    some[1::5] = False
    return csr(some, some & (torch.rand(blocks, others, generator=g) < 0.5))


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize(("blocks", "others", "lanes"), [(1, 1, 1), (1, 100, 1), (7, 90, 2), (40, 300, 8), (5, 0, 1)])
def test_every_tile_once_and_longest_first(blocks: int, others: int, lanes: int, cut: bool) -> None:
    runs = random_runs(blocks, blocks, others)
    plan = schedule(runs, lanes, cut=cut)
    found: dict[int, tuple[list[int], list[int]]] = {}
    sizes = []
    for block, _, full, masked in sorted(entries(plan), key=lambda one: one[1]):
        mine = found.setdefault(block, ([], []))
        mine[0].extend(full)
        mine[1].extend(masked)
        assert full or masked
    for _, _, full, masked in entries(plan):
        sizes.append(len(full) + len(masked))
    wanted = {block: listed(runs.pointers, runs.runs, block) for block in range(blocks)}
    assert found == {block: tiles for block, tiles in wanted.items() if tiles[0] or tiles[1]}
    assert sizes == sorted(sizes, reverse=True)


def test_slices_have_slots_of_their_own_and_the_splits_list_them() -> None:
    plan = schedule(random_runs(3, 40, 300), 8, cut=True)
    cut = [(block, slot) for block, slot, _, _ in entries(plan) if slot >= 0]
    listed_slots = [(block, first + i) for block, first, count in plan.splits.tolist() for i in range(count)]
    assert sorted(cut) == sorted(listed_slots)
    assert sorted(slot for _, slot in cut) == list(range(plan.workspace))
    assert plan.workspace > 0
    assert len({block for block, slot, _, _ in entries(plan) if slot < 0} & {block for block, _ in cut}) == 0
    assert schedule(random_runs(3, 40, 300), 8, cut=False).workspace == 0


def test_no_slice_is_far_above_the_mean() -> None:
    """128K tokens, window 4K and 64 sinks: uncut, the block of the sinks has 31 times the others' tiles."""
    tiles = torch.full((1024,), 66)
    tiles[0] = 2048
    pieces = slices(tiles, 8)
    assert float(tiles.max() / tiles.double().mean()) > 30
    assert float((tiles / pieces).max() / tiles.double().mean()) <= 2.1
    assert int((pieces > 1).sum()) == 1
    assert int(pieces[0]) == -(-2048 // 136)


@pytest.mark.parametrize("blocks", [1, 2, 100, 1024])
def test_enough_causal_blocks_stay_whole_and_few_are_cut(blocks: int) -> None:
    tiles = torch.arange(blocks) + 1
    assert bool((slices(tiles, ENTRIES) == 1).all())
    few = torch.tensor([4096])  # the keys of a sink piece alone, seen by every row
    assert int(slices(few, 1)) == 4096 // SMALLEST
    assert int(slices(few, 8)) == 64
    assert slices(torch.zeros(3, dtype=torch.int64), 1).tolist() == [0, 0, 0]
