"""Layouts: which spans of the global sequence each rank holds, in order. Integers only.

Any length fits any world. The same spans cut tokens, labels, positions and hidden states alike. Which layout suits:

- ``Contiguous``: windows (a halo from one neighbour), non-causal masks;
- ``ZigZag``: dense causal masks, even work without looking at the mask;
- ``Striped``: an even spread by counting alone, whatever the mask; a window then needs nearly every rank;
- ``Balanced`` (``balanced.py``): packed documents, mixed layers: even work for the masks it is given, few keys moved;
- ``Assigned``: spans that the caller lists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from typing_extensions import override

from ringspan.kernels.mask import Documents, Span, union

SHOWN = 120  # characters of a layout's own text that are printed in full


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

    def fitted(self, documents: Documents | None) -> Layout:
        """Return the layout for a batch that is packed of these documents: itself, where it does not look at masks.

        Args:
            documents: the batch's; None: one document per batch row.
        """
        return self


@dataclass(frozen=True)
class Contiguous(Layout):
    """Rank r holds the r-th of ``world`` equal parts. Keeps neighbours together; causal work is uneven."""

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        check_place(rank, world, length)
        return union([_chunk(rank, world, length)])


@dataclass(frozen=True)
class ZigZag(Layout):
    """Of ``2 * world`` equal chunks rank r holds chunk r and chunk ``2 * world - 1 - r``: causal work is even."""

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        check_place(rank, world, length)
        return union([_chunk(rank, 2 * world, length), _chunk(2 * world - 1 - rank, 2 * world, length)])


@dataclass(frozen=True)
class Striped(Layout):
    """Block i of ``block`` tokens goes to rank ``i % world``; the last block may be short.

    Args:
        block: tokens per block, at least 1; 1 deals single tokens.
    """

    block: int = 128

    def __post_init__(self) -> None:
        whole("Striped", "block", self.block)

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        check_place(rank, world, length)
        return _stripes(self.block, rank, world, length)


@dataclass(frozen=True, init=False, repr=False)
class Assigned(Layout):
    """Spans that are listed, rank by rank; shares may be as uneven as they like. For one world and one length.

    Args:
        by_rank: for each rank its spans, or pairs (start, stop): ascending, disjoint, not empty; a rank may have none.
            Spans that touch are joined.
    """

    by_rank: tuple[tuple[Span, ...], ...]

    def __init__(self, by_rank: Iterable[Iterable[tuple[int, int]]]) -> None:
        given = tuple(tuple(_span(rank, pair) for pair in pairs) for rank, pairs in enumerate(by_rank))
        for rank, held in enumerate(given):
            for before, after in pairwise(held):
                if after.start < before.stop:
                    raise ValueError(
                        f"Assigned: rank {rank} has {_pair(before)} before {_pair(after)}; a rank's spans ascend and "
                        "do not overlap, so sort and join them"
                    )
        object.__setattr__(self, "by_rank", tuple(union(held) for held in given))

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        check_place(rank, world, length)
        if world != len(self.by_rank):
            raise ValueError(
                f"world: {world} ranks, but Assigned lists spans for {len(self.by_rank)}; list one entry for each rank"
            )
        _check_cover(self, length)
        return self.by_rank[rank]

    def __str__(self) -> str:
        return shortened("Assigned", "; ".join(" ".join(map(_pair, held)) or "-" for held in self.by_rank))

    __repr__ = __str__


def check_place(rank: int, world: int, length: int) -> None:
    """Raise ValueError unless ``rank`` is one of ``world`` and ``length`` is not negative."""
    if not 0 <= rank < world:
        raise ValueError(f"rank: {rank} is not within a world of {world} ranks (0 to {world - 1})")
    if length < 0:
        raise ValueError(f"length: {length} must be at least 0")


def whole(layout: str, argument: str, value: object) -> None:
    """Raise ValueError unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{layout}: {argument} must be an int of at least 1, got {value!r}")


def shortened(layout: str, text: str) -> str:
    """Return ``layout(text)``, where the text is long its beginning and a digest of it: alike in every process."""
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]}... sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return f"{layout}({text})"


def _chunk(index: int, chunks: int, length: int) -> Span:
    return Span(index * length // chunks, (index + 1) * length // chunks)


@lru_cache(maxsize=256)
def _stripes(block: int, rank: int, world: int, length: int) -> tuple[Span, ...]:
    return union(Span(start, min(start + block, length)) for start in range(rank * block, length, world * block))


def _span(rank: int, pair: Sequence[int]) -> Span:
    numbers = tuple(pair)
    whole_numbers = all(isinstance(one, int) and not isinstance(one, bool) for one in numbers)
    if len(numbers) != 2 or not whole_numbers or not 0 <= numbers[0] < numbers[1]:
        raise ValueError(f"Assigned: rank {rank} has {pair!r}; a span is two ints (start, stop), 0 <= start < stop")
    return Span(*numbers)


def _pair(span: Span) -> str:
    return f"{span.start}:{span.stop}"


@lru_cache(maxsize=64)
def _check_cover(layout: Assigned, length: int) -> None:
    """Raise ValueError unless each of ``length`` tokens is listed once."""
    at = 0
    for span in sorted(span for held in layout.by_rank for span in held):
        if span.start != at:
            found = f"tokens {at}:{span.start} to no rank" if span.start > at else f"token {span.start} to two ranks"
            raise ValueError(f"Assigned: gives {found}; each token of the sequence goes to one rank")
        at = span.stop
    if at != length:
        raise ValueError(
            f"length: {length} tokens, but Assigned lists {at}; a listed layout serves one length, so list it anew"
        )
