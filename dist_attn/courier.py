"""Moving pieces along a rank's steps: keys and values ahead of the computation, their gradients behind it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ringspan.dist_attn.exchange import Exchange, Pending
from ringspan.dist_attn.message import Message, Spec
from ringspan.dist_attn.steps import Arrival, Hop, Sending, Step
from ringspan.kernels.mask import Span

FORWARD, BACKWARD, GRADIENTS = 0, 1, 2  # kinds of rounds; part of a message's round id


@dataclass(frozen=True)
class Channels:
    """Which exchange reaches a rank. On a mesh ranks of one node, and of one place, have a group of their own."""

    flat: Exchange
    outer: Exchange | None = None
    inner: Exchange | None = None
    inside: int = 1  # ranks in a node

    def post(
        self,
        round_id: int,
        sends: Sequence[tuple[int, Message]],
        receives: Sequence[tuple[int, Message]],
    ) -> list[Pending]:
        """Start all transfers of a round with (rank, message), a batch for each exchange; same order on every rank."""
        leaving: dict[int, list[tuple[int, Message]]] = defaultdict(list)
        coming: dict[int, list[tuple[int, Message]]] = defaultdict(list)
        exchanges: dict[int, Exchange] = {}
        for batches, many in ((leaving, sends), (coming, receives)):
            for peer, message in many:
                order, exchange, number = self._reach(peer)
                exchanges[order] = exchange
                batches[order].append((number, message))
        return [exchanges[order].post(round_id, leaving[order], coming[order]) for order in sorted(exchanges)]

    def _reach(self, peer: int) -> tuple[int, Exchange, int]:
        mine, theirs = divmod(self.flat.rank, self.inside), divmod(peer, self.inside)
        if self.inner is not None and mine[0] == theirs[0]:
            return 0, self.inner, theirs[1]
        if self.outer is not None and mine[1] == theirs[1]:
            return 1, self.outer, theirs[0]
        return 2, self.flat, peer


class Landed(NamedTuple):
    """Keys to compute on: their arrival, keys [B, n, G, D] and values."""

    arrival: Arrival
    keys: Tensor
    values: Tensor


class Courier:
    """Moves K and V along a rank's steps: later steps' transfers run while this step's tiles are computed."""

    def __init__(
        self, channels: Channels | None, rank: int, base: int, spans: tuple[Span, ...], k: Tensor, v: Tensor
    ) -> None:
        self.channels, self.rank, self.base, self.k, self.v = channels, rank, base, k, v
        self.rows = LocalRows(spans)
        self.flying: dict[int, list[Pending]] = defaultdict(list)  # by the step that waits for them
        self.coming: dict[tuple[int, int, int], Message] = {}
        self.here: list[tuple[Arrival, Message]] = []  # landed, and computed now or sent on later

    def walk(self, steps: tuple[Step, ...]) -> Iterable[tuple[Step, list[Landed]]]:
        """Yield each step with the keys to compute on."""
        for step in steps:
            for _ in ended(self.flying, step.number):
                pass  # its keys are in ``coming``
            self.here += [(each, self.coming.pop(_key(each))) for each in step.arrivals]
            self._post(step)
            landed = [Landed(step.own, self.k, self.v)] if step.own else []
            landed += [Landed(a, m.first, m.second) for a, m in self.here if a.step == step.number]
            yield step, landed
            self.here = [(arrival, message) for arrival, message in self.here if arrival.until > step.number]
        for _ in ended(self.flying, math.inf):
            pass  # what this rank sent for others' last steps

    def _post(self, step: Step) -> None:
        """Start what leaves at this step, a batch for each step that it arrives for."""
        for number in sorted({each.step for each in (*step.sends, *step.awaits)}):
            assert self.channels is not None, "a plan with messages needs a group"
            sends = [(each.peer, self._pack(each)) for each in step.sends if each.step == number]
            receives = []
            for arrival in step.awaits:
                if arrival.step == number:
                    message = self._message(arrival.hops)
                    self.coming[_key(arrival)] = message
                    receives.append((arrival.peer, message))
            self.flying[number] += self.channels.post(self.base | number, sends, receives)

    def _message(self, hops: tuple[Hop, ...]) -> Message:
        assert self.channels is not None
        return self.channels.flat.message(like(self.k, rows_in(hops), self.k.dtype), self.k.device, note_of(hops))

    def _pack(self, sending: Sending) -> Message:
        """Return a message with these pieces: own rows, or rows that have landed."""
        wanted = [hop.piece for hop in sending.hops]
        for arrival, message in self.here:
            if arrival.sends == 1 and [hop.piece for hop in arrival.hops] == wanted:
                message.note = note_of(sending.hops)
                return message  # goes on as it came; only its header is written anew
        message = self._message(sending.hops)
        landed = {hop.piece: (m, rows) for arrival, m in self.here for hop, rows in hop_rows(arrival.hops)}
        for hop, target in hop_rows(sending.hops):
            if hop.owner == self.rank:
                keys, values, rows = self.k, self.v, self.rows.of(hop.span)
            else:
                found, rows = landed[hop.piece]
                keys, values = found.first, found.second
            rows_of(message.first, target).copy_(rows_of(keys, rows))
            rows_of(message.second, target).copy_(rows_of(values, rows))
        return message


