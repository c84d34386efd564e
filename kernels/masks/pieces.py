"""From a mask to pieces: rows of one document and one group, each with the strips that say which keys they see.

A mask's strips hold document starts and group edges as numbers. Pieces that lie alike relative to their document or
group share one template, which is found once and moved to its place; a million tokens in thousands of documents cost
a few integers per document.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from ringspan.kernels.masks.measure import exists
from ringspan.kernels.masks.span import Span
from ringspan.kernels.masks.strips import EVERYTHING, Strip, meet, unite

Piece = tuple[Span, tuple[Strip, ...]]


class Rule(Protocol):
    """What pieces need of a mask."""

    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        """Return disjoint strips for rows of one document and one group of each cutter."""
        ...

    def group(self, row: int, document: int) -> Span:
        """Return the group of a row."""
        ...


class Shape(NamedTuple):
    """What cutting needs to know of a mask: its document edges, what rules within one, and what cuts that further."""

    edges: Sequence[int]  # document i is [edges[i], edges[i + 1])
    rule: Rule | None  # None: a row sees its whole document
    cutters: tuple[Rule, ...]
    anchored: bool  # whether the rule counts from document starts


Cut = tuple[Span, Span, tuple[Span, ...]]  # rows, the document and each cutter's group that they lie in


def pieces(shape: Shape, q_span: Span) -> tuple[Piece, ...]:
    """Return ``q_span`` cut where the mask's rule changes, each piece with its strips; see ``Mask.pieces``."""
    found: list[Piece] = []
    near: dict[tuple[int, ...], tuple[Strip, ...]] = {}
    for rows, document, groups in cuts(shape, q_span):
        base = document.start if shape.anchored or not groups else groups[0].start
        place = (document.start - base if shape.anchored else 0, *(edge - base for group in groups for edge in group))
        template = near.get(place)
        if template is None:
            template = near[place] = _template(shape.rule, place)
        found.append((rows, tuple(_placed(template, base, document, rows))))
    return tuple(found)


def _placed(template: tuple[Strip, ...], base: int, document: Span, rows: Span) -> Iterator[Strip]:
    """Yield the template's strips at ``base``, cut to the document, that serve a row."""
    start, stop = document
    for first, last, low, high, step, offset in template:
        first, last = first + base, last + base
        strip = Strip(start if first < start else first, stop if last > stop else last, low, high, step, offset)
        if exists(strip, rows):
            yield strip


def cuts(shape: Shape, q_span: Span) -> Iterator[Cut]:
    """Yield the parts of ``q_span`` within one document and one group of each cutter, in order.

    Raises:
        ValueError: if ``q_span`` does not lie within the documents.
    """
    if q_span.start >= q_span.stop:
        return
    edges = shape.edges
    if q_span.start < 0 or q_span.stop > edges[-1]:
        raise ValueError(f"mask: queries {q_span.start} to {q_span.stop} are not within 0 to {edges[-1]}")
    for number in range(bisect_right(edges, q_span.start) - 1, bisect_left(edges, q_span.stop)):
        document = Span(edges[number], edges[number + 1])
        at, end = max(q_span.start, document.start), min(q_span.stop, document.stop)
        if not shape.cutters:
            yield Span(at, end), document, ()
            continue
        while at < end:
            groups = tuple([cutter.group(at, document.start) for cutter in shape.cutters])
            stop = min([end, *(group.stop for group in groups)])
            yield Span(at, stop), document, groups
            at = stop


@lru_cache(maxsize=4096)
def _template(rule: Rule | None, place: tuple[int, ...]) -> tuple[Strip, ...]:
    """Return disjoint strips relative to a base, before the document's ends cut them.

    Args:
        rule: what holds within the document.
        place: the document's first position, then each cutter's group: start, stop; all relative to the base.
    """
    if rule is None:
        return (EVERYTHING,)
    return rule.strips(place[0], map(Span, place[1::2], place[2::2]))


def both(parts: Sequence[tuple[Strip, ...]]) -> tuple[Strip, ...]:
    """Return the pairs that all lists hold; each list is disjoint, and so is the result."""
    found = parts[0]
    for other in parts[1:]:
        found = meet(found, other)
    return found


def either(parts: Sequence[tuple[Strip, ...]]) -> tuple[Strip, ...]:
    """Return the pairs that any list holds, each once."""
    return unite(strip for part in parts for strip in part)
