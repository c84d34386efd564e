"""Masks that differ by KV head: PerHead, and the interleaved patterns of S2-Attn and SF-Attn.

Heads are the model's KV heads, counted over all tensor-parallel ranks, so that grouped queries and head sharding keep
their meaning. ``by_head`` takes such a mask apart into masks that know nothing of heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil

from typing_extensions import override

from ringspan.kernels.masks.composition import Mask
from ringspan.kernels.masks.patterns import Causal, Groups, Sinks, whole


class _ByHead(Mask):
    """What PerHead and Interleaved share: they only choose among their parts."""

    heads = True

    @override
    def leaves(self) -> Iterator[Mask]:
        for part in self.parts:
            yield from part.leaves()

    @override
    def next_seen(self, key: int, document: int) -> bool:
        return any(part.next_seen(key, document) for part in self.parts)

    def _refuse_documents(self, name: str) -> None:
        if any(part.documents is not None for part in self.parts):
            raise ValueError(
                f"mask: Documents inside {name}; all heads share them, so write {name}(...) & Documents(...)"
            )

    def check_heads(self, total: int) -> None:
        """Raise ValueError, or warn, where the mask does not suit a model of ``total`` KV heads."""
        raise NotImplementedError


@dataclass(frozen=True, init=False, repr=False)
class PerHead(_ByHead):
    """Another mask for each range of KV heads: ``PerHead({(0, 2): Causal(), (2, 8): Causal() & Window(1024)})``.

    Args:
        masks: half-open ranges of the model's KV heads, disjoint and together all of them, with their masks. None
            holds Documents, for these hold for all heads: combine it with ``&``.
    """

    ranges: tuple[tuple[int, int], ...]
    parts: tuple[Mask, ...]

    def __init__(self, masks: Mapping[tuple[int, int], Mask]) -> None:
        if not masks:
            raise ValueError("PerHead: masks must name at least one range of KV heads, got none")
        for heads, mask in masks.items():
            if not (isinstance(heads, tuple) and len(heads) == 2):
                raise ValueError(f"PerHead: a range must be (first, last + 1), got {heads!r}")
            whole("PerHead", "a range's start", heads[0], 0)
            whole("PerHead", "a range's stop", heads[1], heads[0] + 1)
            if not isinstance(mask, Mask):
                raise ValueError(f"PerHead: heads {heads} must have a mask, got {mask!r}")
        object.__setattr__(self, "ranges", tuple(sorted(masks)))
        object.__setattr__(self, "parts", tuple(masks[heads] for heads in self.ranges))
        for before, after in pairwise(self.ranges):
            if after[0] < before[1]:
                raise ValueError(f"PerHead: ranges must be disjoint, got {before} and {after}")
        self._refuse_documents("PerHead")

    @override
    def check_heads(self, total: int) -> None:
        covered = 0
        for start, stop in (*self.ranges, (total, total)):
            if start > covered:
                raise ValueError(f"PerHead: no mask for KV heads {covered}:{start} of the model's {total}")
            covered = max(covered, stop)
        if covered > total:
            raise ValueError(f"PerHead: masks for {covered} KV heads, but the model has {total}")

    @override
    def of_head(self, head: int) -> Mask:
        chosen = (part for (start, stop), part in zip(self.ranges, self.parts, strict=True) if start <= head < stop)
        return next(chosen).of_head(head)

    def __str__(self) -> str:
        items = (f"{heads}: {part}" for heads, part in zip(self.ranges, self.parts, strict=True))
        return f"per_head({{{', '.join(items)}}})"


@dataclass(frozen=True, repr=False)
class Interleaved(_ByHead):
    """Two masks, spread evenly over the KV heads; made by ``s2_attention`` and ``sf_attention``.

    Head h takes ``first`` where ``ceil((h + 1) * share) > ceil(h * share)``: of any heads in a row that share, rounded
    up or down; head 0 is one of them if the share is not 0.

    Args:
        first, second: masks without Documents.
        share: the part of the heads that takes ``first``; exact, so that no float decides about a head.
        text: how the mask is written.
    """

    first: Mask
    second: Mask
    share: Fraction
    text: str

    def __post_init__(self) -> None:
        self._refuse_documents("Interleaved")

    @property
    def parts(self) -> tuple[Mask, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Both masks."""
        return self.first, self.second

    @override
    def check_heads(self, total: int) -> None:
        kinds = {self._takes_first(head) for head in range(total)}
        if len(kinds) == 1 and 0 < self.share < 1:
            warnings.warn(
                f"mask: {self} gives {total} KV head{'s' if total > 1 else ''} one pattern, "
                f"{self.first if kinds == {True} else self.second}; mixing takes more heads",
                UserWarning,
                stacklevel=3,
            )

    @override
    def of_head(self, head: int) -> Mask:
        return (self.first if self._takes_first(head) else self.second).of_head(head)

    def _takes_first(self, head: int) -> bool:
        return ceil((head + 1) * self.share) > ceil(head * self.share)

    def __str__(self) -> str:
        return self.text


