"""Work and traffic of the layouts, counted in plans: no rank runs.

Work: the greatest rank's live pairs over the mean, summed over the layers. Traffic: key and value bytes that all ranks
receive in a forward pass of the ring, over Contiguous'. Planning: the least of a few rounds, milliseconds of processor
time to share out; each round asks for another block, so that none finds its answer in the cache.

Run: ``python benchmarks/balance.py --out benchmarks/results/balance.json``
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import time
from pathlib import Path

import numpy as np
import torch

from ringspan.dist_attn import Causal, Contiguous, Documents, Mask, Sinks, Window, ZigZag, plan
from ringspan.dist_attn.balanced import Balanced
from ringspan.dist_attn.layout import Layout, Striped

Layers = list[tuple[Mask, int]]
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128


def boundaries(length: int, documents: int, seed: int, first: int = 0) -> list[int]:
    """Return the edges of documents of lognormal lengths, behind one of ``first`` tokens."""
    draw = random.Random(seed)
    sizes = np.cumsum([draw.lognormvariate(0, 1) for _ in range(documents)])
    inner = first + (sizes / sizes[-1] * (length - first)).astype(int)
    return sorted({0, first, length, *inner[:-1].tolist()})


def models(length: int) -> dict[str, Layers]:
    """Return the layers of each case, by what it shows."""
    packed = Documents(boundaries(length, 300, 0))
    long = Documents(boundaries(length, 300, 1, first=length * 11 // 20))
    window = Causal() & (Window(4096) | Sinks(4))
    return {
        "dense causal": [(Causal(), 1)],
        "300 packed documents": [(Causal() & packed, 1)],
        "one document of 55 %, 300 short ones": [(Causal() & long, 1)],
        "half the layers causal, half window 4096 + 4 sinks": [(Causal(), 16), (window, 16)],
        "the same, 300 packed documents": [(Causal() & packed, 16), (window & packed, 16)],
    }


def judged(layout: Layout, layers: Layers, world: int, length: int) -> tuple[float, int]:
    """Return the imbalance and the bytes that all ranks receive, summed over the layers."""
    areas, received = np.zeros(world), 0
    for mask, count in layers:
        made = plan(
            mask,
            layout,
            world=world,
            length=length,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
        )
        areas += count * made.areas.sum(0)
        received += count * sum(made.received_bytes(rank) for rank in range(world))
    return float(areas.max() / areas.mean()), received


def milliseconds(layers: Layers, world: int, length: int, rounds: int) -> float:
    """Return the least processor time to share out."""
    taken = []
    for number in range(rounds):
        layout = Balanced(layers, block=127 - number)  # 128 has been planned above, and is in the cache
        began = time.process_time()
        layout.spans(0, world, length)
        taken.append(1e3 * (time.process_time() - began))
    return min(taken)


def measure(layers: Layers, world: int, length: int, rounds: int) -> dict[str, object]:
    layouts: list[Layout] = [Contiguous(), ZigZag(), Striped(), Balanced(layers)]
    found = {type(layout).__name__: judged(layout, layers, world, length) for layout in layouts}
    least = found["Contiguous"][1]
    return {
        "imbalance": {name: round(one, 4) for name, (one, _) in found.items()},
        "received_over_contiguous": {name: round(each / least, 3) for name, (_, each) in found.items()},
        "received_gib": {name: round(each / 2**30, 3) for name, (_, each) in found.items()},
        "spans_per_rank": sum(len(layouts[-1].spans(rank, world, length)) for rank in range(world)) / world,
        "milliseconds": round(milliseconds(layers, world, length, rounds), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1 << 20)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # a collection of everything that torch has imported is not the layout's cost
    cases = {}
    for name, layers in models(chosen.length).items():
        cases[name] = measure(layers, chosen.ranks, chosen.length, chosen.rounds)
        print(f"{name}: {json.dumps(cases[name])}", flush=True)
    huge = milliseconds(models(10_000_000)["300 packed documents"], 1024, 10_000_000, 1)
    row = {
        "length": chosen.length,
        "ranks": chosen.ranks,
        "heads": f"{HEADS}/{KV_HEADS} x {HEAD_DIM}",
        "dtype": "bfloat16",
        "cases": cases,
        "milliseconds_10M_tokens_1024_ranks_300_documents": round(huge),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, 1 thread",
    }
    print(json.dumps(row, indent=1))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
