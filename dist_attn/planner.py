"""The public plan: what every rank does and moves for one call, also for a world that does not exist."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch

from ringspan.dist_attn.cost import Costs, Prediction, predict, typical
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.moves import Integers, Moves, Transfers
from ringspan.dist_attn.problem import Problem
from ringspan.dist_attn.ring_plan import schedules
from ringspan.dist_attn.steps import Step
from ringspan.dist_attn.strategies import NAMES, TABLE, check_strategy, choose
from ringspan.kernels.mask import Mask, row_count
from ringspan.kernels.parts import parts_of

STRATEGIES = NAMES
__all__ = ["STRATEGIES", "Plan", "check_strategy", "digest", "plan"]


@dataclass(frozen=True)
class Plan:
    """What every rank does and moves for one call of ``attention``; sums over batch rows where they differ.

    Made by ``plan``; needs no process group, so a world that does not exist can be planned.
    """

    problem: Problem
    strategy: str
    why: str = field(compare=False)

    @cached_property
    def moves(self) -> Moves:
        """The strategy's transfers and areas, of all ranks."""
        return TABLE[self.strategy].moves(self.problem)

    @cached_property
    def forward(self) -> Transfers:
        """All transfers of the forward pass."""
        return self.moves.transfers(backward=False)

    @cached_property
    def backward(self) -> Transfers:
        """All transfers of the backward pass."""
        return self.moves.transfers(backward=True)

    @cached_property
    def areas(self) -> Integers:
        """Live pairs, times query heads and batch rows, of each round and rank: [rounds, world]."""
        return self.moves.areas()

    @cached_property
    def backward_areas(self) -> Integers:
        """The same of the backward pass, whose rounds may hold other pairs; the sums by rank are equal."""
        return self.moves.areas(backward=True)

    def received_bytes(self, rank: int, *, backward: bool = False) -> int:
        """Return payload bytes that arrive at ``rank`` in the forward pass, or in the backward pass."""
        return (self.backward if backward else self.forward).received(rank)

    def lower_bound_bytes(self, rank: int) -> int:
        """Return the bytes of K and V rows that some query of ``rank`` sees and it does not hold."""
        return self.problem.lower_bound(rank)

    def area(self, rank: int) -> float:
        """Return live (query, key) pairs that ``rank`` computes, mean over KV heads (an int where it is whole)."""
        total = int(self.areas[:, rank].sum()) // self.problem.ratio
        heads = self.problem.kv_heads
        return total // heads if total % heads == 0 else total / heads

    def imbalance(self) -> float:
        """Return the largest rank's live area over the mean."""
        areas = self.areas.sum(0)
        return float(areas.max() / areas.mean()) if areas.any() else 1.0

    def seconds(self, costs: Costs, *, backward: bool = False) -> Prediction:
        """Predict how long the forward or the backward pass takes."""
        transfers, areas = (self.backward, self.backward_areas) if backward else (self.forward, self.areas)
        return predict(transfers, areas, self.problem.head_dim, costs, backward=backward)

    def steps(self, rank: int) -> tuple[Step, ...]:
        """Return the ring's steps of ``rank``, one plan after the other where batch rows or heads have their own.

        Raises:
            ValueError: for a strategy whose rounds are not steps of keys; ``forward`` and ``areas`` describe those.
        """
        if self.strategy not in ("ring", "double_ring"):
            raise ValueError(f"steps: {self.strategy} has none; see Plan.forward, Plan.backward and Plan.areas")
        made = schedules(self.problem, double=self.strategy == "double_ring")
        return tuple(step for each in made for step in each.steps(rank))

    @property
    def hash(self) -> str:
        """Hex digest of everything the ranks must agree on; the same in every process."""
        return digest(self.problem, self.strategy)

    def __repr__(self) -> str:
        """Say what is planned in one line."""
        return f"Plan({self.strategy}, {self.problem.world} ranks, {self.problem.length} tokens, {self.problem.layout})"


@lru_cache(maxsize=256)
def digest(problem: Problem, strategy: str) -> str:
    """Return a hex digest of a problem and its strategy, the same in every process; every layer of a pass asks it."""
    p = problem
    words = [f"{part.mask}|{part.rows}|{part.heads}" for part in p.parts]
    words += [f"{p.layout}|{p.kv_layout}|{p.mesh}|{p.length}|{p.batch}|{p.heads}|{p.kv_heads}|{p.head_dim}"]
    words += [f"{p.dtype}|{p.wired}|{p.keep}|{p.sinks}|{p.first_kv_head}|{p.total_kv_heads}|{strategy}"]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def plan(
    mask: Mask,
    layout: Layout,
    *,
    world: int | tuple[int, ...],
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    strategy: str = "ring",
    kv_layout: Layout | None = None,
    gradient_dtype: torch.dtype | None = None,
    keep: bool = False,
    sinks: bool = False,
    costs: Costs | None = None,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
) -> Plan:
    """Plan attention over a sequence of ``length`` tokens on ``world`` ranks, without a process group.

    Args:
        mask: one expression; Documents with a boundary list per batch row give a plan that sums over the rows, and
            masks that differ by head one that sums over the heads.
        layout: who holds which tokens; kv_layout: which keys and values, where they are shared out otherwise.
        world: ranks, or (nodes, ranks in a node); length: global tokens.
        heads, kv_heads, head_dim: of the model; dtype: of q, k and v.
        strategy: as in ``attention``.
        gradient_dtype: of dK and dV on their way; None: fp32 (fp64 for fp64).
        sinks: with learned sinks.
        costs: what "auto" reckons with; None: typical CUDA nodes.
        keep: (out, lse) are kept under activation checkpointing: the backward starts from this rank's rows alone.
        first_kv_head, total_kv_heads: as in ``attention``; heads and kv_heads are then a tensor parallel rank's.

    Raises:
        ValueError: names the argument, its value and the rule.
    """
    check_strategy(strategy)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"heads: {heads} query heads cannot share {kv_heads} KV heads; heads must be a multiple of them"
        )
    mesh = world if isinstance(world, tuple) else (world,)
    if min(mesh) < 1 or len(mesh) > 2:
        raise ValueError(f"world: {world} must be at least 1, or (nodes, ranks in a node)")
    batch = row_count(mask) or 1
    parts = parts_of(mask, batch, kv_heads, first_kv_head, total_kv_heads or first_kv_head + kv_heads)
    for part in parts:
        part.mask.check(length)
    shape = (batch, length, layout, kv_layout or layout, mesh, heads, kv_heads, head_dim)
    problem = Problem(parts, *shape, dtype, gradient_dtype, keep, sinks, first_kv_head, total_kv_heads)
    return Plan(problem, *choose(strategy, problem, costs or typical("cuda")))
