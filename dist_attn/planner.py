"""The public plan: what every rank does and moves for one call, also for a world that does not exist."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.schedule import Schedule, Step, schedule
from ringspan.kernels.mask import Mask, of_row, row_count

STRATEGIES = ("auto", "ring")


@dataclass(frozen=True)
class Plan:
    """What every rank does and moves for one call of ``attention``; sums over batch rows where they differ.

    Made by ``plan``; needs no process group, so a world that does not exist can be planned.
    """

    schedules: tuple[Schedule, ...]
    strategy: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def received_bytes(self, rank: int, *, backward: bool = False) -> int:
        """Return payload bytes that arrive at ``rank``: K and V in ``dtype``; backward adds fp32 (fp64) dK and dV."""
        row = 2 * self.kv_heads * self.head_dim  # elements of K and V per token
        total = sum(each.received_rows(rank) for each in self.schedules) * row * self.dtype.itemsize
        if backward:
            wide = 8 if self.dtype == torch.float64 else 4
            total += sum(each.returned_rows(rank) for each in self.schedules) * row * wide
        return total

    def lower_bound_bytes(self, rank: int) -> int:
        """Return the bytes of K and V rows that some query of ``rank`` sees and it does not hold."""
        rows = sum(each.needed_rows(rank) for each in self.schedules)
        return rows * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def area(self, rank: int) -> int:
        """Return live (query, key) pairs of ``rank``, mean over KV heads."""
        return sum(each.area(rank) for each in self.schedules)

    def steps(self, rank: int) -> tuple[Step, ...]:
        """Return the steps of ``rank``, batch row after batch row where rows have plans of their own."""
        return tuple(step for each in self.schedules for step in each.steps(rank))

    @property
    def hash(self) -> str:
        """Hex digest of everything the ranks must agree on; the same in every process."""
        parts = [f"{each.mask}|{each.layout}|{each.world}|{each.length}" for each in self.schedules]
        parts += [
            self.strategy,
            str(self.heads),
            str(self.kv_heads),
            str(self.head_dim),
            str(self.dtype),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def plan(
    mask: Mask,
    layout: Layout,
    *,
    world: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    strategy: str = "ring",
) -> Plan:
    """Plan attention over a sequence of ``length`` tokens on ``world`` ranks, without a process group.

    Args:
        mask: one expression; Documents with a boundary list per batch row give a plan that sums over the rows.
        layout: who holds which tokens.
        world: ranks; length: global tokens; heads, kv_heads, head_dim: of the model; dtype: of q, k and v.
        strategy: "ring" ("auto" takes it: it is the only one).

    Raises:
        ValueError: names the argument, its value and the rule.
    """
    check_strategy(strategy)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"heads: {heads} query heads cannot share {kv_heads} KV heads; heads must be a multiple of them"
        )
    if world < 1:
        raise ValueError(f"world: {world} must be at least 1")
    rows = row_count(mask)
    masks = [mask] if rows is None else [of_row(mask, row) for row in range(rows)]
    schedules = tuple(schedule(each, layout, world, length) for each in masks)
    return Plan(schedules, "ring", heads, kv_heads, head_dim, dtype)


def check_strategy(strategy: str) -> None:
    """Raise ValueError for a strategy that does not exist."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: {strategy!r} is not one of {', '.join(STRATEGIES)}")
