"""Masks as values: which keys a query may see. All of them, and what takes them apart, under one name.

Letters: a position is a token's index in the global sequence; a ``Span`` is half-open, ``[start, stop)``. In ``masks``:
how they compose (``composition.py``), how they are written (``expression.py``), how they become intervals
(``pieces.py``, ``strips.py``).
"""

from ringspan.kernels.masks.composition import And, Mask, Or
from ringspan.kernels.masks.documents import Documents, batch_rows, of_row, row_count
from ringspan.kernels.masks.expression import parse
from ringspan.kernels.masks.heads import Interleaved, PerHead, by_head, s2_attention, sf_attention
from ringspan.kernels.masks.patterns import Causal, Dilated, Full, Groups, Sinks, Window
from ringspan.kernels.masks.span import END, Span, overlap, union
from ringspan.kernels.masks.strips import Strip

__all__ = [
    "END",
    "And",
    "Causal",
    "Dilated",
    "Documents",
    "Full",
    "Groups",
    "Interleaved",
    "Mask",
    "Or",
    "PerHead",
    "Sinks",
    "Span",
    "Strip",
    "Window",
    "batch_rows",
    "by_head",
    "of_row",
    "overlap",
    "parse",
    "row_count",
    "s2_attention",
    "sf_attention",
    "union",
]
