"""All-gather attention: K and V of some KV heads come from all ranks at once, and each query meets them in one call.

The next heads' keys travel while this group is computed. One softmax and no merging, at the price of memory for all
keys of a group; ``gather_plan.head_groups`` bounds it. The backward gathers again; dK and dV go
straight home. Gathering keys before the softmax is Llama 3's context parallelism (arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ringspan.dist_attn.exchange import Exchange, Pending
from ringspan.dist_attn.executor import Attended, Wiring
from ringspan.dist_attn.gather_plan import head_groups, largest
from ringspan.dist_attn.heads import parts_for
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.local import Alone, empty, take_rows
from ringspan.dist_attn.message import Message
from ringspan.dist_attn.problem import Problem
from ringspan.kernels.mask import Span
from ringspan.kernels.select import Backend
from ringspan.kernels.state import Gradients, Saved

GRADIENTS = 2  # kind of rounds; part of a message's round id


class Gather:
    """The executor of one rank. K and V of a group travel in one tensor [rows, 2, B, heads, D]."""

    def __init__(
        self,
        problem: Problem,
        rank: int,
        exchange: Exchange | None,
        kernel: Backend,
        scale: float,
        head_group: int | None,
    ) -> None:
        self.problem, self.rank, self.exchange, self.kernel, self.scale = problem, rank, exchange, kernel, scale
        self.groups = head_groups(problem, head_group)
        self.spans, self.share = problem.spans(rank), largest(problem)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Attend; out in the accumulator's dtype. Nothing is kept for the backward."""
        out, lse = empty(q, self.problem.wide)
        for group, keys, values in self._walk(k, v, "forward"):
            mine = self._queries(group)
            self._calls(group).forward(out[:, :, mine], lse[:, :, mine], q[:, :, mine], keys, values)
        return Attended(out, lse)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, rest: tuple[Tensor, ...]) -> Gradients:
        """Return dq, dk, dv in the accumulator's dtype."""
        del rest
        wide = self.problem.wide
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (saved.q, k, v))
        returns = Returns(self.problem, self.rank, self.exchange, dk, dv)
        for number, (group, keys, values) in enumerate(self._walk(k, v, "backward")):
            mine = self._queries(group)
            sums = torch.zeros((2, *keys.shape), dtype=wide, device=k.device)
            self._calls(group).backward(Gradients(dq[:, :, mine], sums[0], sums[1]), _heads(saved, mine), keys, values)
            returns.post(number, group, sums)
        returns.finish()
        return Gradients(dq, dk, dv)

    def _walk(self, k: Tensor, v: Tensor, name: str) -> Iterator[tuple[range, Tensor, Tensor]]:
        """Yield each group with its keys and values [B, length, heads, D], all rows ascending."""
        coming = self._post(self.groups[0], k, v, name)
        for number, group in enumerate(self.groups):
            both, pending = coming
            if pending is not None:
                pending.wait()
            if number + 1 < len(self.groups):
                coming = self._post(self.groups[number + 1], k, v, name)
            if self.exchange is not None and (order := self._order(k.device)) is not None:
                both = both.index_select(0, order)
            yield group, both[:, 0].transpose(0, 1), both[:, 1].transpose(0, 1)

    def _post(self, group: range, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Pending | None]:
        """Start gathering a group: [world * share, 2, B, heads, D]."""
        heads = slice(group.start, group.stop)
        rows = self.share if self.exchange else k.shape[1]
        packed = k.new_empty(rows, 2, k.shape[0], len(group), k.shape[3])
        for both, x in zip(packed.unbind(1), (k, v), strict=True):
            both[: k.shape[1]] = x[:, :, heads].transpose(0, 1)
        packed[k.shape[1] :].zero_()
        if self.exchange is None or not packed.numel():
            return packed, None
        whole, pending = self.exchange.all_gather(packed, f"{name} gather of KV heads {group.start}:{group.stop}")
        return whole.flatten(0, 1), pending

    def _order(self, device: torch.device) -> Tensor | None:
        return order_of(self.problem.kv_layout, self.problem.world, self.problem.length, device)

    def _queries(self, group: range) -> slice:
        return slice(group.start * self.problem.ratio, group.stop * self.problem.ratio)

    def _calls(self, group: range) -> Alone:
        everything = (Span(0, self.problem.length),) if self.problem.length else ()
        return Alone(parts_for(self.problem.parts, group), self.spans, everything, self.kernel, self.scale)


