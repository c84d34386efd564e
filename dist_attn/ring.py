"""Ring self-attention: keys and values travel, queries stay; exact, forward and backward.

One executor for every mask, layout and route: it follows a rank's steps, starts later steps' transfers, computes this
step's keys while they run, and adds results in the plan's order. The backward walks the same steps: K and V leave bare,
dK and dV start at the first rank that needs a piece, follow behind it, and go home to its owner.
Ring attention is Liu et al. 2023 (arXiv 2310.01889, section 3); the per-pair backward from the final lse is
FlashAttention-2's (arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringspan.dist_attn.courier import BACKWARD, FORWARD, GRADIENTS, Channels, Courier, Returns
from ringspan.dist_attn.executor import Attended, Wiring
from ringspan.dist_attn.local import empty
from ringspan.dist_attn.problem import Problem
from ringspan.dist_attn.ring_plan import schedules
from ringspan.dist_attn.schedule import Schedule
from ringspan.kernels.parts import Part
from ringspan.kernels.select import Backend
from ringspan.kernels.state import Gradients, Running, Saved, accumulator
from ringspan.kernels.work import Work


@dataclass(frozen=True)
class Ring:
    """The ring on one rank: its schedules by batch rows and heads, its channels and its kernel."""

    parts: tuple[tuple[Part, Schedule], ...]
    rank: int
    channels: Channels | None
    scale: float
    kernel: Backend
    wire: torch.dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Return out and lse of this rank's queries over all keys."""
        out, lse = empty(q, accumulator(q.dtype))
        for number, (part, schedule) in enumerate(self.parts):
            total = Running(part.take(out), part.take(lse), bytearray(q.shape[1]), alone=self.channels is None)
            base, mine = (number << 32) | (FORWARD << 24), part.take(q)
            courier = Courier(self.channels, self.rank, base, schedule.kv_spans(self.rank), part.take(k), part.take(v))
            for _, landed in courier.walk(schedule.steps(self.rank)):
                for arrival, keys, values in landed:
                    self.kernel.forward(total, mine, keys, values, arrival.work, scale=self.scale)
            part.put(out, total.out)
            part.put(lse, total.lse)
        return Attended(out, lse)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, rest: tuple[Tensor, ...]) -> Gradients:
        """Return dq, dk, dv of this rank's rows, over all ranks."""
        del rest
        wide = accumulator(k.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (saved.q, k, v))
        for number, (part, schedule) in enumerate(self.parts):
            total = Gradients(part.take(dq), part.take(dk), part.take(dv))
            self._backward_part(number, schedule, saved.part(part), part.take(k), part.take(v), total)
            for whole, piece in zip((dq, dk, dv), total, strict=True):
                part.put(whole, piece)
        return Gradients(dq, dk, dv)

    def _backward_part(
        self, number: int, schedule: Schedule, saved: Saved, k: Tensor, v: Tensor, total: Gradients
    ) -> None:
        spans = schedule.kv_spans(self.rank)
        courier = Courier(self.channels, self.rank, (number << 32) | (BACKWARD << 24), spans, k, v)
        base = (number << 32) | (GRADIENTS << 24)
        returns = Returns(self.channels, self.rank, base, spans, total.dk, total.dv, self.wire)
        first, *second = schedule.own_halves(self.rank)
        for step, landed in courier.walk(schedule.steps(self.rank)):
            for arrival, keys, values in landed:
                if arrival is step.own:
                    self._own_keys(first, 0, saved, k, v, total)
                else:
                    mine = Gradients(total.dq, *returns.part(arrival))
                    self.kernel.backward(mine, saved, keys, values, arrival.work, scale=self.scale)
            returns.exchange(step)
            if step.number == schedule.half_after[self.rank]:
                for half in second:  # while the gradients are on their way
                    self._own_keys(half, first.columns, saved, k, v, total)
        returns.finish()

    def _own_keys(self, work: Work, row: int, saved: Saved, k: Tensor, v: Tensor, total: Gradients) -> None:
        """Add the gradients of this rank's own keys from ``row`` on."""
        k, v, dk, dv = (x.narrow(1, row, work.columns) for x in (k, v, total.dk, total.dv))
        self.kernel.backward(Gradients(total.dq, dk, dv), saved, k, v, work, scale=self.scale)


def executor(problem: Problem, wiring: Wiring, kernel: Backend, scale: float, *, double: bool = False) -> Ring:
    """Return the ring over all ranks, or the double ring over nodes and the ranks inside them."""
    parts = tuple(zip(problem.parts, schedules(problem, double=double), strict=True))
    channels = None
    if wiring.flat is not None:
        outer, inner = (wiring.outer, wiring.inner) if double else (None, None)
        channels = Channels(wiring.flat, outer, inner, problem.mesh[-1] if double else 1)
    return Ring(parts, wiring.rank, channels, scale, kernel, problem.wired)
