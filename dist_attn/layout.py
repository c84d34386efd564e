"""Layouts: which spans of the global sequence each rank holds, in order. Integers only.

A layout cuts the sequence into chunks of nearly equal size (they differ by at most one token, so any length fits any
world) and deals them to the ranks. The same spans cut tokens, labels, positions and hidden states alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from ringspan.kernels.mask import Span, union


@dataclass(frozen=True)
class Layout:
    """Base of all layouts; a layout is a value and holds no process group."""

    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        """Return the global spans ``rank`` holds, in order; empty where the sequence is shorter than the world.

        Args:
            rank: 0 <= rank < world.
            world: number of ranks that share the sequence.
            length: global tokens.
        """
        raise NotImplementedError

    def share(self, rank: int, world: int, length: int) -> int:
        """Return how many tokens ``rank`` holds."""
        return sum(span.size for span in self.spans(rank, world, length))


@dataclass(frozen=True)
class Contiguous(Layout):
    """Rank r holds the r-th of ``world`` equal parts. Keeps neighbours together; causal work is uneven."""

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        _check(rank, world, length)
        return union([_chunk(rank, world, length)])


@dataclass(frozen=True)
class ZigZag(Layout):
    """Of ``2 * world`` equal chunks rank r holds chunk r and chunk ``2 * world - 1 - r``: causal work is even."""

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        _check(rank, world, length)
        return union([_chunk(rank, 2 * world, length), _chunk(2 * world - 1 - rank, 2 * world, length)])


def _chunk(index: int, chunks: int, length: int) -> Span:
    return Span(index * length // chunks, (index + 1) * length // chunks)


def _check(rank: int, world: int, length: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank: {rank} is not within a world of {world} ranks (0 to {world - 1})")
    if length < 0:
        raise ValueError(f"length: {length} must be at least 0")