class Returns:
    """Takes dK and dV of each group home while the next one is computed, and sums them in the order of the ranks.

    Messages, not a collective: those of gloo reduce all and drop the rest, and any sums in the dtype of the wire.

    Args:
        dk, dv: [B, l, G, D], this rank's rows, zeros to be added to.
    """

    def __init__(self, problem: Problem, rank: int, exchange: Exchange | None, dk: Tensor, dv: Tensor) -> None:
        self.problem, self.rank, self.exchange, self.dk, self.dv = problem, rank, exchange, dk, dv
        self.coming: tuple[range, list[Tensor], Pending | None] | None = None

    def post(self, number: int, group: range, sums: Tensor) -> None:
        """Start sending [2, B, length, heads, D] to its owners; the group before is waited for."""
        parts, pending = [take_rows(sums.flatten(0, 1), self.problem.kv_spans(self.rank))], None
        if self.exchange is not None:
            parts, pending = self._send(number, sums.flatten(0, 1), parts[0])
        self.finish()
        self.coming = group, parts, pending

    def _send(self, number: int, sums: Tensor, own: Tensor) -> tuple[list[Tensor], Pending]:
        assert self.exchange is not None
        parts: list[Tensor] = []
        sends: list[tuple[int, Message]] = []
        receives: list[tuple[int, Message]] = []
        for peer in range(self.problem.world):
            if peer == self.rank:
                parts.append(own)
                continue
            theirs = take_rows(sums, self.problem.kv_spans(peer))
            leaving = self.exchange.message([(theirs.shape, self.problem.wired)], sums.device)
            leaving.first.copy_(theirs)
            coming = self.exchange.message([(own.shape, self.problem.wired)], sums.device)
            parts.append(coming.first)
            sends += [(peer, leaving)] if leaving.payload_bytes else []
            receives += [(peer, coming)] if coming.payload_bytes else []
        return parts, self.exchange.post(number << 32 | GRADIENTS << 24, sends, receives)

    def finish(self) -> None:
        """Wait for the group on its way, and add it up."""
        if self.coming is None:
            return
        group, parts, pending = self.coming
        if pending is not None:
            pending.wait()
        for part in parts:
            for total, mine in zip((self.dk, self.dv), part.unflatten(0, (2, -1)), strict=True):
                total[:, :, group.start : group.stop] += mine
        self.coming = None


def executor(
    problem: Problem,
    wiring: Wiring,
    kernel: Backend,
    scale: float,
    *,
    head_group: int | None = None,
) -> Gather:
    """Return the executor of one rank.

    Args:
        kernel: asked for each call again (each call is all that its rows meet).
        head_group: KV heads gathered at a time; see ``gather_plan.head_groups``.
    """
    return Gather(problem, wiring.rank, wiring.flat, kernel, scale, head_group)


@lru_cache(maxsize=8)
def order_of(layout: Layout, world: int, length: int, device: torch.device) -> Tensor | None:
    """Return for each position where its row lies when each rank's, padded to the largest share, stand in rank order.

    [length] int64; None where they lie in ascending order.
    """
    spans = [layout.spans(rank, world, length) for rank in range(world)]
    share = max(sum(span.size for span in held) for held in spans)
    order = np.zeros(length, dtype=np.int64)
    for rank, held in enumerate(spans):
        positions = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(a, b) for a, b in held)])
        order[positions] = rank * share + np.arange(len(positions))
    if world * share == length and bool((order == np.arange(length)).all()):
        return None
    return torch.from_numpy(order).to(device)


def _heads(saved: Saved, mine: slice) -> Saved:
    each = (x[:, :, mine] for x in (saved.q, saved.out, saved.lse, saved.dout))
    return Saved(*each, dlse=None if saved.dlse is None else saved.dlse[:, :, mine])
