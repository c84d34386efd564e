"""Attention where all keys that a rank's queries see are on this rank: one kernel call for each part of a call.

What strategies come down to that bring heads or keys together first; as an executor of its own, attention of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ringspan.dist_attn.executor import Attended, Wiring
from ringspan.dist_attn.moves import Integers, Transfers
from ringspan.dist_attn.problem import Problem
from ringspan.kernels.mask import Mask, Span
from ringspan.kernels.parts import Part
from ringspan.kernels.select import Backend
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.work import Work, work

MANY = 16  # spans from which one indexed copy is quicker than a copy for each


@dataclass(frozen=True)
class Alone:
    """Kernel calls for rows that meet all of their keys in one call.

    Args:
        parts: batch rows and KV heads with a mask each, of the tensors given.
        queries, keys: the global positions of their rows, ascending.
        kernel: asked for each call again: its result is cast once, so a kernel that rounds may serve.
        scale: factor on the logits.
    """

    parts: tuple[Part, ...]
    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    kernel: Backend
    scale: float

    def forward(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the results of q [B, M, H, D] over k, v [B, N, G, D] into out (zeros, wide) and lse (-inf)."""
        for part in self.parts:
            total = Running(part.take(out), part.take(lse), bytearray(q.shape[1]), alone=True)
            kernel, each = self._call(part)
            kernel.forward(total, part.take(q), part.take(k), part.take(v), each, scale=self.scale)
            part.put(out, total.out)
            part.put(lse, total.lse)

    def backward(self, total: Gradients, saved: Saved, k: Tensor, v: Tensor) -> None:
        """Add the gradients of these rows and keys to ``total``."""
        for part in self.parts:
            mine = Gradients(*(part.take(x) for x in total))
            kernel, each = self._call(part)
            kernel.backward(mine, saved.part(part), part.take(k), part.take(v), each, scale=self.scale)
            for whole, piece in zip(total, mine, strict=True):
                part.put(whole, piece)

    def _call(self, part: Part) -> tuple[Backend, Work]:
        each = work(part.mask, self.queries, self.keys)
        return self.kernel.alone(each), each


class Local:
    """The executor of a world of one rank."""

    def __init__(self, problem: Problem, kernel: Backend, scale: float) -> None:
        self.problem = problem
        self.calls = Alone(problem.parts, problem.spans(0), problem.kv_spans(0), kernel, scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Attend; out in the accumulator's dtype."""
        out, lse = empty(q, self.problem.wide)
        self.calls.forward(out, lse, q, k, v)
        return Attended(out, lse)

    def backward(self, saved: Saved, k: Tensor, v: Tensor, rest: tuple[Tensor, ...]) -> Gradients:
        """Return dq, dk, dv in the accumulator's dtype."""
        del rest
        total = Gradients(*(torch.zeros_like(x, dtype=self.problem.wide) for x in (saved.q, k, v)))
        self.calls.backward(total, saved, k, v)
        return total


@dataclass(frozen=True)
class LocalMoves:
    """The plan of a world of one rank: nothing moves."""

    problem: Problem

    def transfers(self, *, backward: bool) -> Transfers:
        """Return none."""
        del backward
        return Transfers.of(())

    def areas(self, *, backward: bool = False) -> Integers:
        """Return [1, 1]: all live pairs."""
        del backward
        return np.array([[live(self.problem, self.problem.spans(0))]], dtype=np.int64)


def refuses(problem: Problem) -> str | None:
    """Return one line where there is more than one rank."""
    if problem.world == 1:
        return None
    return f"cannot serve {problem.world} ranks, for it exchanges nothing; take 'ring'"


def moves(problem: Problem) -> LocalMoves:
    """Plan for one rank."""
    return LocalMoves(problem)


def executor(problem: Problem, wiring: Wiring, kernel: Backend, scale: float) -> Local:
    """Return the executor for one rank; nothing of ``wiring`` is used, for there is nobody to reach."""
    del wiring
    return Local(problem, kernel, scale)


def live(problem: Problem, queries: Sequence[Span], heads: Sequence[Part] | None = None) -> int:
    """Return live pairs of some queries with all keys, times query heads and batch rows.

    Args:
        heads: the parts to count; None: all of the problem's.
    """
    parts = problem.parts if heads is None else heads
    return problem.ratio * sum(part.share * _pairs(part.mask, tuple(queries), problem.length) for part in parts)


@lru_cache(maxsize=4096)
def _pairs(mask: Mask, queries: tuple[Span, ...], length: int) -> int:
    return sum(mask.area(q, Span(0, length)) for q in queries)


def empty(q: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return out and lse of rows that have met no key, in the accumulator's dtype."""
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    return torch.zeros(q.shape, dtype=wide, device=q.device), lse


def take_rows(x: Tensor, rows: tuple[Span, ...]) -> Tensor:
    """Return these rows of x [B, L, ...], ascending: a view where they are one span."""
    if len(rows) > MANY:
        return x.index_select(1, _index(rows, x.device))
    each = [x[:, a:b] for a, b in rows]
    return each[0] if len(each) == 1 else torch.cat(each, 1) if each else x[:, :0]


def put_rows(x: Tensor, rows: tuple[Span, ...], piece: Tensor) -> None:
    """Write a piece [B, l, ...] into these rows of x [B, L, ...]."""
    if len(rows) > MANY:
        x.index_copy_(1, _index(rows, x.device), piece.to(x.dtype))
        return
    at = 0
    for a, b in rows:
        x[:, a:b] = piece[:, at : at + b - a]
        at += b - a


@lru_cache(maxsize=64)
def _index(rows: tuple[Span, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([np.arange(a, b) for a, b in rows])).to(device)
