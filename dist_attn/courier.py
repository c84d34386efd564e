"""Moving pieces along a rank's steps: keys and values ahead of the computation, their gradients one round behind it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ringspan.dist_attn.exchange import Exchange, Message, Pending
from ringspan.dist_attn.schedule import Arrival, Hop, Schedule, Step
from ringspan.kernels.mask import Span

FORWARD, BACKWARD, GRADIENTS = 0, 1, 2  # kinds of rounds; part of a message's round id


class Courier:
    """Moves K and V along a rank's steps: the next step's transfers run while this step's tiles are computed."""

    def __init__(
        self, exchange: Exchange | None, rank: int, number: int, kind: int, schedule: Schedule, k: Tensor, v: Tensor
    ) -> None:
        self.exchange, self.rank, self.k, self.v = exchange, rank, k, v
        self.base = (number << 32) | (kind << 24)
        self.rows = _LocalRows(schedule.spans(rank))
        self.messages: list[tuple[Arrival, Message]] = []  # the K, V messages of the step at hand

    def walk(self, steps: tuple[Step, ...]) -> Iterable[tuple[Step, list[tuple[Arrival, Tensor, Tensor]]]]:
        """Yield each step with what has landed for it: (arrival, keys [B, n, G, D], values)."""
        for index, step in enumerate(steps):
            pending, incoming = self._post(steps[index + 1]) if index + 1 < len(steps) else (None, [])
            if step.own:
                yield step, [(step.own, self.k, self.v)]
            else:
                yield (
                    step,
                    [(arrival, message.first, message.second) for arrival, message in self.messages],
                )
            if pending:
                pending.wait()
            self.messages = incoming

    def _post(self, step: Step) -> tuple[Pending, list[tuple[Arrival, Message]]]:
        assert self.exchange is not None, "a plan with messages needs a group"
        incoming = [(arrival, message_like(self.k, arrival.rows, self.k.dtype)) for arrival in step.arrivals]
        sends = [(peer, self._pack(hops)) for peer, hops in step.sends]
        receives = [(arrival.peer, message) for arrival, message in incoming]
        return self.exchange.post(self.base | step.number, sends, receives), incoming

    def _pack(self, hops: tuple[Hop, ...]) -> Message:
        """Return a message with these pieces: own rows, or rows that have just landed."""
        wanted = [(hop.owner, hop.span) for hop in hops]
        for arrival, message in self.messages:
            if [(hop.owner, hop.span) for hop in arrival.hops] == wanted:
                return message  # goes on as it came; only its header is written anew
        message = message_like(self.k, sum(hop.span.size for hop in hops), self.k.dtype)
        row = 0
        for hop in hops:
            keys, values = self._piece(hop)
            target = Span(row, row + hop.span.size)
            rows_of(message.first, target).copy_(keys)
            rows_of(message.second, target).copy_(values)
            row = target.stop
        return message

    def _piece(self, hop: Hop) -> tuple[Tensor, Tensor]:
        if hop.owner == self.rank:
            rows = self.rows.of(hop.span)
            return rows_of(self.k, rows), rows_of(self.v, rows)
        for arrival, message in self.messages:
            for found, rows in _hop_rows(arrival.hops):
                if (found.owner, found.span) == (hop.owner, hop.span):
                    return rows_of(message.first, rows), rows_of(message.second, rows)
        raise AssertionError(f"piece {hop} is not here")


class Returns:
    """Moves dK and dV: along each piece's chain one round behind its K and V, and home from the last rank."""

    def __init__(
        self, exchange: Exchange | None, rank: int, number: int, schedule: Schedule, dk: Tensor, dv: Tensor
    ) -> None:
        self.channel, self.rank, self.dk, self.dv = exchange, rank, dk, dv
        self.base = (number << 32) | (GRADIENTS << 24)
        self.rows = _LocalRows(schedule.spans(rank))
        self.pending: Pending | None = None
        self.incoming: list[tuple[tuple[Hop, ...], Message]] = []

    def exchange(self, step: Step, parts: list[tuple[Arrival, Message]]) -> None:
        """Add what came for this step's pieces to this rank's parts, and start sending the sums on."""
        self._collect(parts)
        if not step.gradients and not step.returns:
            return
        assert self.channel is not None, "a plan with messages needs a group"
        sends = [(peer, self._pack(hops, parts)) for peer, hops in step.gradients]
        self.incoming = [
            (hops, message_like(self.dk, sum(hop.span.size for hop in hops), self.dk.dtype)) for _, hops in step.returns
        ]
        receives = [(peer, message) for (peer, _), (_, message) in zip(step.returns, self.incoming, strict=True)]
        self.pending = self.channel.post(self.base | step.number, sends, receives)

    def finish(self) -> None:
        """Wait for the last round."""
        self._collect([])

    def _collect(self, parts: list[tuple[Arrival, Message]]) -> None:
        if self.pending is None:
            return
        self.pending.wait()
        here = {
            (hop.owner, hop.span): (message, rows)
            for arrival, message in parts
            for hop, rows in _hop_rows(arrival.hops)
        }
        for hops, message in self.incoming:
            for hop, rows in _hop_rows(hops):
                came = rows_of(message.first, rows), rows_of(message.second, rows)
                if hop.owner == self.rank:
                    own = self.rows.of(hop.span)
                    totals = rows_of(self.dk, own), rows_of(self.dv, own)
                else:
                    part, at = here[hop.owner, hop.span]
                    totals = rows_of(part.first, at), rows_of(part.second, at)
                for total, gradient in zip(totals, came, strict=True):
                    total.add_(gradient)
        self.pending, self.incoming = None, []

    def _pack(self, hops: tuple[Hop, ...], parts: list[tuple[Arrival, Message]]) -> Message:
        for arrival, message in parts:
            if arrival.hops == hops:
                return message
        packed = message_like(self.dk, sum(hop.span.size for hop in hops), self.dk.dtype)
        here = {hop: (message, rows) for arrival, message in parts for hop, rows in _hop_rows(arrival.hops)}
        for hop, target in _hop_rows(hops):
            message, rows = here[hop]
            rows_of(packed.first, target).copy_(rows_of(message.first, rows))
            rows_of(packed.second, target).copy_(rows_of(message.second, rows))
        return packed


class _LocalRows:
    """Where a global span lies among the rows this rank holds."""

    def __init__(self, spans: tuple[Span, ...]) -> None:
        self.spans = spans

    def of(self, span: Span) -> Span:
        row = 0
        for held in self.spans:
            if held.start <= span.start and span.stop <= held.stop:
                return Span(row + span.start - held.start, row + span.stop - held.start)
            row += held.size
        raise AssertionError(f"{span} is not held here: {self.spans}")


def _hop_rows(hops: tuple[Hop, ...]) -> Iterable[tuple[Hop, Span]]:
    """Yield each hop with its rows in a message that holds them end to end."""
    row = 0
    for hop in hops:
        yield hop, Span(row, row + hop.span.size)
        row += hop.span.size


def message_like(like: Tensor, rows: int, dtype: torch.dtype) -> Message:
    """Return an empty message of ``rows`` rows with the batch, heads and head dim of ``like`` [B, n, G, D]."""
    return Message(like.shape[0], rows, like.shape[2], like.shape[3], dtype, like.device)


def rows_of(x: Tensor, span: Span) -> Tensor:
    """Return a view of rows ``span`` of x [B, n, ...]."""
    return x.narrow(1, span.start, span.stop - span.start)
