"""One host of ``overlap.py``: run attention with its exchange, without it, and the exchange alone, taking turns.

``compute`` is "real", or "wait": kernels sleep for the time their area takes at a given rate, so that more hosts than
cores can overlap like so many machines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from links import links, rates
from torch import Tensor

from ringspan.dist_attn import Balanced, Traffic, parse_mask, plan
from ringspan.dist_attn import layout as layouts
from ringspan.dist_attn.cost import BACKWARD_FLOPS, FORWARD_FLOPS
from ringspan.dist_attn.exchange import Exchange, Pending
from ringspan.dist_attn.executor import Wiring
from ringspan.dist_attn.planner import Plan
from ringspan.dist_attn.strategies import TABLE
from ringspan.kernels.select import Backend, select
from ringspan.kernels.state import Saved

ARMS = ("whole", "silent", "exchange")


class Silent(Exchange):
    """Takes transfers and moves nothing."""

    def post(self, round_id: int, sends: Any, receives: Any) -> Pending:
        for _, message in receives:
            for each in message.tensors:
                each.zero_()
        return Pending([], [])

    def all_gather(self, local: Tensor, step: str) -> tuple[Tensor, Pending]:
        return local.new_zeros((self.world, *local.shape)), Pending([], [])


def waiting(forward_rate: float, backward_rate: float) -> Backend:
    """Return a kernel that sleeps for as long as its pairs take at these FLOP/s (infinite rates: not at all)."""

    def sleep(q: Tensor, work: Any, flops: int, rate: float) -> None:
        time.sleep(work.area * q.shape[0] * q.shape[2] * q.shape[3] * flops / rate)

    def forward(total: Any, q: Tensor, k: Tensor, v: Tensor, work: Any, *, scale: float) -> None:
        sleep(q, work, FORWARD_FLOPS, forward_rate)

    def backward(total: Any, saved: Saved, k: Tensor, v: Tensor, work: Any, *, scale: float) -> None:
        sleep(saved.q, work, BACKWARD_FLOPS, backward_rate)

    module: Any = SimpleNamespace(forward=forward, backward=backward)
    return Backend("wait", module, "sleeps")


def planned(case: dict[str, Any], world: int) -> Plan:
    mask, dtype = parse_mask(case["mask"]), getattr(torch, case["dtype"])
    layout = Balanced(mask) if case["layout"] == "Balanced" else getattr(layouts, case["layout"])()
    shape = {name: case[name] for name in ("length", "heads", "kv_heads", "head_dim")}
    return plan(mask, layout, world=world, strategy=case["strategy"], dtype=dtype, **shape)


class Runner:
    """One case on this host: each pass of each arm, timed."""

    def __init__(self, group: dist.ProcessGroup, case: dict[str, Any], kernel: Backend) -> None:
        self.group, self.plan = group, planned(case, dist.get_world_size(group))
        rank, problem = dist.get_rank(group), self.plan.problem
        nothing = waiting(float("inf"), float("inf"))
        self.executors = {}
        for arm in ARMS:
            exchange = (Silent if arm == "silent" else Exchange)(group, self.plan.hash, 0, Traffic())
            wiring = Wiring(rank, exchange)
            used = nothing if arm == "exchange" else kernel
            self.executors[arm] = TABLE[self.plan.strategy].executor(problem, wiring, used, 0.125)
        rows = sum(span.size for span in problem.spans(rank))
        heads = (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
        self.tensors = [torch.randn(1, rows, h, problem.head_dim, dtype=problem.dtype) for h in heads]

    def round(self, arm: str) -> tuple[float, float]:
        """Return the seconds of the forward and of the backward pass, until the last rank is done."""
        q, k, v, dout = self.tensors
        times = []
        dist.barrier(self.group)
        began = time.perf_counter()
        out, lse, rest = self.executors[arm].forward(q, k, v)
        dist.barrier(self.group)
        times.append(time.perf_counter() - began)
        saved = Saved(q, out.to(q.dtype), lse, dout)
        _ = saved.delta
        dist.barrier(self.group)
        began = time.perf_counter()
        self.executors[arm].backward(saved, k, v, rest)
        dist.barrier(self.group)
        times.append(time.perf_counter() - began)
        return times[0], times[1]


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    cpu = torch.device("cpu")
    found: dict[str, Any] = {"links": [asdict(link) for link in links(group, cpu, 1)], "cases": []}
    for case in request["cases"]:
        if case["compute"] == "wait":
            rate = case["rate"]
            kernel, speeds = waiting(rate, rate), (rate, rate, 0.0)
        else:
            kernel, speeds = (
                select(cpu, torch.float32, case["head_dim"]),
                rates(cpu, torch.float32, case["head_dim"], 2048),
            )
        runner = Runner(group, case, kernel)
        times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
        for number in range(request["rounds"] + 1):
            for arm in ARMS:
                taken = runner.round(arm)
                if number:
                    times[arm].append(taken)
        found["cases"].append({"case": case, "times": times, "speeds": speeds})
    with open(os.environ["RINGSPAN_RESULT"], "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
