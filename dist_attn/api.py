"""The public call: validate, let the ranks agree, plan, run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringspan.dist_attn.exchange import Exchange, Traffic, agree
from ringspan.dist_attn.layout import Contiguous, Layout
from ringspan.dist_attn.planner import Plan, check_strategy
from ringspan.dist_attn.ring import Call, RingAttention
from ringspan.dist_attn.schedule import Schedule, schedule
from ringspan.kernels.attention import attend, check_tensors
from ringspan.kernels.mask import Causal, Mask
from ringspan.kernels.parts import Part, parts_of
from ringspan.kernels.select import select

Group = dist.ProcessGroup | DeviceMesh | None


@dataclass(frozen=True)
class Extras:
    """What a caller that has agreed on its batch beforehand adds: see ``parallel.context``.

    ``label`` tells layers with equal plans apart; ``traffic`` counts bytes; ``agreed`` skips the per-call agreement;
    ``keep`` says that the caller keeps the result and gives it back as ``kept`` to an identical call, which then does
    not run; ``backend`` names the kernel.
    """

    label: int = 0
    traffic: Traffic | None = None
    agreed: bool = False
    keep: bool = False
    kept: tuple[Tensor, Tensor] | None = None
    backend: str = "auto"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Sequence[Mask] = Causal(),  # noqa: B008 - a frozen value
    group: Group = None,
    layout: Layout | None = None,
    strategy: str = "auto",
    sinks: Tensor | None = None,
    scale: float | None = None,
    length: int | None = None,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
    traffic: Traffic | None = None,
    backend: str = "auto",
) -> Tensor:
    """Exact attention over a sequence that is sharded over ``group``; differentiable in q, k, v and sinks.

    Shapes: B batch, L this rank's tokens, H query heads, G KV heads (H a multiple of G), D head dim.

    Args:
        q: [B, L, H, D]; k, v: [B, L, G, D]; one dtype of float64, float32, bfloat16, float16.
        mask: over global positions; one for all batch rows, or a sequence of B.
        group: None: this process holds all tokens. Else the ranks that share the sequence.
        layout: who holds which tokens; required when the group has more than one rank.
        strategy: "ring", or "auto" (takes the ring).
        sinks: [H] learned logits of one more key without a value; ``sinks.grad`` is this rank's part, to be summed over
            the group with the other parameters' gradients.
        scale: factor on the logits; None: D ** -0.5.
        length: global tokens; None: world x L. Give it where shares are uneven.
        first_kv_head, total_kv_heads: where this rank's KV heads stand among the model's (tensor parallelism).
        traffic: counters of bytes moved, added to in place.
        backend: the kernel: "auto", or one of ``kernels.select.BACKENDS`` by name.

    Returns:
        out [B, L, H, D] in q's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: on every rank alike, naming the argument, its value and the rule.
    """
    return attention_with_lse(
        q,
        k,
        v,
        mask=mask,
        group=group,
        layout=layout,
        strategy=strategy,
        sinks=sinks,
        scale=scale,
        length=length,
        first_kv_head=first_kv_head,
        total_kv_heads=total_kv_heads,
        traffic=traffic,
        backend=backend,
    )[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Sequence[Mask] = Causal(),  # noqa: B008 - a frozen value
    group: Group = None,
    layout: Layout | None = None,
    strategy: str = "auto",
    sinks: Tensor | None = None,
    scale: float | None = None,
    length: int | None = None,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
    traffic: Traffic | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Like ``attention``; also return lse [B, L, H], natural log, fp32 (fp64 for fp64), sinks joined; differentiable.

    lse is -inf for a query that sees no key and has no sink.
    """
    return run(
        q,
        k,
        v,
        mask=mask,
        group=group,
        layout=layout,
        strategy=strategy,
        sinks=sinks,
        scale=scale,
        length=length,
        first_kv_head=first_kv_head,
        total_kv_heads=total_kv_heads,
        extras=Extras(traffic=traffic, backend=backend),
    )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Sequence[Mask],
    group: Group,
    layout: Layout | None,
    strategy: str,
    sinks: Tensor | None,
    scale: float | None,
    length: int | None,
    extras: Extras,
    first_kv_head: int = 0,
    total_kv_heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Validate, agree, plan and run; the arguments are ``attention``'s."""
    process_group = to_group(group)
    rank, world = place(process_group)
    fault, parts, kernel = None, (), None
    try:
        check_tensors(q, k, v, sinks)
        _check_heads(q, k, first_kv_head, total_kv_heads)
        check_strategy(strategy)
        length = _check_length(q.shape[1], layout, rank, world, length)
        parts = parts_of(mask, q.shape[0], k.shape[2], first_kv_head, total_kv_heads)
        for part in parts:
            part.mask.check(length)
        kernel = select(q.device, q.dtype, q.shape[-1], backend=extras.backend)
    except ValueError as error:
        if world == 1 or extras.agreed:
            raise
        fault = str(error)
    layout = layout or Contiguous()
    if world > 1 and not extras.agreed:
        facts = "" if fault else _facts(q, k, parts, layout, length, strategy, scale, sinks)
        agree(process_group, facts, fault)
    assert length is not None
    assert kernel is not None
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if world == 1 and isinstance(mask, Mask) and not extras.keep:
        # All tokens are here: one operator, that torch.compile and selective checkpointing know.
        heads = {"first_kv_head": first_kv_head, "total_kv_heads": total_kv_heads}
        options = {"backend": extras.backend, "out_dtype": q.dtype}
        return attend(q, k, v, mask=mask, sinks=sinks, scale=scale, **heads, **options)
    planned = tuple((part, schedule(part.mask, layout, world, length)) for part in parts)
    exchange = None
    if process_group is not None and world > 1:
        digest = _digest(planned, q, k)
        exchange = Exchange(process_group, digest, extras.label, extras.traffic or Traffic())
    call = Call(planned, rank, exchange, scale, kernel)
    return RingAttention.apply(q, k, v, sinks, call, extras.kept)  # pyright: ignore[reportReturnType]


