"""Masks as values: which keys a query may see. All of them, and what takes them apart, under one name.

A position is a token's index in the global sequence; a ``Span`` is half-open, ``[start, stop)``. How masks compose is
in ``composition.py``, how they are written in ``expression.py``, how they become intervals in ``pieces.py`` and
``strips.py``.
"""

from ringspan.kernels.composition import And, Mask, Or
from ringspan.kernels.documents import Documents, batch_rows, of_row, row_count
from ringspan.kernels.expression import parse
from ringspan.kernels.heads import Interleaved, PerHead, by_head, s2_attention, sf_attention
from ringspan.kernels.patterns import Causal, Dilated, Full, Groups, Sinks, Window
from ringspan.kernels.span import END, Span, overlap, union
from ringspan.kernels.strips import Strip

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
