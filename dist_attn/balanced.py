"""The layout that looks at the masks: even tokens, then even work, then few keys to fetch. Integers only.

The rule, for a model whose layers may differ:

1. Every rank holds the same tokens, to the one (a share); some are empty where the tokens are fewer than the ranks.
2. A rank's live pairs are summed over layers, batch rows and KV heads. The greatest sum is at most 1 % above the mean
   where a share has 64 blocks or more. Shorter shares are counted token by token: with 64 tokens or more 2 % are usual,
   with fewer the pairs of a single token show. No cut divides one token, so where one sees more keys than a rank's mean
   share of pairs, its rank stands out.
3. Where several places are as even, those are taken from which ranks fetch the fewest keys: neighbours stay together,
   documents shorter than a share are cut where few keys have to follow, or not at all, and windows get few halos.

How: ``balance_ledger.py`` counts pairs and what a cut costs, ``balance_arcs.py`` shares out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from typing_extensions import override

from ringspan.dist_attn.balance_arcs import share_out
from ringspan.dist_attn.balance_ledger import Integers, Ledger, ledger
from ringspan.dist_attn.balance_whole import share_whole
from ringspan.dist_attn.layout import Layout, check_place, shortened, whole
from ringspan.kernels.mask import Documents, Mask, Span, row_count
from ringspan.kernels.parts import parts_of

TOLERANCE = 0.008  # above the mean, of a rank's live pairs: fewer keys to fetch are worth so much
ENOUGH = 1.01  # greatest over mean, that needs no bettering
FINENESS = 64  # stretches per share, at least: with fewer the balance would be coarse


@dataclass(frozen=True, init=False, repr=False)
class Balanced(Layout):
    """Equal tokens per rank; then the least worst-rank work, summed over the layers; then few keys to fetch.

    The work of packed documents depends on the batch: ``fitted`` gives the layout for its documents.

    Args:
        masks: the mask of all layers, or pairs (mask, layers) for a model whose layers differ.
        block: tokens, at most, between two places where the live pairs are counted; within a block they are taken to
            be even. Shares are cut at any token. Short sequences are counted more finely.
        kv_heads: of the model; needed where a mask differs by KV head.

    Raises:
        ValueError: names the argument, its value and the rule.
    """

    layers: tuple[tuple[Mask, int], ...]
    block: int
    kv_heads: int | None

    def __init__(
        self, masks: Mask | Sequence[tuple[Mask, int]], block: int = 128, *, kv_heads: int | None = None
    ) -> None:
        object.__setattr__(self, "layers", _checked(((masks, 1),) if isinstance(masks, Mask) else masks))
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "kv_heads", kv_heads)
        whole("Balanced", "block", block)
        if kv_heads is not None:
            whole("Balanced", "kv_heads", kv_heads)
        for mask, _ in self.layers:
            if mask.heads and kv_heads is None:
                raise ValueError(f"Balanced: {_brief(mask)} differs by KV head; give kv_heads, how many the model has")
        counts = {row_count(mask) for mask, _ in self.layers} - {None}
        if len(counts) > 1:
            raise ValueError(
                f"Balanced: masks for {' and '.join(map(str, sorted(filter(None, counts))))} batch rows; "
                "all layers see the same batch"
            )

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        check_place(rank, world, length)
        return _shares(self, world, length)[rank]

    @override
    def fitted(self, documents: Documents | None) -> Balanced:
        """Return the same layout for ``mask & documents`` in every layer.

        Raises:
            ValueError: if a mask holds Documents already.
        """
        if documents is None:
            return self
        return Balanced([(mask & documents, n) for mask, n in self.layers], self.block, kv_heads=self.kv_heads)

    @cached_property
    def patterns(self) -> tuple[tuple[Mask, int], ...]:
        """Masks without heads and batch rows, each with how many (layer, batch row, KV head) have it.

        Raises:
            ValueError: if a mask by KV head does not fit ``kv_heads``.
        """
        rows = max(row_count(mask) or 1 for mask, _ in self.layers)
        found: dict[Mask, int] = {}
        for mask, layers in self.layers:
            for part in parts_of(mask, rows, self.kv_heads or 1):
                found[part.mask] = found.get(part.mask, 0) + part.share * layers
        return tuple(found.items())

    @cached_property
    def _text(self) -> str:
        (first, count), *more = self.layers
        masks = " + ".join(f"{mask} x {layers}" for mask, layers in self.layers) if more or count > 1 else str(first)
        heads = "" if self.kv_heads is None else f", kv_heads={self.kv_heads}"
        return shortened("Balanced", f"{masks}, block={self.block}{heads}")

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__


@lru_cache(maxsize=128)
def _shares(layout: Balanced, world: int, length: int) -> tuple[tuple[Span, ...], ...]:
    """Return the spans of every rank. Pure: the same on every rank, in every process."""
    for mask, _ in layout.layers:
        mask.check(length)
    if world == 1 or length == 0:
        return ((Span(0, length),) if length else (), *((),) * (world - 1))
    grain = max(1, min(layout.block, length // (FINENESS * world)))
    book, document = _ordered(ledger(layout.patterns, length, grain), layout.patterns)
    sizes = [(rank + 1) * length // world - rank * length // world for rank in range(world)]
    best = share_out(book, sizes, TOLERANCE)
    if document is not None:
        other = share_whole(book, document, sizes, TOLERANCE)
        if other is not None and other.imbalance <= max(best.imbalance, ENOUGH) and other.fetched < best.fetched:
            best = other
    # Ranks by their first token, so that a halo comes from a neighbour; those without tokens last.
    ordered = sorted((each.tolist() for each in best.spans), key=lambda each: each[0][0] if each else length)
    return tuple(tuple(Span(*pair) for pair in each) for each in ordered)


def _ordered(book: Ledger, patterns: Sequence[tuple[Mask, int]]) -> tuple[Ledger, Integers | None]:
    """Return the stretches in the order in which they are shared out, and the document of each if all masks have them.

    Documents see nothing of each other, so that they may stand in any order: by length, a share that takes the end of
    a long one, where much is seen, is filled up with whole short ones.
    """
    edges = {mask.documents.edges if mask.documents else () for mask, _ in patterns}
    common = np.array(edges.pop(), dtype=np.int64)
    if edges or not len(common):
        return book, None  # batch rows packed otherwise, or not at all
    document = np.searchsorted(common, book.start, "right") - 1
    order = np.lexsort((book.start, np.diff(common)[document]))
    return book.take(order), document[order]


def _checked(masks: Sequence[tuple[Mask, int]]) -> tuple[tuple[Mask, int], ...]:
    rule = "Balanced: masks must be a mask, or pairs (mask, layers)"
    if not isinstance(masks, Sequence) or not masks:
        raise ValueError(f"{rule}, at least one; got {masks!r}")
    for pair in masks:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], Mask)):
            raise ValueError(f"{rule}; got {pair!r}")
        whole("Balanced", f"layers of {_brief(pair[0])}", pair[1])
    return tuple((mask, layers) for mask, layers in masks)


def _brief(mask: Mask) -> str:
    text = str(mask)
    return text if len(text) <= 60 else f"{text[:57]}..."