def to_group(group: Group) -> dist.ProcessGroup | None:
    """Return the process group of a 1-D mesh, or the group itself."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group: a mesh of {group.ndim} dimensions; give a ProcessGroup or a 1-D mesh")
        return group.get_group()
    return group


def place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return (rank, world) within the group; (0, 1) for None."""
    if group is None:
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: this process is not one of its ranks")
    return rank, dist.get_world_size(group)


def _digest(planned: tuple[tuple[Part, Schedule], ...], q: Tensor, k: Tensor) -> str:
    shares = tuple(part.share for part, _ in planned)
    schedules = tuple(each for _, each in planned)
    return Plan(schedules, shares, "ring", q.shape[2], k.shape[2], q.shape[3], q.dtype).hash


def _facts(
    q: Tensor,
    k: Tensor,
    parts: tuple[Part, ...],
    layout: Layout,
    length: int | None,
    strategy: str,
    scale: float | None,
    sinks: Tensor | None,
) -> str:
    masks = "; ".join(
        str(part.mask)
        if len(parts) == 1
        else f"{part.mask} (rows {part.rows.start}:{part.rows.stop}, heads {part.heads})"
        for part in parts
    )
    return (
        f"batch {q.shape[0]}, length {length}, heads {q.shape[2]}/{k.shape[2]} x {q.shape[3]}, {q.dtype}, "
        f"{layout}, {strategy}, scale {scale}, sinks {sinks is not None}, mask {masks}"
    )


def _check_length(local: int, layout: Layout | None, rank: int, world: int, length: int | None) -> int:
    if layout is None and world > 1:
        raise ValueError(f"layout: required with {world} ranks; say who holds which tokens, e.g. layout=ZigZag()")
    length = world * local if length is None else length
    share = local if layout is None else layout.share(rank, world, length)
    if layout is None and length != local:
        raise ValueError(f"length: {length}, but the only rank holds {local} tokens")
    if share != local:
        raise ValueError(
            f"q: {local} tokens, but rank {rank} of {world} holds {share} of {length} in {layout}; "
            "shard with the same layout, and pass length= where shares are uneven"
        )
    return length


def _check_heads(q: Tensor, k: Tensor, first_kv_head: int, total_kv_heads: int | None) -> None:
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k: shape {tuple(k.shape)} does not fit q's {tuple(q.shape)}; tokens must be equal")
    total = first_kv_head + k.shape[2] if total_kv_heads is None else total_kv_heads
    if first_kv_head < 0 or first_kv_head + k.shape[2] > total:
        raise ValueError(f"first_kv_head: {first_kv_head} + {k.shape[2]} KV heads here exceeds total_kv_heads {total}")
