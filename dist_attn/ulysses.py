"""Ulysses attention: each rank gives its rows of most heads for all rows of a few, and gives results back.

One round of messages each way, straight from rank to rank: uneven shares fall out, and a rank's own part is never sent.
KV heads go to every rank whose query heads use them; where several do, their gradients are summed at the owner, in the
order of the ranks. On a 2-D mesh the exchange is within a node, and another executor attends between the nodes.
Jacobs et al. 2023 (arXiv 2309.14509, section 3); with a ring between nodes, Fang & Zhao 2024 (arXiv 2405.07719).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringspan.dist_attn import local
from ringspan.dist_attn.exchange import Exchange
from ringspan.dist_attn.executor import Attended, Executor, Wiring
from ringspan.dist_attn.heads import Deal
from ringspan.dist_attn.local import put_rows, take_rows
from ringspan.dist_attn.message import Message, Spec
from ringspan.dist_attn.problem import Problem
from ringspan.dist_attn.ulysses_plan import deals, inner_problem, places_of, rows_of
from ringspan.kernels.mask import Span
from ringspan.kernels.select import Backend
from ringspan.kernels.state import Gradients, Saved

FORWARD, HOME, BACKWARD, GRADIENTS = 7, 8, 9, 10  # kinds of rounds; part of a message's round id

InnerExecutor = Callable[[Problem, Wiring, Backend, float], Executor]


@dataclass(frozen=True)
class Ulysses:
    """The executor of one rank.

    Args:
        exchange: over the ranks of the node; place: this rank's among them.
        deals: the heads of each place.
        rows, keys: where each place's query and key rows lie among the node's.
        inner: attends with the node's rows and this place's heads.
        home: dtype of results on their way back.
    """

    problem: Problem
    exchange: Exchange
    place: int
    deals: tuple[Deal, ...]
    rows: tuple[tuple[Span, ...], ...]
    keys: tuple[tuple[Span, ...], ...]
    inner: Executor
    home: torch.dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Attend; out is rounded to the inputs' dtype once, before it comes home. Keeps q, k, v by heads."""
        given = [[*_pick([q], each.queries), *_pick([k, v], each.keys)] for each in self.deals]
        q_heads, *kv = self._to_heads(FORWARD, given, 1)
        k_heads, v_heads = (self._repeat(x) for x in kv)
        out, lse, rest = self.inner.forward(q_heads, k_heads, v_heads)
        out = out.to(self.home)
        sizes = [len(each.queries) for each in self.deals]
        batch, length, _, dim = q.shape
        wanted = [[((batch, length, n, dim), out.dtype), ((batch, length, n), lse.dtype)] for n in sizes]
        parts = self._swap(HOME, [[take_rows(x, rows) for x in (out, lse)] for rows in self.rows], wanted)
        out, lse = (torch.cat(each, 2) for each in zip(*parts, strict=True))
        return Attended(out, lse, () if self.problem.keep else (q_heads, k_heads, v_heads, *rest))

    def backward(self, saved: Saved, k: Tensor, v: Tensor, rest: tuple[Tensor, ...]) -> Gradients:
        """Return dq in the inputs' dtype, dk and dv in the accumulator's; without ``rest`` q, k, v travel again."""
        slopes = [saved.dout.to(saved.q.dtype), saved.lse, saved.delta]
        queries, keys = (slopes, []) if rest else ([*slopes, saved.q], [k, v])
        given = [[*_pick(queries, each.queries), *_pick(keys, each.keys)] for each in self.deals]
        dout, lse, delta, *travelled = self._to_heads(BACKWARD, given, len(queries))
        if rest:
            q_heads, k_heads, v_heads, *rest_inner = rest
        else:
            q_heads, *kv = travelled
            k_heads, v_heads = (self._repeat(x) for x in kv)
            rest_inner = []
        # What the backward needs of out is delta alone: with an out of zeros and -delta for lse's gradient,
        # rowsum(dout * out) - dlse is delta, and out need not travel.
        mine = Saved(q_heads, torch.zeros_like(q_heads), lse, dout, -delta)
        return self._gradients(self.inner.backward(mine, k_heads, v_heads, tuple(rest_inner)), saved.q, k)

    def _to_heads(self, kind: int, given: list[list[Tensor]], queries: int) -> list[Tensor]:
        """Give each place its heads of this rank's rows; return all rows of this place's heads, ascending.

        Args:
            given: for each place; the first ``queries`` tensors by query rows, the others by key rows.
        """
        sides = [self.rows if index < queries else self.keys for index in range(len(given[0]))]
        own = given[self.place]
        shape = lambda x, rows: (x.shape[0], _size(rows), *x.shape[2:])  # noqa: E731
        places = range(len(self.deals))
        wanted = [[(shape(x, side[p]), x.dtype) for x, side in zip(own, sides, strict=True)] for p in places]
        parts = self._swap(kind, given, wanted)
        found = []
        for index, (x, side) in enumerate(zip(own, sides, strict=True)):
            whole = x.new_empty((x.shape[0], sum(map(_size, side)), *x.shape[2:]))
            for rows, part in zip(side, parts, strict=True):
                put_rows(whole, rows, part[index])
            found.append(whole)
        return found

    def _gradients(self, found: Gradients, q: Tensor, k: Tensor) -> Gradients:
        """Bring gradients by heads home, and sum those of KV heads that several places use."""
        mine = self.deals[self.place]
        dq, dk, dv = found.dq.to(q.dtype), self._join(found.dk), self._join(found.dv)
        given = []
        for place, (rows, keys) in enumerate(zip(self.rows, self.keys, strict=True)):
            partial = dk.dtype if place == self.place else self.problem.wired
            sole = [take_rows(x, keys).to(k.dtype) for x in _pick([dk, dv], mine.sole, mine.keys.start)]
            shared = [take_rows(x, keys).to(partial) for x in _pick([dk, dv], mine.shared, mine.keys.start)]
            given.append([take_rows(dq, rows), *sole, *shared])
        batch, _, _, dim = q.shape
        wanted = []
        for each in self.deals:
            sole, shared = (((batch, k.shape[1], len(heads), dim)) for heads in (each.sole, each.shared))
            queries = ((batch, q.shape[1], len(each.queries), dim), q.dtype)
            wanted.append([queries, *[(sole, k.dtype)] * 2, *[(shared, self.problem.wired)] * 2])
        parts = self._swap(GRADIENTS, given, wanted)
        totals = [torch.zeros_like(k, dtype=self.problem.wide) for _ in range(2)]
        for each, (_, *slopes) in zip(self.deals, parts, strict=True):
            for index, part in enumerate(slopes):
                heads = each.sole if index < 2 else each.shared
                for at, head in enumerate(heads):
                    totals[index % 2][:, :, head] += part[:, :, at]
        return Gradients(torch.cat([part[0] for part in parts], 2), *totals)

    def _swap(self, kind: int, given: list[list[Tensor]], wanted: Sequence[Sequence[Spec]]) -> list[list[Tensor]]:
        """Send ``given[p]`` to each place p; return what each place sends here, this rank's own as it is.

        Args:
            wanted: shapes and dtypes of what comes from each place. What has no bytes is not sent.
        """
        device = given[self.place][0].device
        sends: list[tuple[int, Message]] = []
        receives: list[tuple[int, Message]] = []
        found = list(given)
        for peer in (peer for peer in range(len(self.deals)) if peer != self.place):
            leaving = self.exchange.message([(x.shape, x.dtype) for x in given[peer]], device)
            for target, x in zip(leaving.tensors, given[peer], strict=True):
                target.copy_(x)
            coming = self.exchange.message(wanted[peer], device)
            found[peer] = list(coming.tensors)
            sends += [(peer, leaving)] if leaving.payload_bytes else []
            receives += [(peer, coming)] if coming.payload_bytes else []
        self.exchange.post(kind << 24, sends, receives).wait()
        return found

    def _repeat(self, x: Tensor) -> Tensor:
        """Return keys or values with each KV head as often as the kernel calls have it."""
        mine = self.deals[self.place]
        if mine.local == tuple(mine.keys):
            return x
        return x[:, :, [head - mine.keys.start for head in mine.local]]

    def _join(self, x: Tensor) -> Tensor:
        """Sum the gradients of a KV head that the kernel calls have several times, in their order."""
        mine = self.deals[self.place]
        if mine.local == tuple(mine.keys):
            return x
        total = x.new_zeros(*x.shape[:2], len(mine.keys), x.shape[3], dtype=self.problem.wide)
        for at, head in enumerate(mine.local):
            total[:, :, head - mine.keys.start] += x[:, :, at]
        return total


