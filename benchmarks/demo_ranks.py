"""The demo's model and data on one rank and on two: the same losses, tokens a second, bytes moved, memory.

Runs ``ringspan train configs/demo.yaml`` with ``parallel.cp`` 1 and 2, and once more under torchrun, ten steps each,
without evaluation. Needs the demo's base (``make demo`` makes it).

Run: ``python benchmarks/demo_ranks.py --out benchmarks/results/demo_ranks.json``
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 10
QUIET = (
    ["--eval.path", "null", "--eval.before", "false", "--eval.every", "0", "--eval.passkey_lengths", "[]"]
    + ["--eval.by_position", "false", "--checkpoint.every", "0", "--track.wandb", "off"]
    + ["--train.max_steps", str(STEPS)]
)  # fmt: skip
RINGSPAN = [sys.executable, "-m", "ringspan.launch.cli", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def train(launcher: list[str], cp: int, folder: Path) -> list[dict[str, float]]:
    command = [*launcher, "configs/demo.yaml", *QUIET, "--parallel.cp", str(cp), "--train.output_dir", str(folder)]
    subprocess.run(command, check=True, timeout=1200, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measure() -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="ringspan-bench-") as place:
        one = train(RINGSPAN, 1, Path(place) / "one")
        two = train(RINGSPAN, 2, Path(place) / "two")
        launched = train([*TORCHRUN, "2", "-m", "ringspan.launch.train"], 2, Path(place) / "torchrun")
    losses = [[row["train/loss"] for row in rows] for rows in (one, two, launched)]
    apart = [max(abs(a - b) / abs(b) for a, b in zip(found, losses[0], strict=True)) for found in losses[1:]]

    def speed(rows: list[dict[str, float]]) -> float:
        # The same tokens in all; the first step warms up.
        return statistics.mean(row["perf/tokens_per_second"] * row["perf/step_time"] for row in rows[1:]) / (
            statistics.mean(row["perf/step_time"] for row in rows[1:])
        )

    return {
        "steps": STEPS,
        "losses_one_rank": losses[0],
        "largest_relative_difference_two_ranks": apart[0],
        "largest_relative_difference_torchrun": apart[1],
        "torchrun_equals_ringspan": losses[1] == losses[2],
        "tokens_per_second": {"1": speed(one), "2": speed(two)},
        "speed_up": speed(two) / speed(one),
        "peak_gib": {"1": one[-1]["memory/peak_gib"], "2": two[-1]["memory/peak_gib"]},
        "bytes_per_step": statistics.mean(row["perf/bytes_per_step"] for row in two),
        "bytes_lower_bound": statistics.mean(row["perf/bytes_lower_bound"] for row in two),
        "bytes_over_bound": sum(r["perf/bytes_per_step"] for r in two) / sum(r["perf/bytes_lower_bound"] for r in two),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if not Path("runs/demo_base/export/config.json").is_file():
        sys.exit("runs/demo_base/export is not there: run `make demo` first, and this in the repository's root")
    row = measure()
    print(json.dumps(row, indent=1))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
