"""Backend ``library``: one call of another library's attention operator per rectangle, for dense and causal works.

These operators round out to the inputs' dtype, and dK, dV too. A row's or a key's results therefore come from a single
call, or the rounding of partial results would show: works in which a row or a key meets two rectangles are not served,
and the caller sends further keys for the same rows elsewhere.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.kernels import library_ops
from ringspan.kernels.library_ops import Operators
from ringspan.kernels.masks.span import Span
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.work import Item, Work

NAME = "library"
WHY = "cuDNN's or FlashAttention's operators, one call per full or causal rectangle"
HEAD_DIM = 248  # 256 is the operators' own limit, and the gradient of lse travels in 8 features of its own
SMALL = 1024  # rows per call below which several calls cost more than our own kernels' one launch
_FEATURES = 8


class Rectangle(NamedTuple):
    """Local rows and columns of one call; causal: the last row sees every column, each row before it one fewer."""

    rows: Span
    keys: Span
    causal: bool


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return one line that says why inputs like these cannot be served, and what to do; None if they can."""
    if device.type != "cuda":
        return f"library: its operators run on CUDA, not on {device.type}; use backend='auto'"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"library: its operators take bfloat16 and float16, not {str(dtype)[6:]}; use backend='triton'"
    if head_dim % 8 or head_dim > HEAD_DIM:
        return f"library: head dim {head_dim} is no multiple of 8 up to {HEAD_DIM}; use backend='triton'"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "library: its operators need compute capability 8.0 or later; use backend='reference'"
    found, why = library_ops.operators(device, dtype, head_dim)
    return None if found else f"{why}; use backend='triton'"


def serves(work: Work, dtype: torch.dtype) -> str | None:
    """Return one line that says why this work cannot be served in ``dtype``; None if it can.

    Only the work is looked at: a caller that merges the results of several works for one row must not send them here.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"library: {str(dtype)[6:]} is not bfloat16 or float16"
    found = rectangles(work)
    if isinstance(found, str):
        return f"library: {found}"
    if len(found) > 1 and sum(one.rows.size for one in found) < SMALL * len(found):
        return f"library: {len(found)} calls of fewer than {SMALL} rows each cost more than one launch of our own"
    return None


@lru_cache(maxsize=1024)
def rectangles(work: Work) -> tuple[Rectangle, ...] | str:
    """Return the calls that compute a work, disjoint in rows and in columns; or why there are none."""
    if len(work.sweeps) > 1 or any(sweep.rows is not None for sweep in work.sweeps):
        return f"{work.mask} is dense only in another order of the rows"
    parts: list[Rectangle] = []
    for item in (item for sweep in work.sweeps for item in sweep.items):
        found = _split(item)
        if found is None:
            return f"{work.mask} cuts off keys that are too far back, which no full or causal rectangle does"
        parts += found
    parts = _joined(parts)
    for side in ("rows", "keys"):
        spans = sorted(getattr(part, side) for part in parts)
        if any(a.stop > b.start for a, b in pairwise(spans)):
            return (
                f"{side} of {work.mask} meet two rectangles, and partial results would be rounded to the inputs' dtype"
            )
    return tuple(parts)


def _split(item: Item) -> list[Rectangle] | None:
    """Return an item as a causal rectangle above a full one (either may be missing); None if it has a lower edge."""
    (start, stop), (first, last, low, high) = item.rows, item.strip[:4]
    if stop - 1 + low > first:
        return None
    whole = min(max(last - high + 1, start), stop)  # rows from here on lie below the diagonal that ends at ``last``
    parts = []
    if whole > start:
        parts.append(Rectangle(Span(start, whole), Span(first, whole - 1 + high), True))
    if whole < stop:
        parts.append(Rectangle(Span(whole, stop), Span(first, last), False))
    return [part._replace(causal=part.causal and part.rows.size > 1) for part in parts]  # one row: full is the same


def _joined(parts: list[Rectangle]) -> list[Rectangle]:
    """Join what lies side by side for the same rows: keys held in two spans, an earlier part beside a diagonal."""
    joined: list[Rectangle] = []
    for part in sorted(parts):
        before = joined[-1] if joined else None
        if before and before.rows == part.rows and not before.causal and before.keys.stop == part.keys.start:
            joined[-1] = Rectangle(part.rows, Span(before.keys.start, part.keys.stop), part.causal)
        else:
            joined.append(part)
    return joined


def forward(
    total: Running, q: Tensor, k: Tensor, v: Tensor, work: Work, *, scale: float, taken: Operators | None = None
) -> None:
    """Add the attention of a work into ``total``; see ``kernels.state``.

    Args:
        taken: the operators to call; None takes the best of ``library_ops``.

    Raises:
        ValueError: for a work that ``serves`` names a reason against.
    """
    taken = taken or _taken(q)
    for rows, keys, causal in _calls(work):
        out, lse = taken.forward(_cut(q, rows), _cut(k, keys), _cut(v, keys), scale=scale, causal=causal)
        total.add(rows, out, lse)


def backward(
    total: Gradients, saved: Saved, k: Tensor, v: Tensor, work: Work, *, scale: float, taken: Operators | None = None
) -> None:
    """Add the gradients of a work into ``total``; arguments as in ``forward``."""
    taken = taken or _taken(saved.q)
    dim = k.shape[-1]
    for rows, keys, causal in _calls(work):
        operands = [_cut(x, rows) for x in (saved.dout, saved.q)] + [_cut(x, keys) for x in (k, v)]
        operands.append(_cut(saved.out, rows).to(k.dtype))
        if saved.dlse is not None:
            operands = _with_features(operands, _cut(saved.dlse, rows))
        dq, dk, dv = taken.backward(*operands, _cut(saved.lse, rows).float(), scale=scale, causal=causal)
        total.dq[:, rows.start : rows.stop] += dq[..., :dim]
        total.dk[:, keys.start : keys.stop] += dk[..., :dim]
        total.dv[:, keys.start : keys.stop] += dv[..., :dim]


def _with_features(operands: list[Tensor], dlse: Tensor) -> list[Tensor]:
    """Widen (dout, q, k, v, out) by features that carry the gradient of lse and touch nothing else.

    The operators know lse's gradient only as part of delta = rowsum(dout * out). Features that are 1 in dout and -dlse
    in out make it rowsum(dout * out) - dlse; those of q, k and v are 0, so logits and dout v^T stay. dlse is cut into
    three parts of the inputs' dtype, which together hold all of its bits but the last few.
    """
    dout, q, k, v, out = (torch.nn.functional.pad(x, (0, _FEATURES)) for x in operands)
    rest, dim = -dlse.float(), operands[0].shape[-1]
    dout[..., dim : dim + 3] = 1
    for feature in range(dim, dim + 3):
        out[..., feature] = rest.to(out.dtype)
        rest = rest - out[..., feature].float()
    return [dout, q, k, v, out]


def _calls(work: Work) -> tuple[Rectangle, ...]:
    found = rectangles(work)
    if isinstance(found, str):
        raise ValueError(f"library: {found}; use backend='auto'")
    return found


def _taken(x: Tensor) -> Operators:
    found, why = library_ops.operators(x.device, x.dtype, x.shape[-1])
    if found is None:
        raise ValueError(f"{why}; use backend='triton'")
    return found


def _cut(x: Tensor, span: Span) -> Tensor:
    return x[:, span.start : span.stop]