class Returns:
    """Moves dK and dV: along each piece's route behind its K and V, and home to the owner.

    Args:
        wire: the dtype in which they travel; they are summed in that of ``dk``.
    """

    def __init__(
        self,
        channels: Channels | None,
        rank: int,
        base: int,
        spans: tuple[Span, ...],
        dk: Tensor,
        dv: Tensor,
        wire: torch.dtype,
    ) -> None:
        self.channels, self.rank, self.base, self.dk, self.dv, self.wire = channels, rank, base, dk, dv, wire
        self.rows = LocalRows(spans)
        self.flying: dict[int, list[Pending]] = defaultdict(list)  # by the step after which they are added
        self.coming: dict[int, list[tuple[tuple[Hop, ...], Message]]] = defaultdict(list)
        # This rank's sums that have not left yet: where a piece lies, and all that lies in the same buffer.
        self.parts: dict[tuple[int, Span], tuple[tuple[Hop, ...], Message, Span]] = {}

    def part(self, arrival: Arrival) -> tuple[Tensor, Tensor]:
        """Return zeroed dk, dv for the keys of an arrival, to be added into."""
        message = self._message(arrival.hops, self.dk.dtype)
        message.first.zero_()
        message.second.zero_()
        self.parts |= {hop.piece: (arrival.hops, message, rows) for hop, rows in hop_rows(arrival.hops)}
        return message.first, message.second

    def exchange(self, step: Step) -> None:
        """Add what is to be added by now, and start sending this step's sums on."""
        self._collect(step.number)
        for number in sorted({each.step for each in (*step.gradients, *step.returns)}):
            assert self.channels is not None, "a plan with messages needs a group"
            sends = [(each.peer, self._pack(each.hops)) for each in step.gradients if each.step == number]
            came = [(each, self._message(each.hops, self.wire)) for each in step.returns if each.step == number]
            receives = [(each.peer, message) for each, message in came]
            self.coming[number] += [(each.hops, message) for each, message in came]
            self.flying[number] += self.channels.post(self.base | number, sends, receives)

    def finish(self) -> None:
        """Wait for all that is left."""
        self._collect(math.inf)

    def _message(self, hops: tuple[Hop, ...], dtype: torch.dtype) -> Message:
        assert self.channels is not None
        return self.channels.flat.message(like(self.dk, rows_in(hops), dtype), self.dk.device, note_of(hops))

    def _collect(self, last: float) -> None:
        """Wait for what is added by step ``last``, and add it in the plan's order."""
        for number in ended(self.flying, last):
            for hops, message in self.coming.pop(number):
                self._add(hops, message)

    def _add(self, hops: tuple[Hop, ...], message: Message) -> None:
        for hop, rows in hop_rows(hops):
            if hop.owner == self.rank:
                mine, totals = self.rows.of(hop.span), (self.dk, self.dv)
            else:
                _, part, mine = self.parts[hop.piece]
                totals = part.tensors
            for total, came in zip(totals, message.tensors, strict=True):
                rows_of(total, mine).add_(rows_of(came, rows))

    def _pack(self, hops: tuple[Hop, ...]) -> Message:
        together, message, _ = self.parts[hops[0].piece]
        whole = together == hops and self.wire == self.dk.dtype
        packed = message if whole else self._message(hops, self.wire)
        for hop, target in hop_rows(hops):
            _, message, rows = self.parts.pop(hop.piece)
            if not whole:
                for mine, part in zip(packed.tensors, message.tensors, strict=True):
                    rows_of(mine, target).copy_(rows_of(part, rows))
        return packed


def ended(flying: dict[int, list[Pending]], last: float) -> Iterator[int]:
    """Wait for what flies, step by step up to ``last``; yield each step whose transfers have ended."""
    for number in sorted(flying):
        if number <= last:
            for pending in flying.pop(number):
                pending.wait()
            yield number


class LocalRows:
    """Where a global span lies among the rows this rank holds."""

    def __init__(self, spans: tuple[Span, ...]) -> None:
        self.spans = spans

    def of(self, span: Span) -> Span:
        """Return the local rows of a global span."""
        row = 0
        for held in self.spans:
            if held.start <= span.start and span.stop <= held.stop:
                return Span(row + span.start - held.start, row + span.stop - held.start)
            row += held.size
        raise AssertionError(f"{span} is not held here: {self.spans}")


def hop_rows(hops: tuple[Hop, ...]) -> Iterable[tuple[Hop, Span]]:
    """Yield each hop with its rows in a message that holds them end to end."""
    row = 0
    for hop in hops:
        yield hop, Span(row, row + hop.span.size)
        row += hop.span.size


def rows_in(hops: tuple[Hop, ...]) -> int:
    """Return the rows of a message with these hops."""
    return sum(hop.span.size for hop in hops)


def _key(arrival: Arrival) -> tuple[int, int, int]:
    return arrival.step, arrival.depart, arrival.peer


def note_of(hops: tuple[Hop, ...]) -> int:
    """Return a digest of what a message holds, for the check in debug mode."""
    return crc32(repr([(hop.owner, *hop.span) for hop in hops]).encode())


def like(x: Tensor, rows: int, dtype: torch.dtype) -> list[Spec]:
    """Return the specs of keys and values: ``rows`` rows with the batch, heads and head dim of x [B, n, G, D]."""
    shape = (x.shape[0], rows, *x.shape[2:])
    return [(shape, dtype), (shape, dtype)]


def rows_of(x: Tensor, span: Span) -> Tensor:
    """Return a view of rows ``span`` of x [B, n, ...]."""
    return x.narrow(1, span.start, span.stop - span.start)
