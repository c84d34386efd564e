"""What the ring moves and computes, for all ranks, from its schedules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringspan.dist_attn.moves import Integers, Transfers
from ringspan.dist_attn.problem import Problem
from ringspan.dist_attn.schedule import Schedule, schedule


def schedules(problem: Problem, *, double: bool = False) -> tuple[Schedule, ...]:
    """Return the (cached) schedule of each part: rows and heads of one mask."""
    world = (problem.mesh[0], problem.mesh[1]) if double else problem.world
    return tuple(
        schedule(part.mask, problem.layout, world, problem.length, problem.kv_layout) for part in problem.parts
    )


@dataclass(frozen=True)
class RingMoves:
    """See ``moves.Moves``; parts run one after the other, so their rounds follow each other."""

    problem: Problem
    schedules: tuple[Schedule, ...]

    def transfers(self, *, backward: bool) -> Transfers:
        """K and V out; backward also dK and dV, which leave once a step is computed."""
        problem, found, base = self.problem, [], 0
        for part, made in zip(problem.parts, self.schedules, strict=True):
            elements = 2 * part.share * problem.head_dim
            found.append(made.keys(elements * problem.dtype.itemsize).later(base))
            if backward:
                found.append(made.gradients(elements * problem.wired.itemsize).later(base))
            base += made.rounds
        return Transfers.join(found)

    def areas(self, *, backward: bool = False) -> Integers:
        """Live pairs, times query heads and batch rows: [rounds, world]."""
        ratio = self.problem.ratio
        found = []
        for part, made in zip(self.problem.parts, self.schedules, strict=True):
            areas = made.backward_areas if backward else made.areas
            found.append(np.pad(areas * (part.share * ratio), ((0, made.rounds - len(areas)), (0, 0))))
        return np.concatenate(found)


def moves(problem: Problem, *, double: bool = False) -> RingMoves:
    """Plan the ring, or the double ring of a 2-D mesh."""
    return RingMoves(problem, schedules(problem, double=double))
