"""What one rank does, step by step: the hops that concern it, in the one order in which every rank posts them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ringspan.dist_attn.pairs import Pair, pairs_of
from ringspan.kernels.mask import Mask, Span
from ringspan.kernels.work import Work, work


class Hop(NamedTuple):
    """Rank ``target`` receives ``span`` from ``source`` and computes it at ``step``.

    It leaves before the source computes step ``depart``. Its gradient leaves the target after step ``back`` was
    computed, for ``home``, which adds it after step ``add`` at the latest: a rank that adds its own and sends the sum
    on, or the owner.
    """

    depart: int
    step: int
    source: int
    target: int
    home: int
    back: int
    add: int
    owner: int
    span: Span

    @property
    def piece(self) -> tuple[int, Span]:
        """What moves: owner and keys."""
        return self.owner, self.span


@dataclass(frozen=True)
class Arrival:
    """Key spans that come from ``peer`` in one message (or the rank's own), and what is computed on them.

    ``until``: the last step at which this rank sends one of them on; ``sends``: how many messages do so.
    """

    peer: int
    depart: int
    step: int
    hops: tuple[Hop, ...]
    work: Work
    until: int = 0
    sends: int = 0

    @property
    def rows(self) -> int:
        """Key rows in the message."""
        return self.work.columns

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All (query span, key span, full) in global positions."""
        return pairs_of(self.work.mask, self.work.queries, self.work.keys)


class Sending(NamedTuple):
    """Hops that leave for ``peer``, or come from it, in one message, to be there for ``step``."""

    peer: int
    step: int
    hops: tuple[Hop, ...]


@dataclass(frozen=True)
class Step:
    """One step of one rank.

    In this order: wait for ``arrivals``; post ``sends`` and the receives of ``awaits`` (which arrive for later steps);
    compute ``own`` and ``arrivals``; in the backward pass then wait for earlier ``returns``, send ``gradients`` (dK and
    dV of hops) and post the receives of ``returns``. Step 0 computes on the rank's own keys.
    """

    number: int
    own: Arrival | None
    arrivals: tuple[Arrival, ...]
    sends: tuple[Sending, ...]
    awaits: tuple[Arrival, ...]
    gradients: tuple[Sending, ...]
    returns: tuple[Sending, ...]

    @property
    def computed(self) -> tuple[Arrival, ...]:
        """The keys this step computes on: the rank's own, or what arrived."""
        return (self.own, *self.arrivals) if self.own else self.arrivals

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All (query span, key span, full) of this step, in global positions."""
        return tuple(pair for arrival in self.computed for pair in arrival.pairs)


def steps_of(
    mask: Mask, rank: int, queries: tuple[Span, ...], keys: tuple[Span, ...], hops: Sequence[Hop]
) -> tuple[Step, ...]:
    """Collect one rank's part of the hops.

    Args:
        mask: what the queries see.
        rank: whose steps.
        queries, keys: the spans it holds.
        hops: all hops that it sends, receives, or whose gradients come to it; ordered by step, source, target, keys.
    """
    sends = _grouped((hop for hop in hops if hop.source == rank), lambda hop: (hop.depart, hop.step, hop.target))
    arrivals = _arrivals(mask, queries, [hop for hop in hops if hop.target == rank], sends)
    gradients = _grouped((hop for hop in hops if hop.target == rank), lambda hop: (hop.back, hop.add, hop.home))
    returns = _grouped((hop for hop in hops if hop.home == rank), lambda hop: (hop.back, hop.add, hop.target))
    leaving, going, coming = _leaving(sends), _leaving(gradients), _leaving(returns)
    landing: dict[int, list[Arrival]] = defaultdict(list)
    awaited: dict[int, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        landing[arrival.step].append(arrival)
        awaited[arrival.depart].append(arrival)
    return tuple(
        Step(
            number,
            Arrival(rank, 0, 0, (), work(mask, queries, keys)) if number == 0 else None,
            tuple(landing[number]),
            tuple(leaving[number]),
            tuple(awaited[number]),
            tuple(going[number]),
            tuple(coming[number]),
        )
        for number in sorted({0, *landing, *leaving, *awaited, *going, *coming})
    )


Groups = dict[tuple[int, int, int], list[Hop]]


def _grouped(hops: Iterable[Hop], key: Callable[[Hop], tuple[int, int, int]]) -> Groups:
    groups: Groups = defaultdict(list)
    for hop in hops:
        groups[key(hop)].append(hop)
    return groups


def _leaving(groups: Groups) -> dict[int, list[Sending]]:
    by_step: dict[int, list[Sending]] = defaultdict(list)
    for (at, step, peer), hops in sorted(groups.items()):
        by_step[at].append(Sending(peer, step, tuple(hops)))
    return by_step


def _arrivals(mask: Mask, queries: tuple[Span, ...], hops: Sequence[Hop], sends: Groups) -> list[Arrival]:
    """Make an arrival of each message, and note how often and how long its pieces are needed for others."""
    uses: dict[tuple[int, Span], list[tuple[int, int, int]]] = defaultdict(list)
    for key, sent in sends.items():
        for hop in sent:
            uses[hop.piece].append(key)
    found = []
    groups = _grouped(hops, lambda hop: (hop.depart, hop.step, hop.source))
    for (depart, step, source), came in sorted(groups.items(), key=lambda item: (item[0][1], item[0][2], item[0][0])):
        onward = {key for hop in came for key in uses[hop.piece]}
        until = max((key[0] for key in onward), default=0)
        keys = tuple(hop.span for hop in came)
        found.append(Arrival(source, depart, step, tuple(came), work(mask, queries, keys), until, len(onward)))
    return found
