"""The operator: attention of one device over any spans of a sequence, forward and backward.

Two custom operators, so that torch.compile sees one node per call, whatever kernel runs, and so that selective
checkpointing can keep ``torch.ops.ringspan.attend`` instead of running it twice. A mask travels as its text and its
document boundaries as a tensor: another packing of documents is data and compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ringspan.kernels.mask import And, Causal, Documents, Full, Mask, Span
from ringspan.kernels.masks.expression import parse
from ringspan.kernels.merge import join_sinks, sinks_gradient
from ringspan.kernels.parts import Part, parts_of
from ringspan.kernels.select import Backend, select
from ringspan.kernels.state import Gradients, Running, Saved, accumulator
from ringspan.kernels.work import Work, work

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | str = Causal(),  # noqa: B008 - a frozen value
    q_spans: Sequence[Span] | None = None,
    k_spans: Sequence[Span] | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
    boundaries: Tensor | None = None,
    backend: str = "auto",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of local queries over local keys; differentiable in q, k, v and sinks, through out and lse.

    Shapes: B batch, M queries, N keys, H query heads, G KV heads (H a multiple of G), D head dim.

    Args:
        q: [B, M, H, D]; k, v: [B, N, G, D].
        mask: over global positions, a value or its text.
        q_spans, k_spans: the global positions of the rows, ascending; None: 0 to M, and 0 to N.
        sinks: [H] learned logits of one more key without a value, joined to the result.
        scale: factor on the logits; None: D ** -0.5.
        first_kv_head, total_kv_heads: where these KV heads stand among the model's, for masks that differ by head.
        boundaries: document boundaries as an int64 tensor (rows of a batch one after the other), in place of a
            Documents in ``mask``.
        backend: "auto", or the name of the kernel to take: see ``kernels.select``.
        out_dtype: of out; None: fp32 (fp64 for fp64). With q's own, a kernel that rounds its result may be taken.

    Returns:
        out [B, M, H, D] and lse [B, M, H] (natural log, fp32, fp64 for fp64); 0 and -inf for a row without keys.

    Raises:
        ValueError: names the argument, its value and the rule.
    """
    text, edges = _text(mask)
    if edges is not None:
        if boundaries is not None:
            raise ValueError("boundaries: given twice, as a tensor and within the mask; give one of them")
        boundaries = torch.tensor(edges)
    check_tensors(q, k, v, sinks)
    spans = [_flat(spans, size) for spans, size in ((q_spans, q.shape[1]), (k_spans, k.shape[1]))]
    _check_spans("q_spans", spans[0], q.shape[1])
    _check_spans("k_spans", spans[1], k.shape[1])
    total = first_kv_head + k.shape[2] if total_kv_heads is None else total_kv_heads
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = accumulator(q.dtype) if out_dtype is None else out_dtype
    return torch.ops.ringspan.attend(
        q, k, v, sinks, boundaries, text, *spans, [first_kv_head, total], scale, backend, wide
    )


@torch.library.custom_op("ringspan::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    boundaries: Tensor | None,
    mask: str,
    q_spans: Sequence[int],
    k_spans: Sequence[int],
    heads: Sequence[int],
    scale: float,
    backend: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    wide = accumulator(q.dtype)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    for part, each, kernel in _calls(q, k, boundaries, mask, q_spans, k_spans, heads, backend, out_dtype == q.dtype):
        total = Running(part.take(out), part.take(lse), bytearray(q.shape[1]), alone=out_dtype == q.dtype)
        kernel.forward(total, part.take(q), part.take(k), part.take(v), each, scale=scale)
        part.put(out, total.out)
        part.put(lse, total.lse)
    if sinks is not None:
        out, lse = join_sinks(out, lse, sinks)
    return out.to(out_dtype), lse


@torch.library.custom_op("ringspan::attend_backward", mutates_args=())
def _attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    boundaries: Tensor | None,
    mask: str,
    q_spans: Sequence[int],
    k_spans: Sequence[int],
    heads: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    saved = Saved(q, out, lse, dout, dlse)
    for part, each, kernel in _calls(q, k, boundaries, mask, q_spans, k_spans, heads, backend, out.dtype == q.dtype):
        total = Gradients(*(part.take(x) for x in (dq, dk, dv)))
        kernel.backward(total, saved.part(part), part.take(k), part.take(v), each, scale=scale)
        for whole, piece in zip((dq, dk, dv), total, strict=True):
            part.put(whole, piece)
    dsinks = q.new_zeros(0)
    if sinks is not None:
        dsinks = sinks_gradient(lse, sinks, saved.delta)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3], dtype=accumulator(q.dtype), device=q.device)
    return torch.empty(q.shape, dtype=rest[-1], device=q.device), lse


