"""DistAttention: queries travel to the keys, partial results come home; K, V and their gradients never move.

Each rank computes what visits it while the next visitors are on their way and the last results travel home. Partial
results are merged, and dQ summed, at home in the plan's order. The backward sends q again, with dout, lse and delta,
and gets dQ back. Which exchange is cheaper, this or the ring, is a matter of bytes: few queries against many keys
favour this one, grouped heads with equal shares the ring.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from zlib import crc32

import torch
from torch import Tensor

from ringspan.dist_attn.dist_attention_plan import Trip, Visit, visits
from ringspan.dist_attn.exchange import Exchange, Pending
from ringspan.dist_attn.executor import Attended, Wiring
from ringspan.dist_attn.local import empty
from ringspan.dist_attn.message import Message
from ringspan.dist_attn.problem import Problem
from ringspan.kernels.mask import Span
from ringspan.kernels.select import Backend
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.work import Work

QUERIES, PARTIALS, ROWS, DQ = 3, 4, 5, 6  # kinds of rounds; part of a message's round id


class Round(NamedTuple):
    """A round of one part: its number among the parts, and this rank's share of it."""

    number: int
    visit: Visit


@dataclass(frozen=True)
class DistAttention:
    """One rank's part in the exchange; see ``dist_attn.executor.Executor``."""

    problem: Problem
    rank: int
    exchange: Exchange | None
    kernel: Backend
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Attend: q [B, L, H, D], k and v [B, Lk, G, D], this rank's; nothing is kept for the backward."""
        parts, rounds = self.problem.parts, self._rounds()
        out, lse = empty(q, self.problem.wide)
        away = {each.number for each in rounds if each.visit.leaves}
        totals = [
            Running(part.take(out), part.take(lse), bytearray(q.shape[1]), alone=number not in away)
            for number, part in enumerate(parts)
        ]
        queries, keys, values = ([part.take(x) for part in parts] for x in (q, k, v))
        _walk(rounds, self.exchange, _Forward(self.kernel, self.scale, queries, keys, values, totals))
        for part, total in zip(parts, totals, strict=True):
            part.put(out, total.out)
            part.put(lse, total.lse)
        return Attended(out, lse)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, rest: tuple[Tensor, ...]) -> Gradients:
        """Return dq, dk, dv of this rank's rows, over all ranks, in the accumulator's dtype."""
        del rest
        parts, wide = self.problem.parts, self.problem.wide
        whole = Gradients(*(torch.zeros(x.shape, dtype=wide, device=x.device) for x in (saved.q, k, v)))
        totals = [Gradients(*(part.take(x) for x in whole)) for part in parts]
        mine, keys, values = [saved.part(part) for part in parts], *([p.take(x) for p in parts] for x in (k, v))
        _walk(self._rounds(), self.exchange, _Backward(self.kernel, self.scale, mine, keys, values, totals))
        for part, total in zip(parts, totals, strict=True):
            for x, piece in zip(whole, total, strict=True):
                part.put(x, piece)
        return whole

    def _rounds(self) -> list[Round]:
        """Return all rounds, part after part; their distances are the same on every rank."""
        p = self.problem
        where = (p.layout, p.kv_layout, p.world, p.length, self.rank)
        return [Round(number, visit) for number, part in enumerate(p.parts) for visit in visits(part.mask, *where)]


class _Direction(Protocol):
    """What tells the forward from the backward; ``number`` is a part's. Tensors are [B, rows, ...]."""

    @property
    def kinds(self) -> tuple[int, int]:
        """Kinds of the rounds in which messages go out, and home."""
        ...

    def travellers(self, number: int) -> tuple[Tensor, ...]:
        """Return the tensors whose rows travel."""
        ...

    def results(self, number: int) -> tuple[Tensor, ...]:
        """Return the running results, rows of which come home."""
        ...

    def own(self, number: int, work: Work) -> None:
        """Compute this rank's own queries on its own keys."""
        ...

    def serve(self, number: int, work: Work, came: tuple[Tensor, ...], home: tuple[Tensor, ...]) -> None:
        """Compute visitors on this rank's keys; fill ``home`` with their results."""
        ...

    def land(self, number: int, rows: Span, found: tuple[Tensor, ...]) -> None:
        """Take in what came home for a run of rows."""
        ...


@dataclass(frozen=True)
class _Forward:
    kernel: Backend
    scale: float
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    totals: list[Running]
    kinds: tuple[int, int] = (QUERIES, PARTIALS)

    def travellers(self, number: int) -> tuple[Tensor, ...]:
        return (self.queries[number],)

    def results(self, number: int) -> tuple[Tensor, ...]:
        return self.totals[number].out, self.totals[number].lse

    def own(self, number: int, work: Work) -> None:
        self._add(self.totals[number], self.queries[number], number, work)

    def serve(self, number: int, work: Work, came: tuple[Tensor, ...], home: tuple[Tensor, ...]) -> None:
        out, lse = home[0].zero_(), home[1].fill_(-torch.inf)
        self._add(Running(out, lse, bytearray(work.rows)), came[0], number, work)

    def _add(self, total: Running, queries: Tensor, number: int, work: Work) -> None:
        self.kernel.forward(total, queries, self.keys[number], self.values[number], work, scale=self.scale)

    def land(self, number: int, rows: Span, found: tuple[Tensor, ...]) -> None:
        self.totals[number].add(rows, *found)


