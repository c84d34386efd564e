"""Sizes make up the world, ranks know their peers, and torch's mesh has the same groups."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringspan.parallel.mesh import AXES, TOGETHER, Sizes, mesh_of
from ringspan.parallel.testing import run_ranks


def test_the_free_size_takes_the_rest() -> None:
    assert Sizes(dp_shard=-1, cp=2, tp=2).resolved(16) == Sizes(dp_shard=4, cp=2, tp=2)
    assert Sizes(cp=-1).resolved(8) == Sizes(cp=8)
    assert Sizes(dp_shard=-1).resolved(1) == Sizes()
    assert Sizes(pp=2, dp_replicate=2, dp_shard=2, cp=4, ulysses=2, tp=2).resolved(64).shape == (2, 2, 2, 2, 2, 2)


@pytest.mark.parametrize(
    ("sizes", "world", "message"),
    [
        (
            Sizes(cp=2, tp=2),
            8,
            "pp 1 x dp_replicate 1 x dp_shard 1 x cp 2 x tp 2 = 4 ranks, but there are 8; start 4, ",
        ),
        (Sizes(dp_shard=-1, cp=3), 8, r"dp_shard: 8 ranks / \(pp 1 x dp_replicate 1 x cp 3 x tp 1 = 3\) is no whole"),
        (Sizes(dp_shard=-1, cp=-1), 8, r"dp_shard, cp: -1; only one of pp, dp_replicate, dp_shard, cp, tp may be left"),
        (Sizes(cp=4, ulysses=-1), 4, "ulysses: -1; only one of"),
        (Sizes(cp=6, ulysses=4), 6, "ulysses: 4 does not divide cp 6 into rings"),
        (Sizes(tp=0), 1, "tp: 0 is neither a number of ranks nor -1"),
        (Sizes(pp=-2), 1, "pp: -2 is neither"),
    ],
)
def test_sizes_that_do_not_make_up_the_world(sizes: Sizes, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sizes.resolved(world)


def test_tensor_parallel_and_ulysses_ranks_are_neighbours_in_a_node() -> None:
    sizes = Sizes(pp=2, dp_shard=-1, cp=4, ulysses=2, tp=2).resolved(32)
    for rank in range(32):
        assert sizes.peers(rank, "tp") == (rank // 2 * 2, rank // 2 * 2 + 1)
        assert len({peer // 4 for name in ("tp", "ulysses") for peer in sizes.peers(rank, name)}) == 1
    assert sizes.peers(5, "pp") == (5, 21)
    sizes.check_node(8)
    sizes.check_node(64)  # a node that is larger than the world
    with pytest.raises(ValueError, match="tp 2 x ulysses 2 = 4 ranks do not fit a node of 6"):
        sizes.check_node(6)


def test_every_rank_is_on_each_axis_once() -> None:
    sizes = Sizes(pp=2, dp_replicate=3, dp_shard=2, cp=4, ulysses=2, tp=2)
    every = range(sizes.world)
    for name in (*AXES, *TOGETHER):
        groups = {sizes.peers(rank, name) for rank in every}
        assert sorted(rank for group in groups for rank in group) == list(every)
        assert all(sizes.peers(rank, name)[sizes.place(rank)[name]] == rank for rank in every)
    # The ranks of one sequence that hold one part of it: those that differ in tp and pp alone.
    assert {sizes.place(rank)["dp_cp"] for rank in every} == set(range(24))


def test_sizes_tell_what_there_is() -> None:
    assert str(Sizes()) == "one rank"
    assert str(Sizes(dp_shard=2, cp=4, ulysses=2)) == "dp_shard 2 x cp 4 x ulysses 2"


def groups(group: dist.ProcessGroup, sizes: Sizes) -> dict[str, Any]:
    """Return each axis' ranks as torch has them, and what a sum over them gives of the ranks."""
    mesh, rank = mesh_of(sizes, "cpu"), dist.get_rank(group)
    found = {}
    for name in (*AXES, *TOGETHER):
        mine, value = mesh[name].get_group(), torch.tensor(rank)
        dist.all_reduce(value, group=mine)
        found[name] = [dist.get_process_group_ranks(mine), mesh[name].get_local_rank(), int(value)]
    return {**found, "context": list(mesh.context.shape)}


@pytest.mark.parametrize(
    ("sizes", "context"),
    [
        (Sizes(dp_shard=2, cp=2), [2]),
        (Sizes(cp=4, ulysses=2), [2, 2]),
        (Sizes(cp=2, ulysses=2, tp=2), [2]),
        (Sizes(pp=2, dp_replicate=2, cp=2), [2]),
    ],
    ids=str,
)
def test_torchs_mesh_has_the_same_groups(sizes: Sizes, context: list[int]) -> None:
    for rank, found in enumerate(run_ranks(groups, sizes.world, sizes)):
        assert found.pop("context") == context
        for name, (peers, place, total) in found.items():
            assert tuple(peers) == sizes.peers(rank, name)
            assert place == sizes.place(rank)[name]
            assert total == sum(peers)


def test_a_world_that_does_not_exist() -> None:
    """Rank 137 of 1,024 in one process, on torch's fake backend."""
    sizes = Sizes(pp=4, dp_shard=-1, cp=16, ulysses=4, tp=2).resolved(1024)
    dist.init_process_group("fake", store=FakeStore(), rank=137, world_size=1024)
    try:
        mesh = mesh_of(sizes, "cpu")
        for name in (*AXES, *TOGETHER):
            assert tuple(dist.get_process_group_ranks(mesh[name].get_group())) == sizes.peers(137, name)
        assert mesh.context.shape == (4, 4)
    finally:
        dist.destroy_process_group()
