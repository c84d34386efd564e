"""Who sends which keys to whom, and which (query, key) pairs each rank computes. Integers only, no process group.

The one idea: every key span is cut where the set of ranks that need it changes. A piece then travels neighbour by
neighbour while each rank on its way needs it, and goes straight to the others, so that a rank receives exactly the keys
one of its queries sees and does not hold: the lower bound. Gradients of a piece start at the first rank of its chain,
travel with it, and go home from the last, so they move as often as the piece did.

Causal zigzag falls out: first halves go all the way round clockwise, second halves only down to rank 0 the other way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.pairs import Pair, pairs_of, without
from ringspan.kernels.mask import Mask, Span, overlap, union
from ringspan.kernels.work import Work, work


class Hop(NamedTuple):
    """At ``step`` rank ``target`` receives ``span`` from ``source``; its gradient then goes on to ``home``.

    ``home`` is the next rank of the chain, or the owner after the last; ``first`` marks where the gradient starts.
    """

    step: int
    source: int
    target: int
    owner: int
    span: Span
    home: int
    first: bool


@dataclass(frozen=True)
class Arrival:
    """Key spans that come from ``peer`` in one message (or the rank's own), and what is computed on them."""

    peer: int
    hops: tuple[Hop, ...]
    work: Work

    @property
    def rows(self) -> int:
        """Key rows in the message."""
        return self.work.columns

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All (query span, key span, full) in global positions."""
        return pairs_of(self.work.mask, self.work.queries, self.work.keys)


@dataclass(frozen=True)
class Step:
    """One step of one rank: what arrives for it, what leaves while it computes, and its pairs.

    ``number`` 0 computes on the rank's own keys. ``sends`` maps a peer to the hops that leave so as to arrive for this
    step; ``gradients`` maps a peer to the hops whose dK, dV leave after this step's backward; ``returns`` maps a peer
    to the hops whose dK, dV come in during that same round.
    """

    number: int
    own: Arrival | None
    arrivals: tuple[Arrival, ...]
    sends: tuple[tuple[int, tuple[Hop, ...]], ...]
    gradients: tuple[tuple[int, tuple[Hop, ...]], ...]
    returns: tuple[tuple[int, tuple[Hop, ...]], ...]

    @property
    def computed(self) -> tuple[Arrival, ...]:
        """The keys this step computes on: the rank's own, or what arrived."""
        return (self.own,) if self.own else self.arrivals

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All (query span, key span, full) of this step, in global positions."""
        return tuple(pair for arrival in self.computed for pair in arrival.pairs)


@dataclass(frozen=True)
class Schedule:
    """The steps of every rank for one sequence (one batch row). Made by ``schedule``."""

    mask: Mask
    layout: Layout
    world: int
    length: int
    hops: tuple[Hop, ...]
    _steps: dict[int, tuple[Step, ...]] = field(default_factory=dict, compare=False, repr=False)

    def spans(self, rank: int) -> tuple[Span, ...]:
        """Return the global spans ``rank`` holds."""
        return self.layout.spans(rank, self.world, self.length)

    def steps(self, rank: int) -> tuple[Step, ...]:
        """Return the ordered steps of ``rank``; steps in which it does nothing are left out."""
        if rank not in self._steps:
            self._steps[rank] = _steps(self, rank)
        return self._steps[rank]

    def received_rows(self, rank: int) -> int:
        """Return key rows that arrive at ``rank`` in the forward pass."""
        return sum(hop.span.size for hop in self.hops if hop.target == rank)

    def returned_rows(self, rank: int) -> int:
        """Return rows of dK, dV that arrive at ``rank`` in the backward pass."""
        return sum(hop.span.size for hop in self.hops if hop.home == rank)

    def needed_rows(self, rank: int) -> int:
        """Return key rows some query of ``rank`` sees and it does not hold: the lower bound."""
        return sum(span.size for span in _needs(self.mask, self.layout, rank, self.world, self.length))

    def area(self, rank: int) -> int:
        """Return the live (query, key) pairs of ``rank``."""
        return sum(arrival.work.area for step in self.steps(rank) for arrival in step.computed)


@lru_cache(maxsize=256)
def schedule(mask: Mask, layout: Layout, world: int, length: int) -> Schedule:
    """Plan the ring for one sequence. Pure: the same arguments give the same steps on every rank.

    Raises:
        ValueError: if the mask does not fit ``length``.
    """
    mask.check(length)
    held = [layout.spans(rank, world, length) for rank in range(world)]
    needs = [_needs(mask, layout, rank, world, length) for rank in range(world)]
    hops = [
        hop
        for owner in range(world)
        for span, needers in _pieces(held[owner], owner, needs)
        for hop in _route(owner, span, needers, world)
    ]
    return Schedule(mask, layout, world, length, tuple(sorted(hops, key=_order)))


def _order(hop: Hop) -> tuple[int, int, int, Span]:
    """Messages hold their pieces by position, whoever owns them: key spans of a kernel call ascend."""
    return hop.step, hop.source, hop.target, hop.span


def _needs(mask: Mask, layout: Layout, rank: int, world: int, length: int) -> tuple[Span, ...]:
    held = layout.spans(rank, world, length)
    seen = union(span for own in held for cut in mask.cuts(own) for span in mask.reach(cut))
    return without(overlap(seen, [Span(0, length)]), union(held))


def _pieces(held: Sequence[Span], owner: int, needs: Sequence[tuple[Span, ...]]) -> list[tuple[Span, frozenset[int]]]:
    """Cut the owner's spans wherever the set of ranks that need them changes."""
    wanted = {rank: overlap(held, need) for rank, need in enumerate(needs) if rank != owner}
    pieces: list[tuple[Span, frozenset[int]]] = []
    for span in held:
        inside = {rank: overlap([span], spans) for rank, spans in wanted.items()}
        points = sorted({point for spans in inside.values() for part in spans for point in part})
        for start, stop in zip(points, points[1:], strict=False):
            needers = frozenset(r for r, spans in inside.items() if overlap(spans, [Span(start, stop)]))
            if needers:
                pieces.append((Span(start, stop), needers))
    return pieces


def _route(owner: int, span: Span, needers: frozenset[int], world: int) -> list[Hop]:
    """Chain by neighbours each way while every rank needs the piece; send the rest directly."""
    chains = [_chain(owner, needers, world, +1)]
    left = needers - set(chains[0])
    chains.append(_chain(owner, left, world, -1))
    left -= set(chains[1])
    hops: list[Hop] = []
    for chain in chains:
        for index, target in enumerate(chain):
            source = chain[index - 1] if index else owner
            home = chain[index + 1] if index + 1 < len(chain) else owner
            hops.append(Hop(index + 1, source, target, owner, span, home, index == 0))
    for target in sorted(left):
        distance = min((target - owner) % world, (owner - target) % world)
        hops.append(Hop(distance, owner, target, owner, span, owner, True))
    return hops


def _chain(owner: int, needers: frozenset[int], world: int, direction: int) -> list[int]:
    chain: list[int] = []
    rank = (owner + direction) % world
    while rank in needers and rank != owner:
        chain.append(rank)
        rank = (rank + direction) % world
    return chain


def _steps(plan: Schedule, rank: int) -> tuple[Step, ...]:
    """Collect one rank's part of the hops and work out its tiles."""
    arrivals: dict[int, dict[int, list[Hop]]] = defaultdict(lambda: defaultdict(list))
    sends: dict[int, dict[int, list[Hop]]] = defaultdict(lambda: defaultdict(list))
    gradients: dict[int, dict[int, list[Hop]]] = defaultdict(lambda: defaultdict(list))
    returns: dict[int, dict[int, list[Hop]]] = defaultdict(lambda: defaultdict(list))
    for hop in plan.hops:
        if hop.target == rank:
            arrivals[hop.step][hop.source].append(hop)
            gradients[hop.step][hop.home].append(hop)
        if hop.source == rank:
            sends[hop.step][hop.target].append(hop)
        if hop.home == rank:
            returns[hop.step][hop.target].append(hop)
    held = plan.spans(rank)
    steps = [Step(0, Arrival(rank, (), work(plan.mask, held, held)), (), (), (), ())]
    for number in sorted({*arrivals, *sends, *gradients, *returns}):
        landed: list[Arrival] = []
        for peer, hops in sorted(arrivals[number].items()):
            keys = tuple(hop.span for hop in hops)
            landed.append(Arrival(peer, tuple(hops), work(plan.mask, held, keys)))
        steps.append(
            Step(
                number,
                None,
                tuple(landed),
                _frozen(sends[number]),
                _frozen(gradients[number]),
                _frozen(returns[number]),
            )
        )
    return tuple(steps)


def _frozen(by_peer: dict[int, list[Hop]]) -> tuple[tuple[int, tuple[Hop, ...]], ...]:
    return tuple((peer, tuple(hops)) for peer, hops in sorted(by_peer.items()))
