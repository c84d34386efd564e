"""All-gather: every rank gets all keys and values, some KV heads at a time; queries stay. Integers only.

One collective brings K and V of a group of KV heads. Its shares are equal, so each is padded to the largest, and
what a rank receives counts as coming from its left neighbour, as in a ring. dK and dV go home in messages of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringspan.dist_attn.heads import parts_for
from ringspan.dist_attn.local import live
from ringspan.dist_attn.moves import Integers, Transfers
from ringspan.dist_attn.problem import Problem

BUDGET = 64 << 20  # bytes of gathered K and V from which latency no longer counts, and overlap does


@dataclass(frozen=True)
class GatherMoves:
    """The plan. Round i brings the keys of group i for round i + 1, which computes with them.

    Backward: gradients of group i leave after that, and are home one round later.

    Args:
        groups: the KV heads gathered at a time.
    """

    problem: Problem
    groups: tuple[range, ...]

    @cached_property
    def share(self) -> int:
        """Rows of keys that each rank gives to a collective: the largest share."""
        return largest(self.problem)

    def transfers(self, *, backward: bool) -> Transfers:
        """Return a gather per group, and in the backward pass its gradients too."""
        problem, world = self.problem, self.problem.world
        if world == 1:
            return Transfers.of(())
        each = np.array([len(group) for group in self.groups]) * (2 * problem.batch * problem.head_dim)
        rounds, ranks = np.arange(len(each)), np.arange(world)
        padded = each[:, None] * problem.dtype.itemsize * self.share * np.full(world, world - 1)
        found = [_transfers(rounds, (ranks - 1) % world, ranks, padded)]
        if backward:
            source, target = np.nonzero(1 - np.eye(world, dtype=np.int64))
            rows = np.array([problem.kv_layout.share(rank, world, problem.length) for rank in range(world)])
            moved = each[:, None] * problem.wired.itemsize * rows[target]
            found.append(_transfers(rounds + 2, source, target, moved))
        return Transfers.join(found)

    def areas(self, *, backward: bool = False) -> Integers:
        """Return [groups + 3, world]: nothing in the first round and the last two, forward and backward."""
        del backward
        problem = self.problem
        found = np.zeros((len(self.groups) + 3, problem.world), dtype=np.int64)
        for number, group in enumerate(self.groups):
            parts = parts_for(problem.parts, group)
            found[number + 1] = [live(problem, problem.spans(rank), parts) for rank in range(problem.world)]
        return found


def moves(problem: Problem, head_group: int | None = None) -> GatherMoves:
    """Plan for a problem; see ``head_groups``."""
    return GatherMoves(problem, head_groups(problem, head_group))


def head_groups(problem: Problem, head_group: int | None = None) -> tuple[range, ...]:
    """Return the KV heads that are gathered at a time.

    Args:
        head_group: how many; None: as many as keep what is gathered within ``BUDGET`` bytes, at least one. A rank holds
            at most three times what is gathered: one group computed with, in order and as it came, and the next coming.

    Raises:
        ValueError: if ``head_group`` is not 1 to the KV heads.
    """
    total = problem.kv_heads
    if head_group is None:
        one = 2 * problem.batch * problem.world * largest(problem) * problem.head_dim * problem.dtype.itemsize
        head_group = total if problem.world == 1 else min(total, max(1, BUDGET // max(one, 1)))
    if not 1 <= head_group <= total:
        raise ValueError(
            f"head_group: {head_group} KV heads at a time; must be 1 to the {total} there are, or None for a choice"
        )
    return tuple(range(start, min(start + head_group, total)) for start in range(0, total, head_group))


def holds(problem: Problem, head_group: int | None = None) -> int:
    """Return the bytes of keys and values that a rank has at once: a group as it came, in order, and the next one."""
    groups = head_groups(problem, head_group)
    rows = 2 * problem.batch * problem.world * largest(problem) * problem.head_dim * problem.dtype.itemsize
    return rows * len(groups[0]) * (3 if len(groups) > 1 else 2)


def largest(problem: Problem) -> int:
    """Return the keys of the rank that holds the most."""
    world, length = problem.world, problem.length
    return max(problem.kv_layout.share(rank, world, length) for rank in range(world))


def _transfers(depart: Integers, source: Integers, target: Integers, moved: Integers) -> Transfers:
    """Return transfers of [rounds, pairs] bytes that take one round, without the empty ones."""
    some = moved.any(0)  # a rank without keys gets and gives nothing, in every round
    source, target, moved = source[some], target[some], moved[:, some]
    start = np.repeat(depart, len(source))
    return Transfers(start, start + 1, np.tile(source, len(depart)), np.tile(target, len(depart)), moved.ravel())
