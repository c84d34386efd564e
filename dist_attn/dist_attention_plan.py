"""Which query rows visit which rank's keys, and when: the plan of DistAttention. Integers only, no process group.

Keys and values stay where they are. For every pair of ranks the rows of one that see a key of the other are known
exactly, and only these travel. In the round of distance d each rank computes on what came from d ranks before it: the
queries left a round earlier, and their partial results go home a round later. Distances that nobody needs are left out.
The exchange is that of Infinite-LLM's DistAttention (arXiv 2401.02669, section 4), here for training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.meetings import Meetings, meetings
from ringspan.dist_attn.moves import Integers, Transfers
from ringspan.dist_attn.problem import Problem
from ringspan.kernels.mask import Mask, Span, overlap, union
from ringspan.kernels.work import Work, work


class Trip(NamedTuple):
    """Query rows that travel: to or from ``peer``, which spans of the sequence, and where they lie at home."""

    peer: int
    spans: tuple[Span, ...]
    local: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """Rows in a message."""
        return sum(span.size for span in self.local)


@dataclass(frozen=True)
class Visit:
    """One rank's share of a round: its rows that leave for it, the rows that come, and what is computed on those.

    Distance 0 is the rank's own queries on its own keys. ``work`` is None where nothing is live.
    """

    distance: int
    leaves: Trip | None
    comes: Trip | None
    work: Work | None


@lru_cache(maxsize=256)
def visits(mask: Mask, layout: Layout, kv_layout: Layout, world: int, length: int, rank: int) -> tuple[Visit, ...]:
    """Return the rounds of one rank for one mask; the distances are the same on all ranks."""
    table = meetings(mask, layout, kv_layout, world, length)
    queries, keys = (each.spans(rank, world, length) for each in (layout, kv_layout))
    own = work(mask, queries, keys) if table.areas[rank, rank] else None
    found = [Visit(0, None, None, own)]
    for distance in table.distances:
        target, source = (rank + distance) % world, (rank - distance) % world
        leaves = _trip(table.rows(rank, target), queries, target)
        comes = _trip(table.rows(source, rank), layout.spans(source, world, length), source)
        found.append(Visit(distance, leaves, comes, work(mask, comes.spans, keys) if comes else None))
    return tuple(found)


def _trip(spans: tuple[Span, ...], held: tuple[Span, ...], peer: int) -> Trip | None:
    """Place the spans among the rows that are held; rows that are neighbours there become one run."""
    if not spans:
        return None
    local: list[Span] = []
    row = 0
    for own in held:
        local += [Span(s.start - own.start + row, s.stop - own.start + row) for s in overlap([own], spans)]
        row += own.size
    return Trip(peer, spans, union(local))


@dataclass(frozen=True)
class QueryMoves:
    """What moves where queries travel; see ``dist_attn.moves.Moves``. Parts follow one another, round by round."""

    problem: Problem

    @cached_property
    def tables(self) -> tuple[Meetings, ...]:
        """Who meets whom, part by part."""
        p = self.problem
        return tuple(meetings(part.mask, p.layout, p.kv_layout, p.world, p.length) for part in p.parts)

    def transfers(self, *, backward: bool) -> Transfers:
        """Return queries on their way out and partial results on their way home; in the backward dq comes home."""
        p = self.problem
        out, home = _bytes(p, backward)
        found: list[Transfers] = []
        for part, table, first in zip(p.parts, self.tables, self._starts[:-1], strict=True):
            sources, targets = np.nonzero(table.visitors)
            numbers = np.searchsorted(table.distances, (targets - sources) % p.world) + first + 1
            rows = table.visitors[sources, targets] * part.share * p.ratio
            found.append(Transfers(numbers - 1, numbers, sources, targets, rows * out))
            found.append(Transfers(numbers + 1, numbers + 2, targets, sources, rows * home))
        return Transfers.join(found)

    def areas(self, *, backward: bool = False) -> Integers:
        """Return [rounds, world]: live pairs each rank computes, the same both ways; in the last two rounds none."""
        del backward
        p = self.problem
        travel = any(table.distances for table in self.tables)
        found = np.zeros((self._starts[-1] + 2 * travel, p.world), dtype=np.int64)
        ranks = np.arange(p.world)
        for part, table, first in zip(p.parts, self.tables, self._starts[:-1], strict=True):
            for number, distance in enumerate((0, *table.distances)):
                found[first + number] = table.areas[(ranks - distance) % p.world, ranks] * part.share * p.ratio
        return found

    @property
    def _starts(self) -> tuple[int, ...]:
        """The first round of each part, and the number of rounds."""
        counts = [1 + len(table.distances) for table in self.tables]
        return tuple(np.cumsum([0, *counts]).tolist())


def _bytes(problem: Problem, backward: bool) -> tuple[int, int]:
    """Return the bytes of a row and head in a message out, and home."""
    dim, narrow, wide = problem.head_dim, problem.dtype.itemsize, problem.wide.itemsize
    if backward:  # q, dout, lse, delta; dq
        return 2 * dim * narrow + 2 * wide, dim * wide
    return dim * narrow, (dim + 1) * wide  # q; partial out and lse


def moves(problem: Problem) -> QueryMoves:
    """Plan a problem for all its ranks."""
    return QueryMoves(problem)


def refuses(problem: Problem) -> str | None:
    """Return None: every problem can be done; ``problem.wire`` has no meaning here, for dK and dV never travel."""
    del problem


def holds(problem: Problem) -> int:
    """Return the bytes of other ranks' rows that a rank has at most at once: of this round and of the next one."""
    tables = zip(problem.parts, moves(problem).tables, strict=True)
    rows = max((int(table.visitors.max()) * part.share * problem.ratio for part, table in tables), default=0)
    return 2 * rows * max(sum(_bytes(problem, backward)) for backward in (False, True))
