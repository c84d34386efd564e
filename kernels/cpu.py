"""Attention on the CPU by torch's flash operator, tile by tile; exact to the dtype of the sums.

A call's items become tiles (``kernels.tiles``), and tiles of one shape one batch of the operator. Empty tiles are never
computed. The operator returns its results in the dtype of its inputs, and a row's partial results must stay fp32 until
the last cast (bf16 partials cost 1.4 times the error), so bf16 is widened first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ringspan.kernels.cpu_calls import NARROW, run_backward, run_forward
from ringspan.kernels.cpu_views import Rows, add, add_keys, by_heads, combine, take, take_keys
from ringspan.kernels.masks.span import Span, union
from ringspan.kernels.state import Gradients, Running, Saved, accumulator
from ringspan.kernels.tiles import Shape, Tiles, tiles_of
from ringspan.kernels.work import Sweep, Work

NAME = "cpu"
WHY = "torch's flash operator over rectangles, triangles and batched bands"
CHUNK = 512  # rows of a narrow tile that are computed at once
BUDGET = 1 << 20  # elements of queries, keys and values that a batch of tiles may hold: what stays in the caches

_plans: WeakKeyDictionary[Sweep, tuple[Tiles, ...]] = WeakKeyDictionary()
_singles: WeakKeyDictionary[Sweep, tuple[Tiles, ...] | None] = WeakKeyDictionary()


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return what this backend cannot do, and the remedy, in one line; None where it can."""
    del head_dim
    if device.type != "cpu":
        return f"the cpu kernel takes CPU tensors, not {device.type}; take backend 'reference' or 'triton'"
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"the cpu kernel has no {dtype}; cast to bfloat16 or float32"
    return None


def plan(sweep: Sweep) -> tuple[Tiles, ...]:
    """Return the (cached) tiles of a sweep."""
    if sweep not in _plans:
        _plans[sweep] = tiles_of(sweep.items)
    return _plans[sweep]


def single_tiles(work: Work) -> tuple[Tiles, ...] | None:
    """Return full and causal tiles of which no row meets two, or None where the work is not made of such."""
    if len(work.sweeps) != 1 or work.sweeps[0].rows is not None:
        return None
    (sweep,) = work.sweeps
    if sweep not in _singles:
        found = tiles_of(sweep.items, triangle=2)
        met = sum(tiles.shape.rows * len(tiles.rows) for tiles in found)
        held = sum(span.size for span in union(item.rows for item in sweep.items))
        fits = met == held and all(tiles.shape.full or tiles.shape.causal for tiles in found)
        _singles[sweep] = found if fits else None
    return _singles[sweep]


def forward(total: Running, q: Tensor, k: Tensor, v: Tensor, work: Work, *, scale: float) -> None:
    """Add the attention of ``q`` over these keys to ``total``, in place.

    Args:
        total: results over the keys met so far.
        q: [B, M, H, D]; k, v: [B, N, G, D], H a multiple of G; their last stride is 1.
        work: which rows see which keys.
        scale: factor on the logits.
    """
    wide = accumulator(q.dtype)
    single = single_tiles(work) if total.alone and q.dtype == torch.bfloat16 and total.fresh else None
    if single is not None:
        _forward_tiles(total, Rows(q, k.shape[2]), k, v, single, scale)
        return
    q, k, v = q.to(wide), by_heads(k.to(wide)), by_heads(v.to(wide))
    queries = Rows(q, k.shape[2])
    for sweep in work.sweeps:
        rows, keys = sweep.rows, sweep.keys
        if rows is None or keys is None:
            _forward_tiles(total, queries, k, v, plan(sweep), scale)
            continue
        part = Running.like(q)
        _forward_tiles(part, queries.part(rows), k[:, keys], v[:, keys], plan(sweep), scale)
        back = rows.argsort()
        total.add(Span(0, sweep.height), part.out[:, back], part.lse[:, back])


def backward(total: Gradients, saved: Saved, k: Tensor, v: Tensor, work: Work, *, scale: float) -> None:
    """Add the gradients of these pairs to ``total``, in place.

    Args:
        total: running gradients.
        saved: the query rows' operands and final results.
        k, v: [B, N, G, D].
        work: which rows see which keys.
        scale: factor on the logits.
    """
    operands = _operands(saved, k.shape[2])
    extra = operands[0].plain.shape[-1] - saved.q.shape[-1]
    k, v = (by_heads(F.pad(x.to(saved.lse.dtype), (0, extra)) if extra else x.to(saved.lse.dtype)) for x in (k, v))
    for sweep in work.sweeps:
        rows, keys = sweep.rows, sweep.keys
        if rows is None or keys is None:
            _backward_sweep(total, operands, k, v, sweep, scale)
            continue
        part = Gradients(*(torch.zeros_like(x) for x in total))
        q, out, lse, dout = (x.part(rows) for x in operands)
        _backward_sweep(part, (q, out, lse, dout), k[:, keys], v[:, keys], sweep, scale)
        for whole, piece, order in zip(total, part, (rows, keys, keys), strict=True):
            whole.add_(piece[:, order.argsort()])


