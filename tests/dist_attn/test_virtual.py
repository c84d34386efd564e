"""Four virtual ranks in one process through every strategy's executor, plan and messages; on a GPU where there is one.

Each rank is a thread; only the wire is replaced, by mailboxes. So that a machine with a single accelerator can run a
ring on it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from virtual_ranks import apart, threads

from dense import attention as dense_attention
from dense import relative_rms
from ringspan.dist_attn import Causal, Contiguous, Documents, PerHead, Sinks, Window, ZigZag, s2_attention
from ringspan.dist_attn.exchange import Traffic
from ringspan.dist_attn.executor import Wiring
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.planner import plan
from ringspan.dist_attn.strategies import TABLE
from ringspan.kernels.mask import Mask, by_head
from ringspan.kernels.merge import join_sinks
from ringspan.kernels.select import select
from ringspan.kernels.state import Saved

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORLD = 4
MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window and sinks": Causal() & (Window(20) | Sinks(3)),
    "documents": Causal() & (Window(20) | Sinks(2)) & Documents([0, 31, 90, 91, 150]),
    "heads": PerHead({(0, 1): Causal(), (1, 2): Causal() & Window(7)}),
    "s2": s2_attention(48),
}
LENGTH = 150


@pytest.mark.parametrize("strategy", TABLE)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("layout", [ZigZag(), Contiguous()], ids=["zigzag", "contiguous"])
def test_four_virtual_ranks_compute_what_dense_attention_does(name: str, layout: Layout, strategy: str) -> None:
    mask, dtype = MASKS[name], torch.float32
    g = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn(1, LENGTH, h, 16, generator=g).to(DEVICE) for h in (4, 2, 2, 4))
    sinks = torch.tensor([2.0, -1.0, 3.0, 0.5], device=DEVICE)
    kernel = select(DEVICE, dtype, 16)
    mesh = (2, 2) if strategy in ("double_ring", "ulysses_ring") else (WORLD,)
    shape = {"length": LENGTH, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": dtype, "sinks": True}
    planned = plan(mask, layout, world=mesh, strategy=strategy, **shape)

    def rank(wiring: Wiring, traffic: Traffic) -> tuple[list[Tensor], int, int]:
        spans = layout.spans(wiring.rank, WORLD, LENGTH)
        own = lambda x: torch.cat([x[:, a:b] for a, b in spans], 1)  # noqa: E731
        executor = TABLE[strategy].executor(planned.problem, wiring, kernel, 0.25)
        out, lse, rest = executor.forward(own(q), own(k), own(v))
        out, lse = join_sinks(out, lse, sinks)
        received = traffic.received_payload
        saved = Saved(own(q), out.to(dtype), lse, own(dout))
        grads = executor.backward(saved, own(k), own(v), rest)
        return [out, lse, *grads], received, traffic.received_payload - received

    def values(*place: Any) -> Any:
        tensors, forward, backward = rank(*place)
        return [x.tolist() for x in tensors], forward, backward

    results = apart(threads, mesh, values)
    truth = dense(mask, q, k, v, dout, sinks)
    order = [p for number in range(WORLD) for a, b in layout.spans(number, WORLD, LENGTH) for p in range(a, b)]
    for index, expected in enumerate(truth):
        found = torch.cat([torch.tensor(result[0][index]) for result in results], 1)
        whole = torch.empty_like(found)
        whole[:, order] = found
        assert relative_rms(whole, expected.detach()) <= 2e-6
    for number in range(WORLD):
        assert results[number][1] == planned.received_bytes(number)
        assert results[number][2] == planned.received_bytes(number, backward=True)
        if strategy in ("ring", "double_ring"):
            assert planned.received_bytes(number) == planned.lower_bound_bytes(number)


def dense(mask: Mask, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, sinks: Tensor) -> list[Tensor]:
    """Return out, lse, dq, dk, dv in float64; two query heads to each of two KV heads."""
    position = torch.arange(LENGTH)
    exact = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    heads = [(head, plain) for heads, plain in by_head(mask, 0, 2, 2) for head in heads]
    truth = [torch.empty(1, LENGTH, 4, 16, dtype=torch.float64), torch.empty(1, LENGTH, 4, dtype=torch.float64)]
    for head, plain in heads:
        table = plain.allowed(position[:, None], position[None, :])
        mine, one = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        local = (exact[0][:, :, mine], exact[1][:, :, one], exact[2][:, :, one])
        truth[0][:, :, mine], truth[1][:, :, mine] = dense_attention(*local, table, 0.25, sinks.double().cpu()[mine])
    return [*truth, *torch.autograd.grad(truth[0], exact, dout.double().cpu())]
