"""Documents: packed sequences, and one mask per batch row where the packing differs by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from typing_extensions import override

from ringspan.kernels.masks.composition import And, Mask, Packing
from ringspan.kernels.masks.span import Span
from ringspan.kernels.masks.strips import EVERYTHING, Strip


@dataclass(frozen=True, init=False, repr=False)
class Documents(Mask):
    """A query sees only keys of its own document; used under ``&``, at most once.

    It restricts everything beside it, and gives every Sinks and every Groups(per_document=True) its starts.

    Args:
        boundaries: strictly increasing positions, 0 first and the length last; document i is
            ``[boundaries[i], boundaries[i + 1])``. One sequence for all batch rows, or a list of one per row.
    """

    boundaries: tuple[int, ...] | tuple[tuple[int, ...], ...]

    def __init__(self, boundaries: Sequence[int] | Sequence[Sequence[int]]) -> None:
        if len(boundaries) and isinstance(boundaries[0], Sequence):
            own: tuple[object, ...] = tuple(_checked(row) for row in boundaries)  # pyright: ignore[reportArgumentType]
        else:
            own = _checked(boundaries)
        object.__setattr__(self, "boundaries", own)
        object.__setattr__(self, "_hash", hash(own))  # of ints alone, so the same in every process

    def __hash__(self) -> int:
        return self._hash  # pyright: ignore[reportAttributeAccessIssue] - set once: thousands of boundaries are many

    @property
    def rows(self) -> tuple[tuple[int, ...], ...] | None:
        """The per-row boundaries, or None where one sequence serves every row."""
        return self.boundaries if isinstance(self.boundaries[0], tuple) else None  # pyright: ignore[reportReturnType]

    @property
    def edges(self) -> tuple[int, ...]:
        """The boundaries of the one sequence.

        Raises:
            ValueError: if there is one list per batch row.
        """
        if self.rows is not None:
            raise ValueError(
                f"Documents of {len(self.rows)} batch rows answers no question about one row; "
                "take one with of_row(mask, i)"
            )
        return self.boundaries  # pyright: ignore[reportReturnType]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The documents of all rows."""
        return tuple(Span(*pair) for edges in self.rows or (self.edges,) for pair in pairwise(edges))

    def starts(self, positions: Tensor) -> Tensor:
        """Return the first position of each position's document."""
        edges = torch.tensor(self.edges, device=positions.device)
        return edges[torch.bucketize(positions, edges[1:-1], right=True)]

    @property
    @override
    def documents(self) -> Packing:
        return self

    @property
    @override
    def rule(self) -> None:
        return None

    @override
    def sees(self, q: Tensor, k: Tensor, q_start: Tensor, k_start: Tensor) -> Tensor:
        return q_start == k_start

    @override
    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        return (EVERYTHING,)  # the pieces are cut to their document

    @override
    def next_seen(self, key: int, document: int) -> bool:
        return True

    @override
    def check(self, length: int) -> None:
        for edges in self.rows or (self.edges,):
            if edges[-1] != length:
                raise ValueError(
                    f"mask: Documents ends at {edges[-1]} but the sequence has {length} tokens; "
                    "the last boundary must be the global length"
                )

    def __str__(self) -> str:
        return f"documents({', '.join(str(each) for each in self.boundaries)})"


def of_row(mask: Mask, row: int) -> Mask:
    """Return the mask of one batch row: Documents with a boundary list per row keep only that row's."""
    if row_count(mask) is None:
        return mask
    if isinstance(mask, Documents):
        assert mask.rows is not None
        return Documents(mask.rows[row])
    return And(tuple(of_row(part, row) for part in mask.parts))


def batch_rows(mask: Mask | Sequence[Mask], batch: int) -> list[Mask]:
    """Return one mask per batch row.

    Raises:
        ValueError: if a list of masks, or Documents with one boundary list per row, has another length than ``batch``.
    """
    if not isinstance(mask, Mask):
        if len(mask) != batch:
            raise ValueError(f"mask: {len(mask)} masks for {batch} batch rows; give one mask, or one per row")
        return [of_row(each, row) for row, each in enumerate(mask)]
    rows = row_count(mask)
    if rows is not None and rows != batch:
        raise ValueError(f"mask: Documents has {rows} boundary lists for {batch} batch rows; give one, or one per row")
    return [of_row(mask, row) for row in range(batch)]


def row_count(mask: Mask) -> int | None:
    """Return for how many batch rows the mask is written, or None where it serves any number."""
    rows = mask.documents.rows if mask.documents else None
    return None if rows is None else len(rows)


def _checked(boundaries: Iterable[object]) -> tuple[int, ...]:
    if isinstance(boundaries, int):
        raise ValueError(f"Documents boundaries must be one list of ints, or one list per batch row; got {boundaries}")
    edges = tuple(boundaries)
    wrong = next((edge for edge in edges if isinstance(edge, bool) or not isinstance(edge, int)), None)
    if wrong is not None:
        raise ValueError(f"Documents boundaries must be ints, got {wrong!r}")
    rule = "Documents boundaries must be strictly increasing, 0 first and the length last; got"
    if len(edges) < 2 or edges[0] != 0:
        raise ValueError(f"{rule} {len(edges)} of them, {list(edges[:4])} first")
    for before, after in pairwise(edges):
        if before >= after:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(f"{rule} {before} before {after}")
    return edges  # pyright: ignore[reportReturnType]
