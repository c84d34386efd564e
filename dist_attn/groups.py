"""The ranks that share a sequence: a process group, or a 2-D mesh of nodes and the ranks inside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None


@dataclass(frozen=True)
class Groups:
    """The process groups of one sequence; ``outer`` and ``inner`` only where the caller gave a 2-D mesh.

    Args:
        flat: all ranks; None: this process holds all tokens.
        outer: this rank's place in every node; inner: the ranks of this node.
        mesh: (world,), or (nodes, ranks in a node).
        rank: within ``flat``.
    """

    flat: dist.ProcessGroup | None
    outer: dist.ProcessGroup | None
    inner: dist.ProcessGroup | None
    mesh: tuple[int, ...]
    rank: int

    @property
    def world(self) -> int:
        """Ranks that share the sequence."""
        return self.mesh[0] if len(self.mesh) == 1 else self.mesh[0] * self.mesh[1]

    def connect(self) -> None:
        """Let NCCL make the communicators of a mesh now: made by the first transfer, they would stall a step.

        gloo connects all ranks when a group is made, and the agreement uses the flat group.
        """
        for group in (self.inner, self.outer):
            if group is not None and dist.get_backend(group) == "nccl":
                dist.all_reduce(torch.zeros(1, device="cuda"), group=group)


def groups_of(group: Group) -> Groups:
    """Return the groups of what a caller calls ``group``.

    A 2-D mesh needs a group over all of its ranks: the default group where the mesh is the whole world in order, else
    one that torch makes at the first call with this mesh, on all of its ranks alike.

    Raises:
        ValueError: if this process is not one of the ranks, or the mesh has more than two dimensions.
    """
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        shape = (int(group.size(0)), int(group.size(1)))
        return Groups(_flat(group), group.get_group(0), group.get_group(1), shape, _rank(_flat(group)))
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: a mesh of {group.ndim} dimensions; give a ProcessGroup, a 1-D mesh, or a 2-D mesh "
                "(nodes, ranks in a node)"
            )
        group = group.get_group()
    if group is None:
        return Groups(None, None, None, (1,), 0)
    return Groups(group, None, None, (dist.get_world_size(group),), _rank(group))


def to_group(group: Group) -> dist.ProcessGroup | None:
    """Return the group of all ranks that share the sequence."""
    return groups_of(group).flat


def place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return (rank, world) within the group; (0, 1) for None."""
    return (0, 1) if group is None else (_rank(group), dist.get_world_size(group))


def _flat(mesh: DeviceMesh) -> dist.ProcessGroup:
    ranks = mesh.mesh.flatten()
    if len(ranks) == dist.get_world_size() and torch.equal(ranks, torch.arange(len(ranks), dtype=ranks.dtype)):
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return mesh._flatten().get_group()


def _rank(group: dist.ProcessGroup) -> int:
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: this process is not one of its ranks")
    return rank
