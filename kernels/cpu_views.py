"""Where tiles of one shape lie in memory: views of their rows, or copies where rows have no even step.

Query heads that share a KV head are computed as more rows of one head: row m's R heads are the folded rows m * R to
m * R + R - 1. So a tile of few rows is still a large product, and dK and dV are summed over these heads within it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ringspan.kernels.masks.span import Span
from ringspan.kernels.merge import merge


class Rows:
    """A tensor of query rows, [B, M, H, ...], in the two layouts that tiles take it in.

    Args:
        x: [B, M, H, D] or [B, M, H].
        groups: KV heads.
    """

    def __init__(self, x: Tensor, groups: int) -> None:
        self.plain = by_heads(x)
        self.groups = groups

    @cached_property
    def folded(self) -> Tensor:
        """[B, M * R, G, ...]: the heads of a KV head as rows, each KV head's rows one after the other in memory."""
        x = self.plain.unflatten(2, (self.groups, -1))
        return x.transpose(1, 2).contiguous().flatten(2, 3).transpose(1, 2)

    def part(self, index: Tensor) -> Rows:
        """Return some rows, in the order of an index."""
        return Rows(self.plain[:, index], self.groups)


def by_heads(x: Tensor) -> Tensor:
    """Return [B, L, heads, ...] as it is, each head's rows one after the other in memory.

    The operator is a tenth slower on rows that lie apart.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def take(x: Tensor, starts: Sequence[int], size: int) -> Tensor:
    """Return ``size`` rows from each start: [T, size, ...] of x [B, L, ...], where B or the number of starts is 1.

    A view where the starts have a common step, else a copy.
    """
    if len(starts) == 1:
        return x[:, starts[0] : starts[0] + size]
    step = _step(starts, size)
    if step is None:
        return x[0].index_select(0, _index(tuple(starts), size)).unflatten(0, (len(starts), size))
    return x[0, starts[0] : starts[-1] + size].unfold(0, size, step).movedim(-1, 1)


def add(x: Tensor, starts: Sequence[int], value: Tensor) -> None:
    """Add [T, size, ...] to rows of x [B, L, ...]: disjoint ones, or windows with a common step that overlap."""
    size = value.shape[1]
    step = _step(starts, size)
    if step is None:
        index = _index(tuple(starts), size)
        x[0].index_copy_(0, index, x[0].index_select(0, index).add_(value.flatten(0, 1)))
        return
    for start in range(0, size, step):  # rows of a window that no other window holds at the same place
        stop = min(start + step, size)
        take(x, [s + start for s in starts], stop - start).add_(value[:, start:stop])


def combine(out: Tensor, lse: Tensor, starts: Sequence[int], part_out: Tensor, part_lse: Tensor, fresh: bool) -> None:
    """Merge [T, size, ...] into disjoint rows of out [B, L, ...] and lse [B, L, ...]; ``fresh``: store instead."""
    size = part_lse.shape[1]
    mine, mine_lse = take(out, starts, size), take(lse, starts, size)
    if fresh:
        mine.copy_(part_out)
        mine_lse.copy_(part_lse)
    else:
        merge(mine, mine_lse, part_out, part_lse)
    if _step(starts, size) is None:  # they are copies
        index = _index(tuple(starts), size)
        out[0].index_copy_(0, index, mine.flatten(0, 1))
        lse[0].index_copy_(0, index, mine_lse.flatten(0, 1))


def take_keys(x: Tensor, starts: Sequence[int], width: int, hole: Span) -> Tensor:
    """Return the columns from each start without a hole: [T, width - hole, G, D]."""
    found = [take(x, begin, size) for begin, size in _beside(starts, width, hole)]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def add_keys(x: Tensor, starts: Sequence[int], width: int, hole: Span, value: Tensor) -> None:
    """Add to the columns that ``take_keys`` returns."""
    sizes = [size for _, size in _beside(starts, width, hole)]
    for (begin, _), part in zip(_beside(starts, width, hole), value.split(sizes, 1), strict=True):
        add(x, begin, part)


def _beside(starts: Sequence[int], width: int, hole: Span) -> list[tuple[Sequence[int], int]]:
    if not hole.size:
        return [(starts, width)]
    return [(starts, hole.start), ([start + hole.stop for start in starts], width - hole.stop)]


def _step(starts: Sequence[int], size: int) -> int | None:
    """Return the common step from start to start, None where there is none; ``size`` for a single start."""
    if len(starts) == 1:
        return size
    step = starts[1] - starts[0]
    return step if all(b - a == step for a, b in zip(starts, starts[1:], strict=False)) else None


@lru_cache(maxsize=256)
def _index(starts: tuple[int, ...], size: int) -> Tensor:
    return (torch.tensor(starts)[:, None] + torch.arange(size)).flatten()
