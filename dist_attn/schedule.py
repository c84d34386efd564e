"""Who sends which keys to whom, and which (query, key) pairs each rank computes. Integers only, no process group.

The one idea: every key span is cut where the set of ranks that need it changes. Each piece then goes to exactly these
ranks (``routes``), so that a rank receives the keys one of its queries sees and it does not hold: the lower bound.
Gradients of a piece move as often as the piece did, and end at its owner.

Causal zigzag falls out: first halves go all the way round, second halves from rank 0 to the one before their owner.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from ringspan.dist_attn.areas import areas_by_segment, halving_row
from ringspan.dist_attn.hops import Hops, inside, pieces, route_all
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.moves import Integers, Transfers
from ringspan.dist_attn.pace import paced
from ringspan.dist_attn.pairs import missing
from ringspan.dist_attn.steps import Hop, Step, steps_of
from ringspan.kernels.mask import Mask, Span
from ringspan.kernels.work import Work, work

COMPARED_RANKS = 256  # in larger worlds pieces go round the ring, which suits dense masks
NEIGHBOURS = 1.05  # from neighbour to neighbour few bytes leave a node: what goes straight must be this much faster
HALF_ROWS = 256  # a rank's own keys are cut at multiples of this, or not at all


@dataclass(frozen=True)
class Schedule:
    """The steps of every rank for one sequence (one batch row, heads of one mask). Made by ``schedule``."""

    mask: Mask
    layout: Layout
    kv_layout: Layout
    mesh: tuple[int, ...]
    length: int
    needs: tuple[tuple[Span, ...], ...] = field(compare=False, repr=False)  # of each rank: keys seen and not held
    columns: Hops = field(compare=False, repr=False)
    _steps: dict[int, tuple[Step, ...]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rounds(self) -> int:
        """Rounds of a pass: all steps, and the last gradients home."""
        return int(max(self.columns.step.max(initial=0), self.columns.add.max(initial=-1) + 1)) + 1

    def keys(self, row_bytes: int) -> Transfers:
        """Return the way of K and V, ``row_bytes`` a key."""
        hops = self.columns
        return Transfers(hops.depart, hops.step, hops.source, hops.target, hops.rows * row_bytes)

    def gradients(self, row_bytes: int) -> Transfers:
        """Return the way of dK and dV: they leave when their step is computed, and are added when another is."""
        hops = self.columns
        return Transfers(hops.back + 1, hops.add + 1, hops.target, hops.home, hops.rows * row_bytes)

    @property
    def world(self) -> int:
        """Ranks that share the sequence."""
        return int(np.prod(self.mesh))

    @cached_property
    def hops(self) -> tuple[Hop, ...]:
        """All hops as values; for small worlds."""
        return tuple(self.columns.select(np.ones(len(self.columns.table), dtype=bool)))

    def spans(self, rank: int) -> tuple[Span, ...]:
        """Return the query spans ``rank`` holds."""
        return self.layout.spans(rank, self.world, self.length)

    def kv_spans(self, rank: int) -> tuple[Span, ...]:
        """Return the key spans ``rank`` holds."""
        return self.kv_layout.spans(rank, self.world, self.length)

    def steps(self, rank: int) -> tuple[Step, ...]:
        """Return the ordered steps of ``rank``; steps in which it does nothing are left out."""
        if rank not in self._steps:
            columns = self.columns
            mine = (columns.target == rank) | (columns.source == rank) | (columns.home == rank)
            hops = columns.select(mine)
            self._steps[rank] = steps_of(self.mask, rank, self.spans(rank), self.kv_spans(rank), hops)
        return self._steps[rank]

    def received_rows(self, rank: int) -> int:
        """Return key rows that arrive at ``rank`` in the forward pass."""
        return int(self.columns.rows[self.columns.target == rank].sum())

    def returned_rows(self, rank: int) -> int:
        """Return rows of dK, dV that arrive at ``rank`` in the backward pass."""
        return int(self.columns.rows[self.columns.home == rank].sum())

    def needed_rows(self, rank: int) -> int:
        """Return key rows some query of ``rank`` sees and it does not hold: the lower bound."""
        return sum(span.size for span in self.needs[rank])

    def area(self, rank: int) -> int:
        """Return the live (query, key) pairs of ``rank``."""
        return int(self.areas[:, rank].sum())

    def own_halves(self, rank: int) -> tuple[Work, ...]:
        """Return the work on the rank's own keys in the backward pass: one call, or two where gradients travel.

        The second half is computed after step ``half_after``: it hides the way home of the last gradients, as the first
        hides the way of the first keys.
        """
        queries, keys = self.spans(rank), self.kv_spans(rank)
        row = halving_row(self.mask, queries, keys, HALF_ROWS) if self.half_after[rank] >= 0 else 0
        if not row:
            return (work(self.mask, queries, keys),)
        first, second, left = [], [], row
        for span in keys:
            middle = span.start + min(left, span.size)
            first += [Span(span.start, middle)] if middle > span.start else []
            second += [Span(middle, span.stop)] if middle < span.stop else []
            left -= middle - span.start
        return work(self.mask, queries, tuple(first)), work(self.mask, queries, tuple(second))

    @cached_property
    def half_after(self) -> Integers:
        """The last step after which many gradients leave or come to each rank; -1 where none do.

        Not the very last: a few rows (sink tokens) need nothing to hide behind, and are waited for sooner.
        """
        moved = np.zeros((self.world, int(self.columns.back.max(initial=0)) + 1), dtype=np.int64)
        for side in (self.columns.home, self.columns.target):
            np.add.at(moved, (side, self.columns.back), self.columns.rows)
        many = (moved > 0) & (4 * moved >= moved.max(1, keepdims=True))
        return np.where(many.any(1), many.shape[1] - 1 - many[:, ::-1].argmax(1), -1)

    @cached_property
    def backward_areas(self) -> Integers:
        """Like ``areas``, of the backward pass: what is left of a rank's own keys comes after its last gradients."""
        found = np.pad(self.areas, ((0, self.rounds - len(self.areas)), (0, 0)))
        for rank in range(self.world):
            halves = self.own_halves(rank)
            if len(halves) == 2:
                later = halves[1].area
                found[0, rank] -= later
                found[int(self.half_after[rank]) + 1, rank] += later
        return found

    @cached_property
    def areas(self) -> Integers:
        """Live pairs of each step and rank: [steps, world]."""
        own, hops = self.live
        found = np.zeros((int(self.columns.step.max(initial=0)) + 1, self.world), dtype=np.int64)
        found[0] = own
        np.add.at(found, (self.columns.step, self.columns.target), hops)
        return found

    @cached_property
    def live(self) -> tuple[Integers, Integers]:
        """Live pairs of each rank with its own keys [world], and of each hop's target with its keys [hops]."""
        columns, world = self.columns, self.world
        own, hops = np.zeros(world, dtype=np.int64), np.zeros(len(columns.table), dtype=np.int64)
        order = np.argsort(columns.target, kind="stable")
        edges = np.searchsorted(columns.target[order], np.arange(world + 1))
        for rank in range(world):
            by_segment = areas_by_segment(self.mask, self.spans(rank), columns.points)
            mine = order[edges[rank] : edges[rank + 1]]
            hops[mine] = by_segment[columns.segment[mine]]
            own[rank] = by_segment[inside(columns.points, self.kv_spans(rank))].sum()
        return own, hops