@dataclass(frozen=True)
class _Backward:
    kernel: Backend
    scale: float
    saved: list[Saved]
    keys: list[Tensor]
    values: list[Tensor]
    totals: list[Gradients]
    kinds: tuple[int, int] = (ROWS, DQ)

    def travellers(self, number: int) -> tuple[Tensor, ...]:
        saved = self.saved[number]
        return saved.q, saved.dout, saved.lse, saved.delta

    def results(self, number: int) -> tuple[Tensor, ...]:
        return (self.totals[number].dq,)

    def own(self, number: int, work: Work) -> None:
        self._add(self.totals[number], self.saved[number], number, work)

    def serve(self, number: int, work: Work, came: tuple[Tensor, ...], home: tuple[Tensor, ...]) -> None:
        q, dout, lse, delta = came
        # Kernels take delta as rowsum(dout * out) - dlse; without out, dlse brings it.
        visitors = Saved(q, q.new_zeros(()).expand(q.shape), lse, dout, dlse=-delta)
        self._add(self.totals[number]._replace(dq=home[0].zero_()), visitors, number, work)

    def _add(self, total: Gradients, saved: Saved, number: int, work: Work) -> None:
        self.kernel.backward(total, saved, self.keys[number], self.values[number], work, scale=self.scale)

    def land(self, number: int, rows: Span, found: tuple[Tensor, ...]) -> None:
        self.totals[number].dq[:, rows.start : rows.stop].add_(found[0])


class _Parcel(NamedTuple):
    """A round's messages: one may leave, one may come; both live until ``pending`` has ended."""

    pending: Pending
    left: Message | None
    came: Message | None


def _walk(rounds: list[Round], exchange: Exchange | None, direction: _Direction) -> None:
    """Compute round by round; queries travel a round ahead of it, results a round behind."""
    visitors: Message | None = None
    results: Message | None = None
    for index in range(len(rounds) + 1):
        ahead = _send_out(rounds[index + 1], exchange, direction) if index + 1 < len(rounds) else None
        behind = _send_home(rounds[index - 1], exchange, direction, results) if index else None
        results = _compute(rounds[index], exchange, direction, visitors) if index < len(rounds) else None
        for parcel in (ahead, behind):
            if parcel:
                parcel.pending.wait()
        if behind and behind.came:
            number, visit = rounds[index - 1]
            for rows, found in _runs(visit.leaves, behind.came):
                direction.land(number, rows, found)
        visitors = ahead.came if ahead else None


def _compute(each: Round, exchange: Exchange | None, direction: _Direction, visitors: Message | None) -> Message | None:
    """Compute a round: own queries, or visitors; return the message with the visitors' results."""
    work, trip = each.visit.work, each.visit.comes
    if work is None:
        return None
    if trip is None:
        direction.own(each.number, work)
        return None
    assert visitors is not None
    message = _empty(exchange, trip, direction.results(each.number))
    direction.serve(each.number, work, visitors.tensors, message.tensors)
    return message


def _send_out(each: Round, exchange: Exchange | None, direction: _Direction) -> _Parcel | None:
    """Start the way out of a round's queries."""
    number, visit = each
    if not visit.leaves and not visit.comes:
        return None
    tensors = direction.travellers(number)
    message = _empty(exchange, visit.leaves, tensors) if visit.leaves else None
    if message:
        for rows, found in _runs(visit.leaves, message):
            for x, place in zip(tensors, found, strict=True):
                place.copy_(x[:, rows.start : rows.stop])
    came = _empty(exchange, visit.comes, tensors) if visit.comes else None
    return _post(exchange, each, direction.kinds[0], (visit.leaves, message), (visit.comes, came))


def _send_home(
    each: Round, exchange: Exchange | None, direction: _Direction, results: Message | None
) -> _Parcel | None:
    """Start the way home of a round's results."""
    number, visit = each
    if not visit.leaves and not visit.comes:
        return None
    came = _empty(exchange, visit.leaves, direction.results(number)) if visit.leaves else None
    return _post(exchange, each, direction.kinds[1], (visit.comes, results), (visit.leaves, came))


def _post(
    exchange: Exchange | None,
    each: Round,
    kind: int,
    leaves: tuple[Trip | None, Message | None],
    comes: tuple[Trip | None, Message | None],
) -> _Parcel:
    assert exchange is not None, "a plan with messages needs a group"
    sends, receives = ([(trip.peer, message)] if trip and message else [] for trip, message in (leaves, comes))
    pending = exchange.post((each.number << 32) | (kind << 24) | each.visit.distance, sends, receives)
    return _Parcel(pending, leaves[1], comes[1])


def _empty(exchange: Exchange | None, trip: Trip, tensors: tuple[Tensor, ...]) -> Message:
    """Return an empty message for the rows of a trip of tensors [B, L, ...]."""
    assert exchange is not None, "a plan with messages needs a group"
    specs = [((x.shape[0], trip.rows, *x.shape[2:]), x.dtype) for x in tensors]
    note = crc32(repr(trip.spans).encode()) if exchange.debug else 0
    return exchange.message(specs, tensors[0].device, note)


def _runs(trip: Trip | None, message: Message) -> Iterator[tuple[Span, tuple[Tensor, ...]]]:
    """Yield each run of rows at home, with its part of the message's tensors."""
    row = 0
    for rows in trip.local if trip else ():
        yield rows, tuple(x[:, row : row + rows.size] for x in message.tensors)
        row += rows.size


def executor(problem: Problem, wiring: Wiring, kernel: Backend, scale: float) -> DistAttention:
    """Return the executor of one rank; messages go over ``wiring.flat``."""
    return DistAttention(problem, wiring.rank, wiring.flat, kernel, scale)