def _forward_tiles(total: Running, q: Rows, k: Tensor, v: Tensor, found: Iterable[Tiles], scale: float) -> None:
    heads = lambda x: x.unflatten(2, (q.groups, -1))  # noqa: E731  [B, M, G, R, ...]
    out, lse = heads(total.out), heads(total.lse)
    for tiles in found:
        shape = tiles.shape
        spans = [Span(row, row + shape.rows) for row in tiles.rows]
        fresh = all(total.touched.find(1, span.start, span.stop) < 0 for span in spans)
        for b, batch in _batches(tiles, q.plain, k):
            repeat = _repeat(shape, out)
            queries = _take_rows(q, b, batch, repeat)
            keys, values = (_take_keys(x[b], batch) for x in (k, v))
            parts = run_forward(batch.shape, repeat, queries, keys, values, scale)
            part_out, part_lse = (_unfold(x, out, repeat) for x in parts)
            combine(out[b], lse[b], batch.rows, part_out, part_lse, fresh)
        for span in spans:
            total.touch(span)


def _backward_sweep(
    total: Gradients, rows: tuple[Rows, Rows, Rows, Rows], k: Tensor, v: Tensor, sweep: Sweep, scale: float
) -> None:
    dq = total.dq.unflatten(2, (k.shape[2], -1))
    dim = dq.shape[-1]
    for tiles in plan(sweep):
        shape = tiles.shape
        repeat = _repeat(shape, dq)
        for b, batch in _batches(tiles, rows[0].plain, k):
            q, out, lse, dout = (_take_rows(x, b, batch, repeat) for x in rows)
            keys, values = (_take_keys(x[b], batch) for x in (k, v))
            found = run_backward(batch.shape, repeat, (q, out, lse, dout), keys, values, scale)
            add(dq[b], batch.rows, _unfold(found.dq, dq, repeat)[..., :dim])
            for whole, part in ((total.dk, found.dk), (total.dv, found.dv)):
                add_keys(whole[b], batch.columns, shape.width, shape.hole, part.transpose(1, 2)[..., :dim])


def _operands(saved: Saved, groups: int) -> tuple[Rows, Rows, Rows, Rows]:
    """Return q, out, lse, dout in the dtype of the sums, kept for the next keys of the same rows.

    The operator subtracts rowsum(dout * out); a gradient of lse enters as one more feature that contributes -dlse to
    that sum and nothing to the logits: dout has a 1, out has -dlse, and q, k, v have a 0.
    """
    cache = saved.cache
    if "cpu" not in cache:
        q, out, dout = (x.to(saved.lse.dtype) for x in (saved.q, saved.out, saved.dout))
        if saved.dlse is not None:
            q, dout = F.pad(q, (0, 1)), F.pad(dout, (0, 1), value=1.0)
            out = torch.cat([out, -saved.dlse.to(out.dtype).unsqueeze(-1)], -1)
        cache["cpu"] = Rows(q, groups), Rows(out, groups), Rows(saved.lse, groups), Rows(dout, groups)
    return cache["cpu"]


def _batches(tiles: Tiles, q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tiles]]:
    """Yield (batch rows, tiles) of single calls: one tile of all rows of the batch, or some tiles of one row."""
    shape, rows, columns = tiles
    if len(rows) == 1:
        # Several products pass over the rows of a narrow tile: block by block they find them in the caches.
        size = CHUNK if shape.full and shape.keys <= NARROW else shape.rows
        for start in range(0, shape.rows, size):
            part = shape._replace(rows=min(size, shape.rows - start))
            yield slice(0, q.shape[0]), Tiles(part, [rows[0] + start], columns)
        return
    size = shape.rows * q[0, 0].numel() + shape.keys * k[0, 0].numel()
    count = max(1, BUDGET // size)
    for b in range(q.shape[0]):
        for start in range(0, len(rows), count):
            yield slice(b, b + 1), Tiles(shape, rows[start : start + count], columns[start : start + count])


def _repeat(shape: Shape, heads: Tensor) -> int:
    """Return how many folded rows a row becomes; a causal tile keeps its heads apart."""
    return 1 if shape.causal else heads.shape[3]


def _take_rows(x: Rows, b: slice, tiles: Tiles, repeat: int) -> Tensor:
    if tiles.shape.causal:
        return take(x.plain[b], tiles.rows, tiles.shape.rows).transpose(1, 2)
    starts = [row * repeat for row in tiles.rows]
    return take(x.folded[b], starts, tiles.shape.rows * repeat).transpose(1, 2)


def _take_keys(x: Tensor, tiles: Tiles) -> Tensor:
    return take_keys(x, tiles.columns, tiles.shape.width, tiles.shape.hole).transpose(1, 2)


def _unfold(x: Tensor, like: Tensor, repeat: int) -> Tensor:
    """Return a result [T, heads, folded rows(, D)] as [T, rows, G, R(, D)], a view."""
    if repeat == 1:
        return x.unflatten(1, like.shape[2:4]).movedim(3, 1)
    return x.unflatten(2, (-1, repeat)).movedim(1, 2)
