"""Batch rows and heads that share one mask: what a call is taken apart into before any kernel sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringspan.kernels.mask import Mask, batch_rows, by_head


@dataclass(frozen=True)
class Part:
    """Neighbouring batch rows, and KV heads of them (None: all), that share one mask.

    Args:
        groups: KV heads of the whole call, so that a tensor of query heads can be told apart by its size.
    """

    rows: slice
    heads: tuple[int, ...] | None
    groups: int
    mask: Mask

    def __hash__(self) -> int:
        """Slices have no hash before Python 3.12."""
        return hash((self.rows.start, self.rows.stop, self.heads, self.groups, self.mask))

    @property
    def share(self) -> int:
        """How many KV heads this part has, over all of its batch rows."""
        return (self.rows.stop - self.rows.start) * (self.groups if self.heads is None else len(self.heads))

    def take(self, x: Tensor) -> Tensor:
        """Return this part of [B, L, heads, ...]; a view where all heads share the mask, else a copy."""
        part = x[self.rows]
        return part if self.heads is None else part.index_select(2, self._index(x))

    def put(self, total: Tensor, part: Tensor) -> None:
        """Write this part back into [B, L, heads, ...]; nothing to do where ``take`` gave a view of it."""
        if self.heads is not None:
            total[self.rows].index_copy_(2, self._index(total), part.to(total.dtype))

    def _index(self, x: Tensor) -> Tensor:
        assert self.heads is not None
        ratio = x.shape[2] // self.groups  # 1 for keys; query heads per KV head for queries
        heads = torch.tensor(self.heads, device=x.device)
        return (heads[:, None] * ratio + torch.arange(ratio, device=x.device)).flatten()


def parts_of(
    mask: Mask | Sequence[Mask], batch: int, groups: int, first_kv_head: int = 0, total_kv_heads: int | None = None
) -> tuple[Part, ...]:
    """Take a call apart into parts with one mask each, in a fixed order.

    Args:
        mask: one for all batch rows, or one per row.
        batch, groups: batch rows and KV heads of this call.
        first_kv_head, total_kv_heads: where these KV heads stand among the model's.

    Raises:
        ValueError: if masks and rows, or a mask's heads and the model's, do not fit.
    """
    total = first_kv_head + groups if total_kv_heads is None else total_kv_heads
    masks = batch_rows(mask, batch)
    parts: list[Part] = []
    start = 0
    for row in range(1, batch + 1):
        if row == batch or masks[row] != masks[start]:
            patterns = by_head(masks[start], first_kv_head, groups, total)
            for heads, plain in patterns:
                parts.append(Part(slice(start, row), heads if len(patterns) > 1 else None, groups, plain))
            start = row
    return tuple(parts)
