"""The public call: validate, let the ranks agree, plan, run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.dist_attn.checks import check_heads, check_length, check_wire, facts
from ringspan.dist_attn.cost import Costs, typical
from ringspan.dist_attn.exchange import Exchange, Traffic, agree
from ringspan.dist_attn.executor import ShardedAttention, Wiring
from ringspan.dist_attn.groups import Group, Groups, groups_of, place, to_group
from ringspan.dist_attn.layout import Contiguous, Layout
from ringspan.dist_attn.planner import digest
from ringspan.dist_attn.problem import Problem
from ringspan.dist_attn.strategies import TABLE, choose
from ringspan.kernels.attention import attend, check_tensors
from ringspan.kernels.mask import Causal, Mask
from ringspan.kernels.parts import Part, parts_of
from ringspan.kernels.select import select

__all__ = ["Extras", "Group", "attention", "attention_with_lse", "place", "run", "to_group"]


@dataclass(frozen=True)
class Extras:
    """What else a call may say; the fields beyond ``attention``'s arguments are ``parallel.context``'s.

    ``kv_layout``, ``gradient_dtype``, ``traffic``, ``backend``, ``costs`` and ``debug`` are ``attention``'s. ``label``
    tells layers with equal plans apart; ``agreed`` skips the per-call agreement; ``keep`` says that the caller keeps
    the result and gives it back as ``kept`` to an identical call, which then does not run; ``decided`` is told the
    strategy that was taken, and why.
    """

    kv_layout: Layout | None = None
    gradient_dtype: torch.dtype | None = None
    traffic: Traffic | None = None
    backend: str = "auto"
    costs: Costs | None = None
    debug: bool = False
    label: int = 0
    agreed: bool = False
    keep: bool = False
    kept: tuple[Tensor, Tensor] | None = None
    decided: Callable[[str], None] | None = None


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
    kv_layout: Layout | None = None,
    gradient_dtype: torch.dtype | None = None,
    traffic: Traffic | None = None,
    backend: str = "auto",
    costs: Costs | None = None,
    debug: bool = False,
) -> Tensor:
    """Exact attention over a sequence that is sharded over ``group``; differentiable in q, k, v and sinks.

    Shapes: B batch, L this rank's tokens, H query heads, G KV heads (H a multiple of G), D head dim.

    Args:
        q: [B, L, H, D]; k, v: [B, L, G, D] (with a ``kv_layout``: its share of tokens instead of L); one dtype of
            float64, float32, bfloat16, float16.
        mask: over global positions; one for all batch rows, or a sequence of B.
        group: None: this process holds all tokens. Else the ranks that share the sequence: a ProcessGroup, a 1-D
            mesh, or a 2-D mesh (nodes, ranks in a node) for the hybrids.
        layout: who holds which tokens; required when the group has more than one rank.
        strategy: "ring" (keys travel), "all_gather", "ulysses" (heads against tokens), "dist_attention" (queries
            travel), on a 2-D mesh also "double_ring" and "ulysses_ring"; "auto" takes the one that ``costs`` says is
            fastest.
        sinks: [H] learned logits of one more key without a value; ``sinks.grad`` is this rank's part, to be summed over
            the group with the other parameters' gradients.
        scale: factor on the logits; None: D ** -0.5.
        length: global tokens; None: world x L. Give it where shares are uneven.
        first_kv_head, total_kv_heads: where this rank's KV heads stand among the model's (tensor parallelism).
        kv_layout: who holds which keys and values; None: as the queries.
        gradient_dtype: of dK and dV on their way between ranks; None: fp32 (fp64 for fp64 inputs). They are summed in
            fp32 all the same.
        traffic: counters of bytes moved, added to in place.
        backend: the kernel: "auto", or one of ``kernels.select.BACKENDS`` by name.
        costs: speeds of links and kernels that "auto" reckons with; None: ``cost.typical`` of the device.
        debug: check shapes, dtypes, hops and contents of every message (slow).

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
        kv_layout=kv_layout,
        gradient_dtype=gradient_dtype,
        traffic=traffic,
        backend=backend,
        costs=costs,
        debug=debug,
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
    kv_layout: Layout | None = None,
    gradient_dtype: torch.dtype | None = None,
    traffic: Traffic | None = None,
    backend: str = "auto",
    costs: Costs | None = None,
    debug: bool = False,
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
        extras=Extras(kv_layout, gradient_dtype, traffic, backend, costs, debug),
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
    groups = groups_of(group)
    fault, problem, kernel, chosen = None, None, None, ("", "")
    try:
        check_tensors(q, k, v, sinks)
        length = check_length(q, k, layout, extras.kv_layout, groups, length)
        parts = parts_of(mask, q.shape[0], k.shape[2], first_kv_head, check_heads(k, first_kv_head, total_kv_heads))
        for part in parts:
            part.mask.check(length)
        kernel = select(q.device, q.dtype, q.shape[-1], backend=extras.backend)
        heads = first_kv_head, total_kv_heads
        problem = _problem(q, k, parts, groups, layout or Contiguous(), length, *heads, extras, sinks is not None)
        chosen = choose(strategy, problem, extras.costs or typical(q.device.type))
    except ValueError as error:
        if groups.world == 1 or extras.agreed:
            raise
        fault = str(error)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if groups.world > 1 and not extras.agreed:
        groups.connect()
        words = "" if problem is None else facts(problem, chosen[0], scale)
        agree(groups.flat, words, fault)
    assert kernel is not None
    assert problem is not None
    if groups.world == 1 and isinstance(mask, Mask) and not extras.keep:
        # All tokens are here: one operator, that torch.compile and selective checkpointing know.
        heads = {"first_kv_head": first_kv_head, "total_kv_heads": total_kv_heads}
        options = {"backend": extras.backend, "out_dtype": q.dtype}
        return attend(q, k, v, mask=mask, sinks=sinks, scale=scale, **heads, **options)
    name, why = chosen
    if extras.decided is not None:
        extras.decided(why)
    wiring = _wiring(groups, digest(problem, name), extras)
    executor = TABLE[name].executor(problem, wiring, kernel, scale)
    return ShardedAttention.apply(q, k, v, sinks, executor, extras.kept)  # pyright: ignore[reportReturnType]


def _problem(
    q: Tensor,
    k: Tensor,
    parts: tuple[Part, ...],
    groups: Groups,
    layout: Layout,
    length: int,
    first_kv_head: int,
    total_kv_heads: int | None,
    extras: Extras,
    sinks: bool,
) -> Problem:
    return Problem(
        parts=parts,
        batch=q.shape[0],
        length=length,
        layout=layout,
        kv_layout=extras.kv_layout or layout,
        mesh=groups.mesh,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=q.dtype,
        wire=check_wire(extras.gradient_dtype, q.dtype),
        keep=extras.keep,
        sinks=sinks,
        first_kv_head=first_kv_head,
        total_kv_heads=total_kv_heads,
    )


def _wiring(groups: Groups, digest: str, extras: Extras) -> Wiring:
    """Return the exchanges of one call, over each group of more than one rank."""
    traffic = extras.traffic or Traffic()

    def over(group: dist.ProcessGroup | None) -> Exchange | None:
        if group is None or dist.get_world_size(group) == 1:
            return None
        return Exchange(group, digest, extras.label, traffic, debug=extras.debug)

    return Wiring(groups.rank, over(groups.flat), over(groups.outer), over(groups.inner))
