"""Time to work out which blocks meet, for a million tokens with packed documents: what a kernel needs before it runs.

One thread, process time, minimum of several rounds, each from a mask that is not in any cache; milliseconds.

Run: ``python benchmarks/block_ranges.py [--length 1048576] [--rounds 5] [--out FILE]``
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from pathlib import Path

import torch

from ringspan.kernels.mask import Causal, Documents, Mask, Sinks, Span, Window
from ringspan.kernels.work import Work

BLOCK_ROWS, BLOCK_COLUMNS = 128, 64


def mask_of(length: int, documents: int, round_number: int) -> Mask:
    g = torch.Generator().manual_seed(round_number)
    inner = torch.randint(1, length, (documents - 1,), generator=g).tolist()
    return Causal() & (Window(4096) | Sinks(4)) & Documents(sorted({0, length, *inner}))


def milliseconds(length: int, documents: int, round_number: int) -> tuple[float, int]:
    """Return the time of both sides' runs from a bare mask, and how many runs there are."""
    mask = mask_of(length, documents, round_number)
    whole = (Span(0, length),)
    began = time.process_time()
    (sweep,) = Work(mask, whole, whole).sweeps
    runs = [each(BLOCK_ROWS, BLOCK_COLUMNS) for each in (sweep.row_runs, sweep.column_runs)]
    return 1e3 * (time.process_time() - began), sum(len(each.runs) for each in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # a collection of everything that torch has imported is not the mask's cost
    arms = {}
    for documents in (1, 300, 2000):
        rounds = [milliseconds(chosen.length, documents, number) for number in range(chosen.rounds)]
        arms[str(documents)] = {"milliseconds": min(rounds)[0], "runs": min(rounds)[1]}
    row = {
        "length": chosen.length,
        "mask": "causal & (window(4096) | sinks(4)) & documents",
        "blocks": [BLOCK_ROWS, BLOCK_COLUMNS],
        "documents": arms,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, 1 thread",
    }
    print(json.dumps(row, indent=1))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
