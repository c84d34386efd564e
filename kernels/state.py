"""What a backend adds into and reads from: running results of the forward, running gradients, saved rows.

Every backend adds into these in place, so that the same code serves one call over all keys and a ring's call per
arrival. Sums are in fp32 (fp64 for fp64), and in the order of the calls: bitwise repeatable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringspan.kernels.mask import Span
from ringspan.kernels.merge import merge
from ringspan.kernels.parts import Part


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which partial results and gradients are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Running:
    """Softmax results over the keys met so far: out [B, M, H, D] and lse [B, M, H]; rows without a key: 0 and -inf.

    ``touched`` has a byte per row, 1 where a partial result was added, so that the first is stored instead of merged.
    ``alone`` says that a single call gives all the keys the rows ever meet, and that its result is cast to the inputs'
    dtype in the end: a backend may then round where a row has a single partial result.
    """

    out: Tensor
    lse: Tensor
    touched: bytearray
    alone: bool = False

    @classmethod
    def like(cls, q: Tensor, *, alone: bool = False) -> Running:
        """Return the empty result for queries [B, M, H, D]."""
        wide = accumulator(q.dtype)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
        return cls(torch.zeros(q.shape, dtype=wide, device=q.device), lse, bytearray(q.shape[1]), alone)

    @property
    def fresh(self) -> bool:
        """Whether nothing was added yet."""
        return self.touched.find(1) < 0

    def touch(self, rows: Span) -> None:
        """Note that a kernel has written these rows itself."""
        self.touched[rows.start : rows.stop] = b"\1" * rows.size

    def add(self, rows: Span, out: Tensor, lse: Tensor) -> None:
        """Merge a partial result for a span of rows: out [B, m, H, D], lse [B, m, H], over keys not met before."""
        mine, mine_lse = self.out[:, rows.start : rows.stop], self.lse[:, rows.start : rows.stop]
        if self.touched.find(1, rows.start, rows.stop) < 0:
            mine.copy_(out)
            mine_lse.copy_(lse)
        else:
            merge(mine, mine_lse, out.to(mine.dtype), lse)
        self.touch(rows)


class Gradients(NamedTuple):
    """Running gradients in the accumulator's dtype: dq [B, M, H, D], dk and dv [B, N, G, D]."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


@dataclass(frozen=True)
class Saved:
    """What the backward of some keys reads of its query rows, all of them from the finished forward.

    Args:
        q, dout: [B, M, H, D] in the inputs' dtype; out: the same, the final result (sinks joined), any float dtype.
        lse: [B, M, H] final (sinks joined), in the accumulator's dtype; dlse: its gradient, or None.
    """

    q: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None = None
    cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # a backend's own prepared operands

    @cached_property
    def delta(self) -> Tensor:
        """rowsum(dout * out) - dlse: [B, M, H]; the one number per row that a tile's backward needs besides lse."""
        delta = (self.dout.to(self.lse.dtype) * self.out.to(self.lse.dtype)).sum(-1)
        return delta if self.dlse is None else delta - self.dlse

    def part(self, part: Part) -> Saved:
        """Return the rows and heads of a part; all of them give this very value, so that ``cache`` is shared."""
        if part.heads is None and part.rows == slice(0, self.q.shape[0]):
            return self
        mine = (part.take(x) for x in (self.q, self.out, self.lse, self.dout))
        return Saved(*mine, dlse=None if self.dlse is None else part.take(self.dlse))
