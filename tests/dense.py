"""The truth: dense attention from its definition. torch alone; imports nothing of ringspan.

Masks are built here from words and numbers, never from the library's mask objects, so that a wrong mask there shows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mask_table(length: int, *, causal: bool, boundaries: list[int] | None = None) -> Tensor:
    """Return [length, length] bool: row i sees column j."""
    position = torch.arange(length)
    table = torch.ones(length, length, dtype=torch.bool)
    if causal:
        table &= position[:, None] >= position[None, :]
    if boundaries is not None:
        document = torch.zeros(length, dtype=torch.long)
        for edge in boundaries[1:-1]:
            document[edge:] += 1
        table &= document[:, None] == document[None, :]
    return table


def pattern_table(length: int, words: tuple, boundaries: list[int] | None = None) -> Tensor:
    """Return [length, length] bool: row i sees column j, by a pattern in words, within documents.

    Args:
        words: ("full",), ("causal",), ("window", left, right), ("sinks", n), ("groups", size, shift, per_document),
            ("dilated", window, dilation), ("and", pattern, ...) or ("or", pattern, ...).
        boundaries: of the documents; None is one document.
    """
    start = [0] * length  # the first position of each position's document
    for left, right in zip(boundaries or [], (boundaries or [])[1:], strict=False):
        start[left:right] = [left] * (right - left)
    first = torch.tensor(start)
    return _pattern(words, torch.arange(length), first) & (first[:, None] == first[None, :])


def _pattern(words: tuple, position: Tensor, first: Tensor) -> Tensor:
    name, *numbers = words
    query, key = position[:, None], position[None, :]
    if name in ("and", "or"):
        tables = torch.stack([_pattern(each, position, first) for each in numbers])
        return tables.all(0) if name == "and" else tables.any(0)
    if name == "full":
        return (query + key) >= 0
    if name == "causal":
        return key <= query
    if name == "window":
        left, right = numbers
        return (key >= query - left) & (key <= query + right)
    if name == "sinks":
        return (position - first < numbers[0])[None, :].expand(len(position), -1)
    if name == "groups":
        size, shift, per_document = numbers
        counted = (position - first if per_document else position).tolist()
        group = torch.tensor([math.floor((one - shift) / size) for one in counted])
        return group[:, None] == group[None, :]
    if name == "dilated":
        window, dilation = numbers
        table = torch.zeros(len(position), len(position), dtype=torch.bool)
        for back in range(window):
            table |= key == query - back * dilation
        return table
    raise ValueError(name)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out [B, L, H, D], lse [B, L, H]) by explicit softmax; one extra column per head for a sink.

    Args:
        q: [B, L, H, D]; k, v: [B, L, G, D]; table: [L, L] or [B, L, L] bool; sinks: [H].
    """
    heads, dim = q.shape[2], q.shape[3]
    repeat = heads // k.shape[2]
    keys, values = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    logits = torch.einsum("bmhd,bnhd->bhmn", q, keys) * (dim**-0.5 if scale is None else scale)
    table = table if table.dim() == 3 else table[None]
    logits = logits.masked_fill(~table[:, None], -torch.inf)
    if sinks is not None:
        column = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    empty = lse == -torch.inf
    weights = torch.exp(logits - torch.where(empty, 0, lse)[..., None])
    weights = weights[..., : k.shape[1]]
    out = torch.einsum("bhmn,bnhd->bmhd", weights, values)
    return out, lse.transpose(1, 2)


def relative_rms(found: Tensor, truth: Tensor) -> float:
    """Return the root mean square of the error over that of the truth; both in float64."""
    found, truth = found.detach().double(), truth.detach().double()
    error = (found - truth).square().mean().sqrt()
    size = truth.square().mean().sqrt()
    return float(error / size) if size > 0 else float(error)
