"""What a strategy moves and computes, round by round, for all ranks: the common form of every plan.

Bytes counted, seconds predicted and timelines drawn all come from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Transfers:
    """Payload on its way, one entry each: columns of equal length.

    ``depart``: the source sends it before it computes this round; ``arrive``: the target has it before it computes
    this round (depart < arrive). ``bytes`` are payload, no headers; padding that a collective needs is payload.
    """

    depart: Integers
    arrive: Integers
    source: Integers
    target: Integers
    bytes: Integers

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int, int, int, int]]) -> Transfers:
        """Build from (depart, arrive, source, target, bytes)."""
        table = np.array(list(rows), dtype=np.int64).reshape(-1, 5)
        return cls(*table.T)

    @classmethod
    def join(cls, many: Iterable[Transfers]) -> Transfers:
        """Put several lists of transfers end to end."""
        parts = [*many, cls.of(())]
        names = ("depart", "arrive", "source", "target", "bytes")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def later(self, rounds: int) -> Transfers:
        """Return the same transfers so many rounds later."""
        return replace(self, depart=self.depart + rounds, arrive=self.arrive + rounds)

    def received(self, rank: int) -> int:
        """Return the bytes that arrive at ``rank``."""
        return int(self.bytes[self.target == rank].sum())


class Moves(Protocol):
    """One strategy's plan for one problem. Integers only; for any rank, also of a world that does not exist."""

    def transfers(self, *, backward: bool) -> Transfers:
        """Return all transfers of the forward pass, or of the backward pass."""
        ...

    def areas(self, *, backward: bool = False) -> Integers:
        """Return [rounds, world]: live pairs, times query heads and batch rows, of each round of a pass."""
        ...