@lru_cache(maxsize=256)
def schedule(
    mask: Mask, layout: Layout, world: int | tuple[int, int], length: int, kv_layout: Layout | None = None
) -> Schedule:
    """Plan the ring for one sequence. Pure: the same arguments give the same steps on every rank.

    Args:
        mask: without heads and rows of its own.
        layout: who holds which queries; kv_layout: which keys (None: the same).
        world: ranks, or (nodes, ranks in a node) for the double ring.
        length: global tokens.

    Raises:
        ValueError: if the mask does not fit ``length``.
    """
    mask.check(length)
    ring, *others = routed(mask, layout, world if isinstance(world, tuple) else (world,), length, kv_layout or layout)
    for other in others:
        if NEIGHBOURS * coupled_area(other) < coupled_area(ring):
            return other
    return ring


def routed(mask: Mask, layout: Layout, mesh: tuple[int, ...], length: int, kv_layout: Layout) -> tuple[Schedule, ...]:
    """Return the ways in which pieces can go: round the ring; where ranks' work may be uneven also paced."""
    world = int(np.prod(mesh))
    held = [kv_layout.spans(rank, world, length) for rank in range(world)]
    needs = tuple(missing(mask, layout.spans(rank, world, length), held[rank], length) for rank in range(world))
    cut = pieces(held, needs)
    ring = Schedule(mask, layout, kv_layout, mesh, length, needs, route_all(*cut, mesh))
    # One document gives every rank the same work in every step; of many, each rank has its own share of work in a step.
    if mask.documents is None or len(mesh) == 2 or not 2 < world <= COMPARED_RANKS:
        return (ring,)
    direct = replace(ring, columns=route_all(*cut, mesh, direct=True), _steps={})
    columns = paced(direct.columns, *direct.live, -(-length // world))
    return ring, replace(ring, columns=columns, _steps={})


def coupled_area(made: Schedule) -> int:
    """Return the pairs in which the last rank is done, where ranks wait for each other and for what is on its way.

    ``cost.predict`` does it for given links, in far more time. Here a forward pass has the gradients' way behind it,
    and what the busiest rank receives, one piece after the other, takes half as long as its computing: what hides that
    suits links that matter.
    """
    both = Transfers.join([made.keys(1), made.gradients(1)])
    received = np.bincount(both.target, both.bytes, made.world).max(initial=1.0)
    taken = (both.bytes * (made.areas.sum(0).max() / received / 2)).astype(np.int64)
    order = np.argsort(both.arrive, kind="stable")
    edges = np.searchsorted(both.arrive[order], np.arange(made.rounds + 1))
    starts = np.zeros((made.rounds, made.world), dtype=np.int64)
    done = np.zeros(made.world, dtype=np.int64)
    for number in range(made.rounds):
        came = order[edges[number] : edges[number + 1]]
        source, target, depart = both.source[came], both.target[came], both.depart[came]
        here = np.maximum(starts[depart, source], starts[depart, target]) + taken[came]
        np.maximum.at(done, source, here)
        np.maximum.at(done, target, here)
        starts[number] = done
        if number < len(made.areas):
            done = done + made.areas[number]
    return int(done.max())
