"""Every mesh of the test suite against one rank: what docs/parallelism.md's table shows.

Run: ``python benchmarks/parity.py --out benchmarks/results/parity.json``
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from parity_cases import CASES, STEPS, Case, on_mesh, truth, write_text  # noqa: E402

from ringspan.parallel.testing import run_ranks  # noqa: E402


def measure(case: Case, folder: Path, text: Path) -> dict[str, Any]:
    config = case.config(folder, text)
    found = run_ranks(on_mesh, case.world, config, timeout=200)[0]
    dp = case.parallel.get("dp_shard", 1) * case.parallel.get("dp_replicate", 1)
    right = truth(config, dp)
    shown = {key: value for key, value in case.settings.items() if key != "parallel.engine"}
    return {
        "case": case.name,
        "parallel": case.parallel,
        "engine": case.settings.get("parallel.engine", "fsdp"),
        "model": case.kind,
        "settings": shown,
        "full": case.full,
        "loss": abs(found["loss"][0] - found["loss"][1]) / found["loss"][1],
        "gradient": found["worst"][1],
        "worst": found["worst"][0],
        "gradients": found["gradients"],
        "steps": STEPS,
        "curve": max(abs(a - b) / b for a, b in zip(found["losses"], right, strict=True)),
        "faults": found["faults"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="ringspan-parity-") as place:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(place) / "extensions")
        text = write_text(Path(place) / "text")
        for case in CASES:
            folder = Path(place) / case.name
            folder.mkdir()
            rows.append(row := measure(case, folder, text))
            print(f"{case.name:24} loss {row['loss']:.1e}  gradients {row['gradient']:.1e}  curve {row['curve']:.1e}")
    if chosen.out:
        chosen.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if any(row["faults"] for row in rows):
        sys.exit("a mesh differs from one rank")


if __name__ == "__main__":
    main()
