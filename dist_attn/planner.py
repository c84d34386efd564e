"""The public plan: what every rank does and moves for one call, also for a world that does not exist."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.schedule import Schedule, Step, schedule
from ringspan.kernels.mask import Mask, row_count
from ringspan.kernels.parts import parts_of

STRATEGIES = ("auto", "ring")


@dataclass(frozen=True)
class Plan:
    """What every rank does and moves for one call of ``attention``; sums over batch rows where they differ.

    Made by ``plan``; needs no process group, so a world that does not exist can be planned.
    """

    schedules: tuple[Schedule, ...]
    shares: tuple[int, ...]  # KV heads, times batch rows, that each schedule serves
    strategy: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def received_bytes(self, rank: int, *, backward: bool = False) -> int:
        """Return payload bytes that arrive at ``rank``: K and V in ``dtype``; backward adds fp32 (fp64) dK and dV."""
        received = self._elements(rank, Schedule.received_rows) * self.dtype.itemsize
        wide = 8 if self.dtype == torch.float64 else 4
        return received + (self._elements(rank, Schedule.returned_rows) * wide if backward else 0)

    def lower_bound_bytes(self, rank: int) -> int:
        """Return the bytes of K and V rows that some query of ``rank`` sees and it does not hold."""
        return self._elements(rank, Schedule.needed_rows) * self.dtype.itemsize

    def area(self, rank: int) -> float:
        """Return live (query, key) pairs of ``rank``, mean over KV heads (an int where it is whole)."""
        total = sum(each.area(rank) * heads for each, heads in zip(self.schedules, self.shares, strict=True))
        return total // self.kv_heads if total % self.kv_heads == 0 else total / self.kv_heads

    def steps(self, rank: int) -> tuple[Step, ...]:
        """Return the steps of ``rank``, one plan after the other where batch rows or heads have plans of their own."""
        return tuple(step for each in self.schedules for step in each.steps(rank))

    def _elements(self, rank: int, rows: Callable[[Schedule, int], int]) -> int:
        """Return how many elements of K and V these rows have, over all schedules."""
        each = (rows(plan, rank) * heads for plan, heads in zip(self.schedules, self.shares, strict=True))
        return sum(each) * 2 * self.head_dim

    @property
    def hash(self) -> str:
        """Hex digest of everything the ranks must agree on; the same in every process."""
        parts = [
            f"{each.mask}|{heads}|{each.layout}|{each.world}|{each.length}"
            for each, heads in zip(self.schedules, self.shares, strict=True)
        ]
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
        mask: one expression; Documents with a boundary list per batch row give a plan that sums over the rows, and
            masks that differ by head one that sums over the heads.
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
    parts = parts_of(mask, row_count(mask) or 1, kv_heads)
    schedules = tuple(schedule(part.mask, layout, world, length) for part in parts)
    return Plan(schedules, tuple(part.share for part in parts), "ring", heads, kv_heads, head_dim, dtype)


def check_strategy(strategy: str) -> None:
    """Raise ValueError for a strategy that does not exist."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: {strategy!r} is not one of {', '.join(STRATEGIES)}")
