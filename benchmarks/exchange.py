"""Bytes that each strategy moves, beside the least that could be and beside a ring that passes everything on.

Counted on gloo ranks from the buffers handed to send, receive and collectives, forward and backward; and planned for
a larger world, where counting is not possible (tests hold the counts against the plan, to the byte).

Run: ``python benchmarks/exchange.py --out benchmarks/results/exchange.json --draw docs/exchange.png``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringspan.dist_attn import (
    Causal,
    Contiguous,
    Documents,
    Mask,
    Plan,
    Sinks,
    Traffic,
    Window,
    ZigZag,
    attention,
    plan,
    s2_attention,
)
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.strategies import TABLE
from ringspan.parallel.testing import run_ranks

HEADS, GROUPS, DIM = 8, 4, 64


def packed(length: int, count: int) -> Documents:
    """Return ``count`` documents of random lengths, the same ones in every run."""
    drawn = random.Random(7)
    return Documents(sorted({0, length, *(drawn.randrange(1, length) for _ in range(count - 1))}))


def cases(length: int, documents: int) -> dict[str, tuple[Mask, Layout]]:
    """Return masks whose sizes grow with the length, each with the layout that suits it."""
    window, group = length // 16, length // 8
    return {
        "dense causal": (Causal(), ZigZag()),
        "window and sinks": (Causal() & (Window(window) | Sinks(4)), Contiguous()),
        "S2 groups": (s2_attention(group), Contiguous()),
        "packed documents": (Causal() & packed(length, documents), Contiguous()),
    }


def planned(mask: Mask, layout: Layout, world: int, length: int, strategy: str, dtype: torch.dtype) -> Plan:
    shape = {"heads": HEADS, "kv_heads": GROUPS, "head_dim": DIM, "dtype": dtype}
    return plan(mask, layout, world=world, length=length, strategy=strategy, **shape)


def count(group: dist.ProcessGroup, length: int, documents: int, strategies: list[str]) -> dict[str, Any]:
    """Run every case on this rank and return its counted payload bytes, forward and in all."""
    found: dict[str, Any] = {}
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for name, (mask, layout) in cases(length, documents).items():
        rows = layout.share(rank, world, length)
        for strategy in strategies:
            q, k, v = (torch.randn(1, rows, h, DIM, requires_grad=True) for h in (HEADS, GROUPS, GROUPS))
            traffic = Traffic()
            out = attention(
                q, k, v, mask=mask, group=group, layout=layout, strategy=strategy, length=length, traffic=traffic
            )
            forward = traffic.received_payload
            out.backward(torch.ones_like(out))
            found[f"{name}|{strategy}"] = (forward, traffic.received_payload)
    return found


def usable(world: int, length: int, documents: int) -> list[str]:
    """Return the strategies of a flat group that serve every case."""
    problems = [
        planned(mask, layout, world, length, "ring", torch.float32).problem
        for mask, layout in cases(length, documents).values()
    ]
    return [name for name, each in TABLE.items() if not any(each.refuses(problem) for problem in problems)]


def counted(length: int, world: int, documents: int) -> dict[str, Any]:
    strategies = usable(world, length, documents)
    results = run_ranks(count, world, length, documents, strategies, timeout=900)
    found: dict[str, Any] = {}
    for name, (mask, layout) in cases(length, documents).items():
        bound = planned(mask, layout, world, length, "ring", torch.float32)
        least = sum(bound.lower_bound_bytes(rank) for rank in range(world))
        everything = (world - 1) * length * 2 * GROUPS * DIM * 4
        for strategy in strategies:
            forward, both = (sum(result[f"{name}|{strategy}"][i] for result in results) for i in (0, 1))
            found.setdefault(name, {})[strategy] = {
                "forward_bytes": forward,
                "bytes": both,
                "over_bound": forward / least if least else None,
                "over_full_ring": forward / everything,
            }
        found[name]["lower_bound_bytes"], found[name]["full_ring_bytes"] = least, everything
    return found


def large(length: int, world: int, documents: int) -> dict[str, Any]:
    """Plan one rank after another of a large world, timed."""
    found: dict[str, Any] = {}
    planned(Causal(), ZigZag(), world, length - 1, "ring", torch.bfloat16).steps(0)  # imports, first calls
    for name, (mask, layout) in cases(length, documents).items():
        began = time.perf_counter()
        made = planned(mask, layout, world, length, "ring", torch.bfloat16)
        steps = made.steps(world // 2)
        milliseconds = 1e3 * (time.perf_counter() - began)
        forward = sum(made.received_bytes(rank) for rank in range(world))
        least = sum(made.lower_bound_bytes(rank) for rank in range(world))
        everything = (world - 1) * length * 2 * GROUPS * DIM * 2
        found[name] = {
            "plan_milliseconds": milliseconds,
            "steps": len(steps),
            "over_bound": forward / least if least else None,
            "over_full_ring": forward / everything,
        }
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw each strategy's forward bytes as a share of what a full ring moves; the bound as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(result["counted"])
    strategies = [key for key in result["counted"][names[0]] if not key.endswith("_bytes")]
    colours = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee"]
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(strategies)
    for index, strategy in enumerate(strategies):
        shares = [result["counted"][name][strategy]["over_full_ring"] for name in names]
        places = [number + (index - (len(strategies) - 1) / 2) * width for number in range(len(names))]
        axes.bar(places, shares, width * 0.92, color=colours[index % 5], label=strategy)
    for number, name in enumerate(names):
        bound = result["counted"][name]["lower_bound_bytes"] / result["counted"][name]["full_ring_bytes"]
        label = "" if number else "lower bound"
        axes.hlines(bound, number - 0.42, number + 0.42, color="black", lw=1.5, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("bytes received, forward\n(full ring = 1)")
    what = f"{result['ranks']} ranks, {result['length'] // 1024}K tokens, {HEADS}/{GROUPS} heads: counted bytes"
    axes.set_title(what, fontsize=11)
    axes.legend(frameon=False, ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument(
        "--large", type=int, nargs=3, default=[1 << 20, 64, 300], metavar=("TOKENS", "RANKS", "DOCUMENTS")
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, help="picture (PNG)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"length": chosen.length, "ranks": chosen.ranks, "heads": f"{HEADS}/{GROUPS} x {DIM}"}
    result["counted"] = counted(chosen.length, chosen.ranks, chosen.documents)
    tokens, ranks, documents = chosen.large
    result["large"] = {
        "length": tokens,
        "ranks": ranks,
        "documents": documents,
        "cases": large(tokens, ranks, documents),
    }
    result["machine"] = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    result["torch"] = torch.__version__
    print(json.dumps(result, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    if chosen.draw:
        draw(result, chosen.draw)


if __name__ == "__main__":
    main()
