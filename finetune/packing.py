"""From documents to sequences of one length: what a sequence is, and how pieces are laid into it.

The one idea is `boundaries`: every piece of a document, and the padding if there is any, is a span
of its own, which attention keeps apart (mask `Documents(boundaries)`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""The label of a position that bears no loss; transformers and torch use the same number."""


@dataclass(frozen=True)
class Document:
    """Tokens of one document, and where it stands ("file:line")."""

    tokens: list[int]
    source: str


@dataclass(frozen=True, eq=False)
class Sequence:
    """One training sequence of S = seq_length tokens; the same on every rank that shares it.

    Shapes: input_ids [S] int64; labels [S] int64, unshifted: input_ids, and -100 where padded.
    boundaries: starts of the spans and, last, S; strictly increasing from 0. Padding is the last
        span.
    """

    input_ids: Tensor
    boundaries: tuple[int, ...]
    labels: Tensor


@dataclass
class Counts:
    """What became of the data since the start of training, in documents, tokens or lines."""

    documents: int = 0
    """Documents used, whole or in part."""
    tokens: int = 0
    """Tokens of documents in the sequences given out."""
    split: int = 0
    """Documents cut at least once that went on in the next sequence."""
    dropped: int = 0
    """Documents left out for their length."""
    truncated: int = 0
    """Documents that lost their end for their length."""
    empty: int = 0
    """Documents or lines without text."""
    bad_lines: int = 0
    """Lines that were skipped as broken."""
    padding: int = 0
    """Tokens of padding in the sequences given out."""


def lay(pieces: list[list[int]], seq_length: int, pad_id: int) -> Sequence:
    """Lay the pieces one after another and pad to seq_length; together they must not be longer."""
    boundaries = [0]
    tokens: list[int] = []
    for piece in pieces:
        tokens += piece
        boundaries.append(len(tokens))
    used = len(tokens)
    assert used <= seq_length, f"{used} tokens laid into a sequence of {seq_length}"
    if used < seq_length:
        tokens += [pad_id] * (seq_length - used)
        boundaries.append(seq_length)
    input_ids = torch.tensor(tokens, dtype=torch.int64)  # [S]
    labels = input_ids.clone()
    labels[used:] = IGNORED
    return Sequence(input_ids, tuple(boundaries), labels)
