"""Measure what ``Costs`` reckons with: latency and bandwidth between ranks, and the attention kernel's rates.

Run it the way the training will run, on as many ranks:
``torchrun --nproc-per-node 2 benchmarks/links.py --out links.json``, then ``ringspan plan CONFIG --costs links.json``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ringspan.dist_attn.cost import BACKWARD_FLOPS, FORWARD_FLOPS, Costs, Link
from ringspan.kernels.mask import Full, Span
from ringspan.kernels.select import select
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.work import work

SMALL, LARGE = 4096, 8 << 20
ROUNDS = 7


def links(group: dist.ProcessGroup, device: torch.device, per_node: int) -> tuple[Link, ...]:
    """Return the link inside nodes, and between nodes where there are several; each measured with all ranks sending."""
    world = dist.get_world_size(group)
    levels = [1] if per_node > 1 else []
    levels += [per_node] if world > per_node else []
    return tuple(_link(group, device, distance) for distance in levels or [1])


def _link(group: dist.ProcessGroup, device: torch.device, distance: int) -> Link:
    """Send between ranks that are ``distance`` apart, one way, and both ways at once; half of the ranks have a peer."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    first = (rank // distance) % 2 == 0
    peer = rank + distance if first else rank - distance

    def seconds(size: int, *, both: bool) -> float:
        out, back = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        operations = [dist.P2POp(dist.isend, out, group=group, group_peer=peer)] if both or first else []
        operations += [dist.P2POp(dist.irecv, back, group=group, group_peer=peer)] if both or not first else []

        def go() -> None:
            for each in dist.batch_isend_irecv(operations) if 0 <= peer < world else []:
                each.wait()

        slowest = torch.tensor([_seconds(go, device, group)], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        return float(slowest)

    small, large, crossing = seconds(SMALL, both=False), seconds(LARGE, both=False), seconds(LARGE, both=True)
    bandwidth = (LARGE - SMALL) / max(large - small, 1e-9)
    return Link(max(small - SMALL / bandwidth, 0.0), bandwidth, duplex=crossing < 1.5 * large)


def rates(device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int) -> tuple[float, float, float]:
    """Return FLOP/s of the forward and the backward kernel, and the seconds of a call with hardly any work."""
    kernel = select(device, dtype, head_dim)
    heads, groups = 8, 2

    def tensors(length: int) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.randn(1, length, h, head_dim, device=device).to(dtype) for h in (heads, groups, groups, heads)
        )

    def both(length: int) -> tuple[float, float]:
        q, k, v, dout = tensors(length)
        job = work(Full(), (Span(0, length),), (Span(0, length),))
        total = Running.like(q)
        kernel.forward(total, q, k, v, job, scale=head_dim**-0.5)
        saved = Saved(q, total.out.to(dtype), total.lse, dout)
        sums = Gradients(*(torch.zeros_like(x, dtype=total.lse.dtype) for x in (q, k, v)))
        forward = _seconds(lambda: kernel.forward(Running.like(q), q, k, v, job, scale=head_dim**-0.5), device, None)
        return forward, _seconds(lambda: kernel.backward(sums, saved, k, v, job, scale=head_dim**-0.5), device, None)

    flops = tokens * tokens * heads * head_dim
    forward, backward = both(tokens)
    return FORWARD_FLOPS * flops / forward, BACKWARD_FLOPS * flops / backward, min(both(16))


def _seconds(go: Callable[[], None], device: torch.device, group: dist.ProcessGroup | None) -> float:
    times = []
    for _ in range(ROUNDS):
        if group is not None:
            dist.barrier(group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        go()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(group: dist.ProcessGroup, dtype: torch.dtype, head_dim: int, tokens: int, per_node: int) -> Costs:
    """Measure on all ranks of ``group``; the slowest rank's figures count."""
    cuda = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    found = links(group, device, per_node)
    forward, backward, call = rates(device, dtype, head_dim, tokens)
    slowest = torch.tensor([1 / forward, 1 / backward, call], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    forward, backward, call = slowest.tolist()
    source = f"measured on {dist.get_world_size(group)} ranks, {dist.get_backend(group)}, {device.type}"
    return Costs(found, per_node, 1 / forward, 1 / backward, call=call, source=source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the square that the kernel is timed on")
    parser.add_argument("--per-node", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    chosen = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    assert dist.group.WORLD is not None
    costs = measure(dist.group.WORLD, getattr(torch, chosen.dtype), chosen.head_dim, chosen.tokens, chosen.per_node)
    if dist.get_rank() == 0:
        costs.save(chosen.out)
        print(chosen.out.read_text())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
