"""Torch's own context parallelism, a prototype: its private ring template, its public call, its FlexAttention path."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers.arm import Arm, Operator
from peers.cases import Case
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PACKAGE = "torch.distributed.tensor.experimental._context_parallel"
NO_MASK = "its SDPA path takes no mask; only `is_causal`"


def private(name: str) -> Any:
    """Return one of torch's private modules, imported when a row runs: a torch that moved it is a row, not a crash."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def mesh_of(group: dist.ProcessGroup) -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(group),))


class Template(torch.autograd.Function):
    """The two private functions of the ring as one differentiable operator; q, k, v [B, H, L, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        run = private("_attention")._templated_ring_attention
        out, lse, *_ = run(group, 2, operator, q, k, v, is_causal=True, dropout_p=0.0)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        run = private("_attention")._templated_ring_attention_backward
        rest = {"is_causal": True, "dropout_p": 0.0}
        dq, dk, dv, *_ = run(ctx.group, 2, operator, grads[0], "grad_out", q, k, v, out, lse, **rest)
        return dq, dk, dv, None


def shares(length: int, mesh: DeviceMesh, balanced: bool) -> Tensor:
    """Return this rank's rows, as torch's own sharding cuts them."""
    attention = private("_attention")
    balancer = private("_load_balancer")._HeadTailLoadBalancer(length, mesh.size(), "cpu") if balanced else None
    return attention._context_parallel_buffers(mesh, [torch.arange(length)[None]], [1], balancer)[0][0]


def template(case: Case, group: dist.ProcessGroup, *, rotate: str, balanced: bool = True) -> Operator:
    """The ring template with torch's CPU flash operator as its block."""
    attention = private("_attention")
    attention._cp_options.enable_load_balance = balanced
    attention.set_rotate_method(rotate)
    rows = shares(case.length, mesh_of(group), balanced)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        del sinks
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return Template.apply(q, k, v, group).transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]

    return Operator(rows, call)


def public(case: Case, group: dist.ProcessGroup) -> Operator:
    """``context_parallel``: sdpa on tensors that it shards in place."""
    attention, mesh = private("_attention"), mesh_of(group)
    rows = shares(case.length, mesh, True)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        del sinks
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # The shares are cut already; the context itself wants a buffer of the whole length to cut.
        with attention.context_parallel(mesh, buffers=[torch.arange(case.length)], buffer_seq_dims=[0]):
            gqa = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)

    return Operator(rows, call)


def flex(case: Case, group: dist.ProcessGroup) -> Operator:
    """FlexAttention over keys and values that are gathered from all ranks, with the block mask cut by rank."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention, mesh, length = private("_attention"), mesh_of(group), case.length
    document = torch.bucketize(torch.arange(length), torch.tensor(case.boundaries or (0, length)), right=True)

    def rule(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = (row >= column) & (document[row] == document[column])
        return seen if case.window is None else seen & (row - column < case.window)

    whole = create_block_mask(rule, 1, None, length, length, device="cpu")
    balancer = private("_load_balancer")._HeadTailLoadBalancer(length, mesh.size(), "cpu")
    rows, mask = attention._context_parallel_shard(mesh, [torch.arange(length)[None], whole], [1, 2], balancer)
    gather = private("_cp_custom_ops").flex_cp_allgather

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        del sinks
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        k, v = gather(k, v, 2, group.group_name)
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return Operator(rows[0], call)


LACKS = {"documents": NO_MASK, "window": NO_MASK, "sinks": "no sinks"}
TEMPLATE = (
    "`_templated_ring_attention` and its `_backward` with the CPU flash operator, tensors cut by "
    "`_context_parallel_buffers` with `_HeadTailLoadBalancer`, rotation "
)
ARMS = [
    Arm(
        "torch ring template, all-gather",
        None,
        TEMPLATE + "all-gather (its default)",
        operator=partial(template, rotate="allgather"),
        lacks=LACKS,
    ),
    Arm(
        "torch ring template, all-to-all",
        None,
        TEMPLATE + "all-to-all",
        operator=partial(template, rotate="alltoall"),
        lacks=LACKS,
    ),
    Arm(
        "torch `context_parallel`",
        None,
        "the public context manager around `scaled_dot_product_attention(is_causal=True)`",
        operator=public,
        lacks=LACKS,
    ),
    Arm(
        "torch FlexAttention",
        None,
        "`_context_parallel_shard` with a `BlockMask`, `flex_cp_allgather`, eager `flex_attention`",
        operator=flex,
        lacks={"sinks": "no sinks"},
    ),
]
