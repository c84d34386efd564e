"""Write docs/correctness.md's tables and notes from benchmarks/results; no figure is typed by hand.

Run: ``python benchmarks/correctness_table.py`` (``--check`` only compares, and fails where they differ).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "correctness.json"
TIMES = ROOT / "benchmarks" / "results" / "ring_peers.json"
PAGE = ROOT / "docs" / "correctness.md"
START, END = "<!-- made by benchmarks/correctness_table.py -->", "<!-- end -->"


class Notes:
    """What the libraries said, each thing once, numbered in order of appearance."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.said:
            self.said.append(text)
        return f"<sup>{self.said.index(text) + 1}</sup>"

    def lines(self) -> list[str]:
        return [f"{number}. {text}" for number, text in enumerate(self.said, start=1)]


def worst(errors: dict[str, float]) -> tuple[str, str]:
    """Return the tensor that is furthest off, and its error."""
    name = max(errors, key=lambda each: errors[each])
    return name, f"{errors[name]:.0e}" if errors[name] < 0.01 else f"{errors[name]:.2f}"


def text(cell: dict[str, Any] | None, notes: Notes) -> str:
    """Return what a cell shows."""
    if cell is None:
        return ""
    status = cell["status"]
    name, error = worst(cell["errors"]) if "errors" in cell else ("", "")
    why = notes.mark(short(cell["said"])) if "said" in cell else ""
    return {
        "right": error,
        "wrong": f"**WRONG**: {name} {error}",
        "refuses": f"refuses{why}",
        "aborts": f"aborts{why}",
        "missing": f"–{why}",
        "hangs": f"hangs ({cell.get('hung', 0):.0f} s)",
        "forward right": f"forward {error}, no backward{why}",
        "forward wrong": f"**WRONG**: {name} {error}, no backward{why}",
    }[status]


def short(said: str) -> str:
    """Return a message's first sentence."""
    return said.split(". ")[0].replace("|", "\\|").replace("\n", " ").strip()


def table(results: dict[str, Any], world: int, notes: Notes) -> list[str]:
    """Return one table: a row for each library, a column for each case."""
    cells = {(cell["arm"], cell["case"]): cell for cell in results["cells"] if cell["ranks"] == world}
    columns = list(dict.fromkeys(cell["case"] for cell in results["cells"]))
    lines = [f"### {world} ranks", "", "| | level | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for arm in results["arms"]:
        title, fault = arm["title"], arm["does_not_run"]
        if fault:
            shown = [f"does not run{notes.mark(short(fault))}", *([""] * (len(columns) - 1))]
        else:
            shown = [text(cells.get((title, column)), notes) for column in columns]
        lines.append(f"| {title} | {arm['level']} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def made(results: dict[str, Any]) -> str:
    """Return the generated part of the page."""
    notes = Notes()
    tables = [
        line for world in sorted({cell["ranks"] for cell in results["cells"]}) for line in table(results, world, notes)
    ]
    packages = {arm["package"] for arm in results["arms"]} - {None}
    versions = ", ".join(f"{name} {results['packages'][name]}" for name in sorted(packages))
    calls = [f"- **{arm['title']}**: {arm['called']}." for arm in results["arms"]]
    head = f"Torch {results['torch']}, transformers {results['transformers']}, {versions}; {results['machine']}."
    said = ["What they said:", "", *notes.lines(), ""]
    return "\n".join([head, "", *tables, *said, "What was called:", "", *calls])


def speed(times: dict[str, Any]) -> str:
    """Return how long each library took: a row each, a column for each case."""
    cases = times["cases"]
    titles = list(dict.fromkeys(title for case in cases for title in case["seconds"]))
    heads = [f"{case['case']}, {case['length'] // 1024}K" for case in cases]
    lines = ["| seconds (over our ring) | " + " | ".join(heads) + " |", "|---" * (len(cases) + 1) + "|"]
    for title in titles:
        shown = []
        for case in cases:
            seconds, over = case["seconds"].get(title), case["their_time_over_ours"].get(title)
            dense = ", of dense causal attention" if title in case["computes_dense_causal_instead"] else ""
            ratio = "" if over is None else f" ({over:.2f}{dense})"
            shown.append("" if seconds is None else f"{seconds:.2f}{ratio}")
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    load = max(load for case in cases for load in case["load_average"])
    head = (
        f"{times['ranks']} ranks of one thread, {times['heads']} heads, {times['dtype']}, forward and backward, the "
        f"fastest of {cases[0]['rounds']} interleaved rounds; {times['machine']}, load average {load:.1f} at most."
    )
    return "\n".join([head, "", *lines])


def page(current: str, results: dict[str, Any], times: dict[str, Any]) -> str:
    """Return the page with its generated parts renewed."""
    before, _, rest = current.partition(START)
    between, _, last = rest.partition(END)[2].partition(START)
    parts = [f"{START}\n{part}\n{END}" for part in (made(results), speed(times))]
    return f"{before}{parts[0]}{between}{parts[1]}{last.partition(END)[2]}"


def renewed(current: str) -> str:
    """Return the page as the committed results make it."""
    return page(current, json.loads(RESULTS.read_text()), json.loads(TIMES.read_text()))


def main() -> int:
    current = PAGE.read_text()
    if "--check" in sys.argv:
        return 0 if renewed(current) == current else 1
    PAGE.write_text(renewed(current))
    return 0


if __name__ == "__main__":
    sys.exit(main())
