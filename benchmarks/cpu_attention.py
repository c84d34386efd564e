"""What sparse masks and bf16 cost on one CPU core, as ratios within one run.

Arms take turns; a figure is made of each arm's fastest round (process time, one thread). An area ratio is a time per
live (query, key) pair over the dense causal arm's: 1.0 would be a mask that saves exactly what it hides.

- dense: causal by the same backend, forward and backward, fp32; window and dilated, S2 groups, documents beside it.
- bf16: one causal forward by the backend and by torch's own operator, and both errors against float64; "alone" is a
  call whose rows meet no other keys, "partial" one that must leave its result in fp32 for a merge.

Run: ``python benchmarks/cpu_attention.py --out benchmarks/results/cpu_attention.json`` (``--quick``: a dry run).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ringspan.kernels import cpu, reference
from ringspan.kernels.mask import Causal, Dilated, Documents, Groups, Mask, Sinks, Span, Window
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.work import Work

HEADS, GROUPS, DIM = 8, 2, 64
SCALE = DIM**-0.5
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def masks(length: int) -> dict[str, Mask]:
    """Return the arms: the documents have 32 uneven lengths, none of them a round number."""
    cuts = [round(length * (i / 32) ** 1.3) for i in range(33)]
    return {
        "causal": Causal(),
        "window 1024 + 4 sinks": Causal() & (Window(1024) | Sinks(4)),
        "groups of 2048": Causal() & Groups(2048),
        "dilated 4, 1024 keys": Causal() & Dilated(1024, 4),
        "32 documents": Causal() & Documents(cuts),
    }


def clock(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def both_ways(work: Work, tensors: list[Tensor]) -> tuple[float, float]:
    """Return the seconds of one forward and one backward."""
    q, k, v, dout = tensors
    total = Running.like(q)
    forward = clock(lambda: cpu.forward(total, q, k, v, work, scale=SCALE))
    saved = Saved(q, total.out, total.lse, dout)
    grads = Gradients(*(torch.zeros_like(x) for x in (q, k, v)))
    return forward, clock(lambda: cpu.backward(grads, saved, k, v, work, scale=SCALE))


def sparse(length: int, rounds: int, dense_rounds: int) -> dict[str, dict[str, float]]:
    """Time every mask forward and backward; the dense arm runs in the first ``dense_rounds`` rounds."""
    tensors = [torch.randn(1, length, heads, DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    works = {name: Work(mask, (Span(0, length),), (Span(0, length),)) for name, mask in masks(length).items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for work in works.values():  # tiles are planned once for a mask, outside the clock
        for sweep in work.sweeps:
            cpu.plan(sweep)
    for number in range(rounds):
        for name, work in works.items():
            if name != "causal" or number < dense_rounds:
                times[name].append(both_ways(work, tensors))
    found = {}
    dense: tuple[float, float] | None = None
    for name, work in works.items():
        best = min(forward for forward, _ in times[name]), min(backward for _, backward in times[name])
        dense = dense or best
        share = work.area / works["causal"].area
        tiles = [tiles for sweep in work.sweeps for tiles in cpu.plan(sweep)]
        found[name] = {
            "forward_seconds": best[0],
            "backward_seconds": best[1],
            "live_share": share,
            "visited_over_live": sum(each.visited for each in tiles) / work.area,
            "time_over_area": sum(best) / sum(dense) / share,
            "forward_time_over_area": best[0] / dense[0] / share,
            "backward_time_over_area": best[1] / dense[1] / share,
        }
    return found


def bf16(length: int, rounds: int) -> dict[str, float]:
    """Return seconds of a causal bf16 forward, alone, partial and by torch's operator."""
    q, k, v = (torch.randn(1, length, heads, DIM).bfloat16() for heads in (HEADS, GROUPS, GROUPS))
    theirs = [x.transpose(1, 2) for x in (q, k, v)]
    work = Work(Causal(), (Span(0, length),), (Span(0, length),))

    def ours(alone: bool) -> None:
        cpu.forward(Running.like(q, alone=alone), q, k, v, work, scale=SCALE)

    arms: dict[str, Callable[[], object]] = {
        "alone": lambda: ours(True),
        "partial": lambda: ours(False),
        "torch": lambda: scaled_dot_product_attention(theirs[0], theirs[1], theirs[2], is_causal=True, enable_gqa=True),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            taken = clock(arm)
            if number:  # the first round warms up
                times[name].append(taken)
    best = {name: min(taken) for name, taken in times.items()}
    return {
        **{f"{name}_seconds": taken for name, taken in best.items()},
        "torch_over_alone": best["torch"] / best["alone"],
        "torch_over_partial": best["torch"] / best["partial"],
    }


def bf16_error(length: int) -> dict[str, float]:
    """Return the relative errors of a causal bf16 forward against float64."""
    q, k, v = (torch.randn(1, length, heads, DIM).bfloat16() for heads in (HEADS, GROUPS, GROUPS))
    work = Work(Causal(), (Span(0, length),), (Span(0, length),))
    exact, alone, partial = Running.like(q.double()), Running.like(q, alone=True), Running.like(q)
    reference.forward(exact, q.double(), k.double(), v.double(), work, scale=SCALE)
    cpu.forward(alone, q, k, v, work, scale=SCALE)
    cpu.forward(partial, q, k, v, work, scale=SCALE)
    theirs = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    found = {"alone": alone.out, "partial": partial.out, "partial_cast": partial.out.bfloat16(), "torch": theirs}
    return {name: float((out.double() - exact.out).norm() / exact.out.norm()) for name, out in found.items()}


def features() -> list[str]:
    """Return which of the vector extensions that matter here the CPU names."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    return [flag for flag in FLAGS if flag in words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dense-rounds", type=int, default=2, help="of the dense arm, the slowest by far")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round: a dry run, no measurement")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.length, chosen.rounds, chosen.dense_rounds = 2500, 1, 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row = {
        "length": chosen.length,
        "heads": f"{HEADS}/{GROUPS} x {DIM}",
        "rounds": chosen.rounds,
        "sparse_float32": sparse(chosen.length, chosen.rounds, chosen.dense_rounds),
        "bf16_length": min(chosen.length, 8192),
        "bf16_forward": bf16(min(chosen.length, 8192), chosen.rounds),
        "bf16_error": bf16_error(min(chosen.length, 1024)),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, 1 thread, {' '.join(features())}",
    }
    print(json.dumps(row, indent=1))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
