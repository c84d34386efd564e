"""How memory grows with the sequence: flat while ranks grow with it, and what fits 4 GiB beside HF's Trainer.

Model: 8 layers, hidden 512, 8/2 heads, vocabulary 32,768. Fresh processes; memory is the most that was resident above
what was after the model was built, of the fullest rank.

Run: ``python benchmarks/fits.py --out benchmarks/results/fits.json``
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("fits_worker.py")
LIMIT = 4 << 30
PER_RANK = 8192  # tokens a rank, where ranks grow with the sequence
STEP = 1024  # between the lengths that are tried for the Trainer


def run(arm: str, length: int, ranks: int, dtype: str, timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ringspan-fits-") as folder:
        out = Path(folder) / "row.json"
        launcher = [sys.executable]
        if arm == "ringspan":
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        # Freed memory goes back at once, or the peak would be the allocator's habit.
        environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        subprocess.run(
            [*launcher, str(WORKER), arm, str(length), dtype, str(out)],
            env=environment, timeout=timeout, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        row = {"arm": arm, **json.loads(out.read_text())}
    print(json.dumps(row), flush=True)
    return row


def longest_of_trainer() -> tuple[int, list[dict[str, Any]]]:
    """Return the most tokens with which the Trainer stays within the limit, to a step, and what was run."""
    rows = []

    def fits(steps: int) -> bool:
        rows.append(run("trainer", steps * STEP, 1, "bfloat16", 900))
        return rows[-1]["bytes"] <= LIMIT

    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * STEP, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--times", type=int, default=8, help="how many of the Trainer's tokens ours is to fit")
    chosen = parser.parse_args()
    found: dict[str, Any] = {"limit_bytes": LIMIT}

    def keep(**more: Any) -> None:
        """Write what is there after each part: the last takes a quarter of an hour."""
        found.update(more)
        if chosen.out:
            chosen.out.write_text(json.dumps(found, indent=1) + "\n")

    keep(flat=[run("ringspan", PER_RANK * ranks, ranks, "float32", 900) for ranks in (1, 2, 4)])
    longest, tried = longest_of_trainer()
    keep(trainer=tried, trainer_tokens=longest)
    ours = run("ringspan", chosen.times * longest, 2, "bfloat16", 3600)
    keep(ours=ours, times=chosen.times, ours_fits=ours["bytes"] <= LIMIT)


if __name__ == "__main__":
    main()
