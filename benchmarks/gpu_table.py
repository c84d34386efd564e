"""Make docs/gpu.md from the latest benchmarks/results/gpu-<date>.json; no figure is typed by hand.

Without such a file the page says that no GPU has been measured.

Run: ``python benchmarks/gpu_table.py`` (``--check`` only compares, and fails where the page is not the results').
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "benchmarks" / "results"
NONE = "No GPU has been measured. `make gpu PART=dense OUT=folder` measures one, also `sparse`, `train` and `test`.\n"
Row = dict[str, Any]


def page(results: dict[str, Any] | None) -> str:
    """Return the page of a merged result, or of none."""
    head = "# On a GPU\n\nMade by `benchmarks/gpu_table.py` from `benchmarks/results/`.\n\n"
    if results is None:
        return head + NONE
    machine = results["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "transformers") if machine.get(name))
    text = head + f"{machine['device']}, {results['date']}; {versions}.\n"
    for name, part in results["parts"].items():
        text += f"\n## {name}\n\n"
        if not part["complete"]:
            text += "The part was cut short; these are the rows it had.\n\n"
        text += {"test": tests, "train": training, "tune": tuning}.get(name, attention)(part["rows"])
    return text


def attention(rows: list[Row]) -> str:
    """Return the table of a part that measures operators: TFLOP/s on live area, and what was not measured, and why."""
    product = next((row for row in rows if row["key"] == "matmul" and "tflops" in row), None)
    text = ""
    if product:
        text += (
            f"A bf16 product of side {product['side']} ran at {product['tflops']:.0f} TFLOP/s; shares are of that.\n\n"
        )
    text += "| case | operator | forward | share | backward | share |\n|---|---|---|---|---|---|\n"
    measured = [row for row in rows if "forward" in row]
    for row in measured:
        cells = [_rate(row.get(direction)) for direction in ("forward", "backward")]
        text += f"| {row['key'].rsplit(':', 1)[0]} | {row['operator']} | {' | '.join(cells)} |\n"
    return text + _missing([row for row in rows if "operator" in row and "forward" not in row])


def training(rows: list[Row]) -> str:
    """Return the table of training steps."""
    text = "| tokens | mask | attention | tokens/s | share of the matmul | peak GiB |\n|---|---|---|---|---|---|\n"
    for row in (row for row in rows if "step_s" in row):
        cells = [f"{row['length']:,}", f"`{row['mask']}`", row["attention"], f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{row['mfu_of_matmul']:.2f}", f"{row['peak_gib']:.1f}"]
        text += f"| {' | '.join(cells)} |\n"
    return text + _missing([row for row in rows if "attention" in row and "step_s" not in row])


def tuning(rows: list[Row]) -> str:
    """Return the fastest tile of each kernel beside the table's."""
    text = "| kernel | fastest tile | ms | the table's | ms | tried |\n|---|---|---|---|---|---|\n"
    for row in (row for row in rows if "tile" in row):
        times = [f"{row[name]:.3f}" if row[name] else "-" for name in ("ms", "table_ms")]
        cells = [
            row["key"].split(":")[0],
            f"`{row['tile']}`",
            times[0],
            f"`{row['table']}`",
            times[1],
            str(row["tried"]),
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def tests(rows: list[Row]) -> str:
    """Return what each check found."""
    text = "| check | found |\n|---|---|\n"
    for row in rows:
        counts = row.get("counts")
        found = ", ".join(f"{count} {name}" for name, count in counts.items()) if counts else row.get("said", "")
        reason = row.get("failed") or row.get("skipped")
        text += f"| {row['key']} | {_one_line(found)}{f' ({_one_line(reason)})' if reason else ''} |\n"
    broken = [name for row in rows for name in row.get("failures", {})]
    return text + ("\nFailed: " + ", ".join(f"`{name}`" for name in broken) + "\n" if broken else "")


def _missing(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [f"- {row['key']}: {_one_line(row.get('failed') or row.get('skipped') or 'no reason')}" for row in rows]
    return "\nNot measured:\n\n" + "\n".join(lines) + "\n"


def _rate(figures: Row | None) -> str:
    return f"{figures['tflops']:.0f} | {figures['share']:.2f}" if figures else "- | -"


def _one_line(words: str) -> str:
    return " ".join(words.split()).replace("|", "/")[:160]


def latest() -> dict[str, Any] | None:
    """Return the newest merged result, or None."""
    found = sorted(RESULTS.glob("gpu-*.json"))
    return json.loads(found[-1].read_text()) if found else None


def main() -> int:
    made = page(latest())
    if "--check" in sys.argv:
        return 0 if PAGE.is_file() and PAGE.read_text() == made else 1
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