def executor(
    problem: Problem,
    wiring: Wiring,
    kernel: Backend,
    scale: float,
    *,
    inner_executor: InnerExecutor | None = None,
) -> Executor:
    """Return the executor of one rank.

    Args:
        inner_executor: attends between the nodes of a 2-D mesh; None: all ranks are one node.
    """
    places = places_of(problem, inner_executor is not None)
    node, place = divmod(wiring.rank, places)
    exchange = wiring.flat if inner_executor is None else wiring.inner
    inside = inner_problem(problem, places, place)
    if inner_executor is None:
        inner: Executor = local.executor(inside, Wiring(node), kernel, scale)
    else:
        inner = inner_executor(inside, Wiring(node, flat=wiring.outer), kernel, scale)
    if exchange is None:
        return inner
    ranks = range(node * places, (node + 1) * places)
    rows, keys = (
        tuple(rows_of(layout, problem.world, problem.length, rank, places) for rank in ranks)
        for layout in (problem.layout, problem.kv_layout)
    )
    # Results that sinks are still joined to would be rounded twice.
    home = problem.wide if problem.sinks else problem.dtype
    return Ulysses(problem, exchange, place, deals(problem, places), rows, keys, inner, home)


def _pick(tensors: Sequence[Tensor], heads: Sequence[int], first: int = 0) -> list[Tensor]:
    """Return these heads, counted from ``first``, of [B, L, heads, ...]; a view where they are neighbours."""
    if not heads:
        return [x[:, :, :0] for x in tensors]
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return [x[:, :, heads[0] - first : heads[0] - first + len(heads)] for x in tensors]
    return [x[:, :, [head - first for head in heads]] for x in tensors]


def _size(rows: Sequence[Span]) -> int:
    return sum(span.size for span in rows)
