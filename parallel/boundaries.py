"""Document boundaries of a batch: from the data, from padding, or from position ids; and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ringspan.dist_attn.layout import Layout
from ringspan.kernels.mask import Documents

Boundaries = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""Boundaries of one sequence that serves every batch row, or one per row; see ``Documents``."""


class Packed:
    """How a batch is packed and cut, on its way through a model as a forward keyword.

    torch.compile guards on the values of ints and tuples, so that each batch with other documents would be compiled
    anew. It takes an object as it is, and a tensor by its shape: compiled code reads ``tensor`` and ``length`` alone.

    Args:
        edges: boundaries that have been checked.
        layout: who holds which tokens of this batch.
    """

    def __init__(self, edges: Boundaries, layout: Layout) -> None:
        self.edges = edges
        rows = rows_of(edges, 1)
        self.length = rows[0][-1]  # global tokens
        self.tensor = torch.tensor([edge for row in rows for edge in row])  # as kernels.attention.attend takes them
        self.documents = Documents(edges) if any(len(row) > 2 for row in rows) else None  # None: one in each row
        self.layout = layout.fitted(self.documents)

    def __repr__(self) -> str:
        return f"Packed({self.edges}, {self.layout})"


def of_batch(given: object, padding: Tensor | None, batch: int, length: int) -> Boundaries:
    """Return the boundaries of a batch; runs of padding are cut off as documents of their own.

    Args:
        given: None, one boundary sequence, or one per batch row.
        padding: None, or [B, S] with 0 where padded.
        batch, length: B and S.

    Raises:
        ValueError: if the boundaries are not 0 ... ``length`` and strictly increasing, or not one list per row.
    """
    mask = Documents((0, length)) if given is None else Documents(cast(Sequence[int], _plain(given)))
    mask.check(length)
    if mask.rows is not None and len(mask.rows) != batch:
        raise ValueError(
            f"document_boundaries: {len(mask.rows)} lists for {batch} batch rows; give one, or one per row"
        )
    if padding is None:
        return mask.boundaries
    own = mask.rows or (cast(tuple[int, ...], mask.boundaries),) * batch
    cut = rows_of(of_padding(padding), batch)
    return _shortest(tuple(tuple(sorted({*a, *b})) for a, b in zip(own, cut, strict=True)))


def of_padding(padding: Tensor) -> Boundaries:
    """Return boundaries that part tokens from padding; padding: [B, S], 0 where padded."""
    return _from_changes(padding[:, 1:] != padding[:, :-1], padding.shape[1])


def of_positions(position_ids: Tensor) -> Boundaries:
    """Return boundaries wherever position ids [B, S] do not go on by one."""
    return _from_changes(position_ids[:, 1:] != position_ids[:, :-1] + 1, position_ids.shape[1])


def rows_of(boundaries: Boundaries | Packed, batch: int) -> tuple[tuple[int, ...], ...]:
    """Return the boundaries of each of ``batch`` rows."""
    if isinstance(boundaries, Packed):
        boundaries = boundaries.edges
    if isinstance(boundaries[0], tuple):
        return cast(tuple[tuple[int, ...], ...], boundaries)
    return (cast(tuple[int, ...], boundaries),) * batch


def positions(boundaries: Boundaries, batch: int) -> Tensor:
    """Return position ids [B, S] that count from 0 in each document."""
    rows = [
        torch.cat([torch.arange(b - a) for a, b in zip(row, row[1:], strict=False)])
        for row in rows_of(boundaries, batch)
    ]
    return torch.stack(rows)


def shift_labels(labels: Tensor, boundaries: Boundaries, ignore: int) -> Tensor:
    """Return labels [B, S] moved one to the left: token i is scored on label i + 1 of its own document."""
    shifted = torch.full_like(labels, ignore)
    shifted[:, :-1] = labels[:, 1:]
    for row, edges in enumerate(rows_of(boundaries, labels.shape[0])):
        shifted[row, torch.tensor(edges[1:], device=labels.device) - 1] = ignore
    return shifted


def _from_changes(changes: Tensor, length: int) -> Boundaries:
    rows = tuple((0, *(torch.nonzero(row).flatten() + 1).tolist(), length) for row in changes.cpu())
    return _shortest(rows)


def _shortest(rows: tuple[tuple[int, ...], ...]) -> Boundaries:
    return rows[0] if len(set(rows)) == 1 else rows


def _plain(given: object) -> object:
    if isinstance(given, Packed):
        return given.edges
    if isinstance(given, Tensor):
        return given.tolist()
    if isinstance(given, Sequence) and given and isinstance(given[0], Tensor | Sequence):
        return [_plain(row) for row in given]
    return given
