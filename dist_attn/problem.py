"""What is to be computed, for all ranks: the values that every plan derives from. No process group, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.pairs import missing
from ringspan.kernels.mask import Span
from ringspan.kernels.parts import Part


@dataclass(frozen=True)
class Problem:
    """One call of attention over ``world`` ranks.

    Args:
        parts: batch rows and KV heads that share one mask, in a fixed order (``kernels.parts.parts_of``).
        batch: batch rows; length: global tokens.
        layout: who holds which queries; kv_layout: who holds which keys and values.
        mesh: (world,), or (nodes, ranks in a node): rank = node * ranks in a node + place in it.
        heads, kv_heads, head_dim: of q and of k, v, as every rank holds them.
        dtype: of q, k and v.
        wire: dtype of dK and dV on their way; None: the accumulator's (fp32, fp64 for fp64).
        keep: the caller keeps (out, lse) and the forward does not run again before the backward, which therefore has
            nothing but this rank's q, k, v, out and lse.
        sinks: a learned sink is joined to the results, which therefore stay in the accumulator's dtype until then.
        first_kv_head, total_kv_heads: where these KV heads stand among the model's.
    """

    parts: tuple[Part, ...]
    batch: int
    length: int
    layout: Layout
    kv_layout: Layout
    mesh: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    wire: torch.dtype | None = None
    keep: bool = False
    sinks: bool = False
    first_kv_head: int = 0
    total_kv_heads: int | None = None

    @property
    def world(self) -> int:
        """Ranks that share the sequence."""
        return self.mesh[0] if len(self.mesh) == 1 else self.mesh[0] * self.mesh[1]

    @property
    def ratio(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def wide(self) -> torch.dtype:
        """The accumulator's dtype."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def wired(self) -> torch.dtype:
        """The dtype of dK and dV on their way."""
        return self.wide if self.wire is None else self.wire

    def spans(self, rank: int) -> tuple[Span, ...]:
        """Return the query spans that ``rank`` holds."""
        return self.layout.spans(rank, self.world, self.length)

    def kv_spans(self, rank: int) -> tuple[Span, ...]:
        """Return the key spans that ``rank`` holds."""
        return self.kv_layout.spans(rank, self.world, self.length)

    def lower_bound(self, rank: int) -> int:
        """Return the fewest payload bytes of keys and values that ``rank`` must receive while queries stay."""
        queries, held = self.spans(rank), self.kv_spans(rank)
        needs = ((part, missing(part.mask, queries, held, self.length)) for part in self.parts)
        rows = sum(span.size * part.share for part, spans in needs for span in spans)
        return rows * 2 * self.head_dim * self.dtype.itemsize