def s2_attention(size: int) -> Mask:
    """Return LongLoRA's S2-Attn, causal and without its wrap-around: even KV heads see their group, odd ones a shifted.

    Args:
        size: positions per group; the shift is half of it.
    """
    whole("s2_attention", "size", size, 2)
    plain, shifted = Causal() & Groups(size), Causal() & Groups(size, size // 2)
    return Interleaved(plain, shifted, Fraction(1, 2), f"s2_attention({size})")


def sf_attention(size: int, sinks: int = 4, unshifted: float = 0.5) -> Mask:
    """Return SinkLoRA's SF-Attn, corrected: groups and the document's first tokens, both only backwards in time.

    Args:
        size: positions per group; the shift is half of it.
        sinks: how many first keys of its document each query sees besides its group.
        unshifted: the part of the KV heads whose groups are not shifted, 0 to 1, spread evenly: head h is one of them
            where ``ceil((h + 1) * unshifted) > ceil(h * unshifted)``, in exact decimals.
    """
    whole("sf_attention", "size", size, 2)
    whole("sf_attention", "sinks", sinks, 1)
    if isinstance(unshifted, bool) or not isinstance(unshifted, int | float) or not 0 <= unshifted <= 1:
        raise ValueError(f"sf_attention: unshifted must be a number from 0 to 1, got {unshifted!r}")
    share = float(unshifted)
    plain, shifted = (Causal() & (Groups(size, shift) | Sinks(sinks)) for shift in (0, size // 2))
    text = f"sf_attention({size}, sinks={sinks}, unshifted={share!r})"
    return Interleaved(plain, shifted, Fraction(repr(share)), text)


def by_head(mask: Mask, first: int, count: int, total: int) -> tuple[tuple[tuple[int, ...], Mask], ...]:
    """Take a mask apart by KV head.

    Args:
        mask: any mask.
        first, count: which of the model's KV heads are asked for; a tensor-parallel rank's own.
        total: how many KV heads the model has.

    Returns:
        Pairs of heads, counted from ``first``, and the mask that they share, in order of each pair's first head; equal
        masks are one pair.

    Raises:
        ValueError: if the heads are not among the model's, or a PerHead does not cover exactly these.
    """
    whole("by_head", "first", first, 0)
    whole("by_head", "count", count, 1)
    whole("by_head", "total", total, first + count)
    if not mask.heads:
        return ((tuple(range(count)), mask),)
    for one in _choices(mask):
        one.check_heads(total)
    found: dict[Mask, list[int]] = {}
    for head in range(count):
        found.setdefault(mask.of_head(first + head), []).append(head)
    return tuple((tuple(heads), each) for each, heads in found.items())


def _choices(mask: Mask) -> Iterator[_ByHead]:
    if isinstance(mask, _ByHead):
        yield mask
    for part in mask.parts:
        yield from _choices(part)
