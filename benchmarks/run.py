"""Run every benchmark and write README's table and docs/correctness.md anew: ``make bench``.

About an hour and a half on two quiet cores.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import hosts

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NAMES = (
    "ring_cpu", "ring_peers", "cpu_attention", "block_ranges", "balance", "exchange", "overlap", "demo_ranks",
    "parity", "resume", "axes", "fits",
)  # fmt: skip


def main() -> int:
    RESULTS.mkdir(exist_ok=True)
    draw = {name: ["--draw", f"docs/{name}.png"] for name in ("exchange", "overlap", "resume", "axes")}
    for name in NAMES:
        if name == "overlap" and (reason := hosts.missing()):
            print(f"benchmark {name}: left out: {reason}", flush=True)
            continue
        print(f"benchmark {name}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(RESULTS / f"{name}.json")]
        subprocess.run([*command, *draw.get(name, [])], check=True)
    evaluation = Path("runs/demo/evaluation.json")
    if evaluation.is_file():
        shutil.copyfile(evaluation, RESULTS / "demo.json")
    for page in ("table", "correctness_table", "parity_table"):
        subprocess.run([sys.executable, str(HERE / f"{page}.py")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
