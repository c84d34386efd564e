"""Write docs/parallelism.md's table from benchmarks/results/parity.json; no figure is typed by hand.

Run: ``python benchmarks/parity_table.py`` (``--check`` only compares, and fails where they differ).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "parity.json"
PAGE = ROOT / "docs" / "parallelism.md"
START, END = "<!-- made by benchmarks/parity_table.py -->", "<!-- end -->"
TEST = "../tests/launch/test_parity.py"


def row(found: dict[str, Any]) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in found["parallel"].items())
    if found["engine"] == "deepspeed":
        mesh += f", ZeRO-{found['settings']['parallel.deepspeed']['zero_optimization']['stage']}"
    with_ = [said(key, value) for key, value in found["settings"].items() if key != "parallel.deepspeed"]
    where = f"[{found['case']}]({TEST})" + (" (`make test-all`)" if found["full"] else "")
    return (
        f"| {mesh} | {found['model']} | {', '.join(with_) or 'causal'} | {found['loss']:.0e} | {found['gradient']:.0e} "
        f"| {found['curve']:.0e} | {where} |"
    )


def said(key: str, value: Any) -> str:
    name = key.split(".")[1]
    text = str(value).replace("|", "/")
    return {
        "mask": f"`{text}`",
        "r": f"LoRA {text}",
        "activation_checkpointing": f"recompute {text}",
        "mlp_tile": f"MLP in tiles of {text}",
    }.get(name, f"{name} {text}")


def page() -> str:
    rows = json.loads(RESULTS.read_text())["rows"]
    lines = [
        "| mesh | model | with | loss | worst gradient | ten losses | test |",
        "|---|---|---|---|---|---|---|",
        *(row(found) for found in rows),
    ]
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}"


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        if text != PAGE.read_text():
            sys.exit(f"{PAGE.name} is not what the results say: run python benchmarks/parity_table.py")
        return
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
