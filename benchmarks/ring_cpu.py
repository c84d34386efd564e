"""What the exchange costs: a ring of two CPU ranks beside two ranks that do the same work and send nothing.

Arms take turns in one run; a figure is the ratio of each arm's fastest round.

- ring: forward and backward of ``attention`` over two gloo ranks, causal, zigzag.
- silent: the same executor, tiles and merges, but messages are neither sent nor awaited.
- flash: torch's own flash operator, forward and backward, on a causal square of the same area per rank.

Run: ``python benchmarks/ring_cpu.py --out benchmarks/results/ring_cpu.json``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.dist_attn import Causal, Plan, Traffic, ZigZag, plan
from ringspan.dist_attn.exchange import Exchange, Pending
from ringspan.dist_attn.executor import ShardedAttention, Wiring
from ringspan.dist_attn.message import Message
from ringspan.dist_attn.ring import executor
from ringspan.kernels.select import select
from ringspan.parallel.testing import run_ranks

HEADS, GROUPS, DIM = 8, 2, 64


class Silent(Exchange):
    """Takes messages and moves nothing."""

    def post(
        self, round_id: int, sends: Sequence[tuple[int, Message]], receives: Sequence[tuple[int, Message]]
    ) -> Pending:
        for _, message in receives:
            message.first.zero_()
            message.second.zero_()
        return Pending([], [])


def ring_arm(group: dist.ProcessGroup, tensors: list[Tensor], length: int, silent: bool, traffic: Traffic) -> None:
    exchange = (Silent if silent else Exchange)(group, "0" * 64, 0, traffic)
    kernel = select(torch.device("cpu"), torch.float32, DIM)
    problem = planned(length, dist.get_world_size(group)).problem
    ring = executor(problem, Wiring(dist.get_rank(group), exchange), kernel, DIM**-0.5)
    q, k, v, dout = tensors
    out, _ = ShardedAttention.apply(q, k, v, None, ring, None)  # pyright: ignore[reportGeneralTypeIssues]
    out.backward(dout)


def planned(length: int, world: int) -> Plan:
    shape = {"heads": HEADS, "kv_heads": GROUPS, "head_dim": DIM, "dtype": torch.float32}
    return plan(Causal(), ZigZag(), world=world, length=length, **shape)


def flash_arm(side: int) -> None:
    q, k, v, dout = (torch.randn(1, side, h, DIM) for h in (HEADS, GROUPS, GROUPS, HEADS))
    q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
    operators, scale = torch.ops.aten, DIM**-0.5
    out, lse = operators._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    operators._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, True, scale=scale)


def worker(group: dist.ProcessGroup, length: int, rounds: int) -> dict[str, list[float]]:
    local = length // dist.get_world_size(group)
    side = round((length * local) ** 0.5)  # causal square of the rank's live area
    times: dict[str, list[float]] = {"ring": [], "silent": [], "flash": []}
    traffic = Traffic()
    for number in range(rounds + 1):
        for arm, taken in times.items():
            tensors = [torch.randn(1, local, h, DIM).requires_grad_(h != 0) for h in (HEADS, GROUPS, GROUPS)]
            tensors.append(torch.randn(1, local, HEADS, DIM))
            dist.barrier(group)
            began = time.perf_counter()
            if arm == "flash":
                flash_arm(side)
            else:
                ring_arm(group, tensors, length, arm == "silent", traffic)
            dist.barrier(group)
            if number:  # the first round warms up
                taken.append(time.perf_counter() - began)
    return {**times, "received": [traffic.received_payload / (rounds + 1)]}


def measure(length: int, world: int, rounds: int) -> dict[str, object]:
    results = run_ranks(worker, world, length, rounds, timeout=1800)
    best = {arm: min(results[0][arm]) for arm in ("ring", "silent", "flash")}
    made = planned(length, world)
    bound = [made.lower_bound_bytes(rank) for rank in range(world)]
    return {
        "length": length,
        "ranks": world,
        "heads": f"{HEADS}/{GROUPS} x {DIM}",
        "dtype": "float32",
        "rounds": rounds,
        "seconds": best,
        "all_seconds": {arm: results[0][arm] for arm in best},
        "ring_over_silent": best["silent"] / best["ring"],
        "ring_over_flash": best["flash"] / best["ring"],
        "received_bytes": [result["received"][0] for result in results],
        "forward_lower_bound_bytes": bound,
        "received_over_bound": sum(result["received"][0] for result in results) / (3 * sum(bound)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(chosen.length, chosen.ranks, chosen.rounds)
    row |= {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
    }
    print(json.dumps(row, indent=1))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
