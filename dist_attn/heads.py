"""Which heads a rank computes: query heads dealt to ranks, and a call's parts for some KV heads. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

from ringspan.kernels.parts import Part


@dataclass(frozen=True)
class Deal:
    """The heads of one rank.

    Args:
        queries: its query heads, neighbours.
        keys: the KV heads that these use, each once.
        local: the KV head behind each KV head of its kernel calls. Where the query heads begin or end within a KV
            head's, a KV head stands there several times, so that each serves equally many query heads.
        shared: those of ``keys`` that another rank uses too: their gradients are partial.
    """

    queries: range
    keys: range
    local: tuple[int, ...]
    shared: tuple[int, ...]

    @property
    def sole(self) -> tuple[int, ...]:
        """Those of ``keys`` that no other rank uses."""
        return tuple(head for head in self.keys if head not in self.shared)


@lru_cache(maxsize=256)
def deal(heads: int, kv_heads: int, ranks: int) -> tuple[Deal, ...]:
    """Deal query heads to ranks, as evenly as they go, neighbours together; each rank gets the KV heads they use.

    Args:
        heads, kv_heads: of the call, heads a multiple of kv_heads.
        ranks: at most ``heads``.
    """
    ratio = heads // kv_heads
    edges = [rank * heads // ranks for rank in range(ranks + 1)]
    queries = [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]
    keys = [range(mine.start // ratio, -(-mine.stop // ratio)) for mine in queries]
    used = [sum(head in mine for mine in keys) for head in range(kv_heads)]
    return tuple(
        Deal(mine, needed, _local(mine, needed, ratio), tuple(head for head in needed if used[head] > 1))
        for mine, needed in zip(queries, keys, strict=True)
    )


def _local(queries: range, keys: range, ratio: int) -> tuple[int, ...]:
    """Repeat KV heads until each serves equally many of ``queries``."""
    counts = [min(queries.stop, (head + 1) * ratio) - max(queries.start, head * ratio) for head in keys]
    each = gcd(*counts)
    return tuple(head for head, count in zip(keys, counts, strict=True) for _ in range(count // each))


def parts_for(parts: Sequence[Part], heads: Sequence[int]) -> tuple[Part, ...]:
    """Return the parts of a call that has only these KV heads of another; a head may stand there several times.

    Args:
        parts: of the other call.
        heads: its KV heads, in the order in which the new call has them.
    """
    found: list[Part] = []
    for part in parts:
        mine = tuple(at for at, head in enumerate(heads) if part.heads is None or head in part.heads)
        if mine:
            found.append(replace(part, heads=mine if len(mine) < len(heads) else None, groups=len(heads)))
    return tuple(found)
