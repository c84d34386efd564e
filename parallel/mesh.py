"""The ranks as a mesh: pipeline stages x replicas x shards of the model x shards of the sequence x tensor parallel.

Sizes are integers and plan any world, also one that does not exist. Neighbours in rank order are neighbours in the last
axes: tensor parallel ranks, then Ulysses, exchange most and stay inside a node; pipeline stages exchange least.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod

import numpy as np
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Outermost first; cp, as users know it, is ring x ulysses.
AXES: tuple[str, ...] = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
# What several axes are together: the ranks that share a sequence, that hold other sequences, over which FSDP shards
# parameters, and over which gradients, losses and token counts are summed.
TOGETHER: dict[str, tuple[str, ...]] = {
    "cp": ("ring", "ulysses"),
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "ring", "ulysses"),
    "dp_cp": ("dp_replicate", "dp_shard", "ring", "ulysses"),
}
STORAGE: tuple[str, ...] = ("pp", "dp_replicate", "dp_shard_cp", "tp")


@dataclass(frozen=True)
class Sizes:
    """Ranks along each axis, by the names of the field.

    Args:
        pp: pipeline stages.
        dp_replicate: copies of the (sharded) model, each with sequences of its own.
        dp_shard: ranks with sequences of their own that share one copy of the model; -1: what the world leaves.
        cp: ranks that share a sequence.
        ulysses: how many of ``cp`` exchange heads for tokens; the ring is between them. 1: all of ``cp`` is the ring.
        tp: ranks that share each layer.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    ulysses: int = 1
    tp: int = 1

    def resolved(self, world: int) -> Sizes:
        """Return the sizes with the free one (-1) worked out.

        Raises:
            ValueError: in one line with the arithmetic, if they do not make up ``world`` ranks.
        """
        sizes = asdict(self)
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"{name}: {size} is neither a number of ranks nor -1 (what the world leaves)")
        ulysses = sizes.pop("ulysses")
        free = [name for name, size in sizes.items() if size == -1]
        if ulysses == -1 or len(free) > 1:
            names = ", ".join([*free, *(["ulysses"] if ulysses == -1 else [])])
            raise ValueError(f"{names}: -1; only one of {', '.join(sizes)} may be left to the world")
        fixed = prod(size for size in sizes.values() if size != -1)
        words = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != -1)
        if free:
            if world % fixed:
                raise ValueError(
                    f"{free[0]}: {world} ranks / ({words} = {fixed}) is no whole number; change one of them"
                )
            sizes[free[0]] = world // fixed
        elif fixed != world:
            raise ValueError(
                f"{words} = {fixed} ranks, but there are {world}; start {fixed}, or let one size be -1 to take the rest"
            )
        if sizes["cp"] % ulysses:
            raise ValueError(f"ulysses: {ulysses} does not divide cp {sizes['cp']} into rings of equal length")
        return replace(self, **sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The mesh: ranks along each of ``AXES``; resolved sizes only."""
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp // self.ulysses, self.ulysses, self.tp)

    @property
    def world(self) -> int:
        """All ranks."""
        return prod(self.shape)

    def place(self, rank: int) -> dict[str, int]:
        """Return where ``rank`` stands on each axis, and on those taken together."""
        at = dict(zip(AXES, (int(x) for x in np.unravel_index(rank, self.shape)), strict=True))
        size = dict(zip(AXES, self.shape, strict=True))
        for name, axes in TOGETHER.items():
            at[name] = int(np.ravel_multi_index([at[axis] for axis in axes], [size[axis] for axis in axes]))
        return at

    def peers(self, rank: int, name: str) -> tuple[int, ...]:
        """Return the ranks along an axis, or several together, that ``rank`` is one of; in their order."""
        along = TOGETHER.get(name, (name,))
        at = self.place(rank)
        rest = tuple(slice(None) if axis in along else at[axis] for axis in AXES)
        return tuple(int(x) for x in np.arange(self.world).reshape(self.shape)[rest].ravel())

    def check_node(self, ranks_per_node: int) -> None:
        """Check that the axes which exchange most stay inside a node.

        Raises:
            ValueError: if tensor parallel or Ulysses ranks would be on several nodes.
        """
        inside = self.tp * self.ulysses
        if min(ranks_per_node, self.world) % inside:
            raise ValueError(
                f"tp {self.tp} x ulysses {self.ulysses} = {inside} ranks do not fit a node of {ranks_per_node} without "
                "crossing to another; choose sizes whose product divides it"
            )

    def __str__(self) -> str:
        """Name the axes that have more than one rank."""
        return " x ".join(f"{name} {size}" for name, size in asdict(self).items() if size != 1) or "one rank"


@dataclass(frozen=True)
class Mesh:
    """The groups of this process: ``mesh["tp"]`` is an axis, ``mesh["dp_cp"]`` several together, each a 1-D mesh."""

    sizes: Sizes
    whole: DeviceMesh  # all of AXES
    storage: DeviceMesh  # the same ranks by who holds which parameters: STORAGE
    together: dict[str, DeviceMesh]

    def __getitem__(self, name: str) -> DeviceMesh:
        """Return the ranks along an axis, or several together, that this process is one of."""
        if name in self.together:
            return self.together[name]
        return (self.storage if name in STORAGE else self.whole)[name]

    def group(self, name: str) -> dist.ProcessGroup | None:
        """Return the process group along an axis, or several together; None where it is this process alone."""
        mesh = self[name]
        return mesh.get_group() if mesh.size() > 1 else None

    @property
    def shards(self) -> DeviceMesh:
        """Over what FSDP shards: 1-D, or with replicas 2-D (replicas, shards)."""
        return self.storage["dp_replicate", "dp_shard_cp"] if self.sizes.dp_replicate > 1 else self["dp_shard_cp"]

    @property
    def place(self) -> dict[str, int]:
        """Where this process stands on each axis, and on those taken together."""
        return self.sizes.place(dist.get_rank())

    @property
    def context(self) -> DeviceMesh:
        """What ``SequenceContext`` takes: the 2-D mesh where ring and Ulysses are both there, else all cp ranks."""
        both = self.whole["ring", "ulysses"]
        return both if min(both.shape) > 1 else self["cp"]


def mesh_of(sizes: Sizes, device_type: str) -> Mesh:
    """Make the groups of all axes, those taken together included; every rank of the world calls it.

    Args:
        sizes: resolved.
        device_type: "cpu" or "cuda".
    """
    whole = init_device_mesh(device_type, sizes.shape, mesh_dim_names=AXES)
    pp, replicas, *_, tp = sizes.shape
    # A mesh of its own: parameters that are sharded both ways need one mesh that has both axes.
    storage = init_device_mesh(device_type, (pp, replicas, sizes.dp_shard * sizes.cp, tp), mesh_dim_names=STORAGE)
    # No public name yet (torch 2.13); FSDP2 with context parallelism is built on it.
    together = {name: whole[axes]._flatten(name) for name, axes in TOGETHER.items() if name not in STORAGE}
    return Mesh(sizes, whole, storage, together)
