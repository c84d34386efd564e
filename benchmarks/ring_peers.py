"""Two CPU ranks, forward and backward: ours beside the other libraries that run on a CPU, in one run.

Arms take turns; a figure is the ratio of each arm's fastest round. Equal heads (8/8 x 64), fp32, one thread a rank.

- causal: every arm computes the same.
- packed + window: 8 documents of unequal lengths and a sliding window of 1,024. Torch's ring template has no word for
  either, so its time there is that of dense causal attention. DeepSpeed's local attention is the caller's: here torch's
  SDPA with the mask written out, which computes all pairs and hides most.
- ringmaster's block on a CPU holds all logits at once, so it is timed at 4K only.

Run: ``python benchmarks/ring_peers.py --out benchmarks/results/ring_peers.json``; it installs the others under build/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # dense.py, which the cases are written in

from peers.arm import Arm, Operator  # noqa: E402
from peers.cases import Case  # noqa: E402
from peers.cell import arms  # noqa: E402
from peers.install import PACKAGES, environment, folder_of, install  # noqa: E402

from ringspan.parallel.testing import run_ranks  # noqa: E402

HEADS, DIM = 8, 64
OURS = "ringspan, ring"
OUR_ULYSSES = "ringspan, ulysses"
RINGMASTER = "ringmaster ring, p2p"
TORCH = ("torch ring template, all-gather", "torch ring template, all-to-all")
DEEPSPEED = "DeepSpeed Ulysses"
K = 1024


def problems(short: int, long: int) -> list[tuple[Case, tuple[str, ...]]]:
    """Return each case with its arms; lengths in tokens."""
    # Documents of 1/32 to 1/4 of the sequence, none at a share's edge.
    edges = tuple(long * part // 64 for part in (0, 2, 7, 18, 23, 37, 41, 55, 64))
    return [
        (Case("causal", short, HEADS, HEADS), (OURS, OUR_ULYSSES, *TORCH, DEEPSPEED, RINGMASTER)),
        (Case("causal", long, HEADS, HEADS), (OURS, OUR_ULYSSES, *TORCH, DEEPSPEED)),
        (
            Case("packed + window", long, HEADS, HEADS, edges, min(K, long // 16)),
            (OURS, OUR_ULYSSES, *TORCH, DEEPSPEED),
        ),
    ]


def bind(arm: Arm, case: Case, group: dist.ProcessGroup) -> Operator:
    """Return an arm's operator; on a case that it has no word for, on dense causal attention of the same length."""
    assert arm.operator is not None
    return arm.operator(Case("causal", case.length, HEADS, HEADS) if arm.missing(case) else case, group)


def worker(group: dist.ProcessGroup, case: Case, titles: list[str], rounds: int) -> dict[str, list[float]]:
    """Return each arm's seconds, a round each."""
    rows = arms()
    sys.path += [str(folder_of(name)) for name in {rows[title].package for title in titles} if name is not None]
    times: dict[str, list[float]] = {title: [] for title in titles}
    for number in range(rounds + 1):
        for title, taken in times.items():
            bound = bind(rows[title], case, group)  # anew each time: torch's ring has its settings in globals
            shape = (1, len(bound.rows), HEADS, DIM)
            q, k, v = (torch.randn(shape).requires_grad_() for _ in range(3))
            dout = torch.randn(shape)
            dist.barrier(group)
            began = time.perf_counter()
            bound.call(q, k, v, None).backward(dout)
            dist.barrier(group)
            if number:  # the first round warms up
                taken.append(time.perf_counter() - began)
    return times


def measure(case: Case, titles: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Return one case's figures; a library that does not run is named with its reason."""
    rows = arms()
    faults = {title: install(package) for title in titles if (package := rows[title].package) is not None}
    running = [title for title in titles if faults.get(title) is None]
    load = [os.getloadavg()[0]]
    times = run_ranks(worker, 2, case, running, rounds, timeout=3600)[0]
    load.append(os.getloadavg()[0])
    best = {title: min(taken) for title, taken in times.items()}
    return {
        "case": case.name,
        "length": case.length,
        "documents": len(case.boundaries) - 1 if case.boundaries else 1,
        "window": case.window,
        "rounds": rounds,
        "load_average": load,  # before and after; two ranks alone make 2, what is above took their time
        "seconds": best,
        "all_seconds": times,
        "computes_dense_causal_instead": [title for title in running if rows[title].missing(case)],
        "does_not_run": {title: fault for title, fault in faults.items() if fault is not None},
        "their_time_over_ours": {title: best[title] / best[OURS] for title in running if title != OURS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=4 * K)
    parser.add_argument("--long", type=int, default=16 * K)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(environment())
    result = {
        "ranks": 2,
        "heads": f"{HEADS}/{HEADS} x {DIM}",
        "dtype": "float32",
        "torch": torch.__version__,
        "packages": {name: package.version for name, package in PACKAGES.items()},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "cases": [measure(case, titles, chosen.rounds) for case, titles in problems(chosen.short, chosen.long)],
    }
    print(json.dumps(result, indent=1))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