@_attend_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del dout, dlse, out, lse
    sinks = rest[0]
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), dsinks  # pyright: ignore[reportReturnType]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, boundaries, *ctx.plain, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, sinks, boundaries)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, sinks, boundaries = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(q)
    dq, dk, dv, dsinks = torch.ops.ringspan.attend_backward(
        dout.to(q.dtype), dlse, q, k, v, out, lse, sinks, boundaries, *ctx.plain
    )
    return dq, dk, dv, None if sinks is None else dsinks, *[None] * 8


_attend.register_autograd(_gradient, setup_context=_setup_context)


def _calls(
    q: Tensor,
    k: Tensor,
    boundaries: Tensor | None,
    mask: str,
    q_spans: Sequence[int],
    k_spans: Sequence[int],
    heads: Sequence[int],
    backend: str,
    rounded: bool,
) -> list[tuple[Part, Work, Backend]]:
    """Take a call apart; ``rounded``: the result leaves in the inputs' dtype, so a kernel that rounds it may serve."""
    edges = None if boundaries is None else tuple(boundaries.tolist())
    calls = []
    for part in parts_of(_mask(mask, edges), q.shape[0], k.shape[2], *heads):
        each = work(part.mask, _spans(q_spans), _spans(k_spans))
        kernel = select(q.device, q.dtype, q.shape[3], backend=backend, alone=each if rounded else None)
        calls.append((part, each, kernel))
    return calls


@lru_cache(maxsize=256)
def _mask(text: str, edges: tuple[int, ...] | None) -> Mask:
    mask = parse(text)
    if edges is None:
        return mask
    starts = [index for index, edge in enumerate(edges) if edge == 0]  # each row's list starts at 0, and nowhere else
    rows = [edges[a:b] for a, b in zip(starts, [*starts[1:], len(edges)], strict=True)]
    return mask & Documents(rows[0] if len(rows) == 1 else rows)


def _text(mask: Mask | str) -> tuple[str, list[int] | None]:
    """Split a mask into its text without documents, and the boundaries one row after the other; a text stays whole."""
    if isinstance(mask, str):
        return mask, None
    parts = mask.parts if isinstance(mask, And) else (mask,)
    rest = tuple(part for part in parts if not isinstance(part, Documents))
    documents = [part for part in parts if isinstance(part, Documents)]
    text = str(And(rest) if len(rest) > 1 else rest[0] if rest else Full())
    if not documents:
        return text, None
    rows: Any = documents[0].rows or (documents[0].boundaries,)
    return text, [edge for row in rows for edge in row]


def _flat(spans: Sequence[Span] | None, size: int) -> list[int]:
    return [0, size] if spans is None else [edge for span in spans for edge in span]


def _spans(flat: Sequence[int]) -> tuple[Span, ...]:
    return tuple(Span(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True) if a < b)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """Raise ValueError unless q [B, M, H, D], k and v [B, N, G, D] and sinks [H] fit: sizes, heads, dtype, device."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q, k, v: shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
            "must be [B, L, H, D] and twice [B, L, G, D]"
        )
    heads, groups = q.shape[2], k.shape[2]
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"k: shape {tuple(k.shape)} does not fit q's {tuple(q.shape)}; batch and head dim must be equal"
        )
    if groups < 1 or heads % groups:
        raise ValueError(f"k: {groups} KV heads for {heads} query heads; the query heads must be a multiple of them")
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype}; must be one of float64, float32, bfloat16, float16"
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, k, v: devices {q.device}, {k.device}, {v.device}; must be one device")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks: shape {tuple(sinks.shape)}; must be [{heads}], one logit per query head")


def _check_spans(name: str, spans: list[int], size: int) -> None:
    held = sum(stop - start for start, stop in zip(spans[::2], spans[1::2], strict=True))
    if spans != sorted(spans) or (spans and spans[0] < 0) or held != size:
        raise ValueError(f"{name}: {spans} hold {held} tokens of {size}; must be ascending, disjoint and hold all")
